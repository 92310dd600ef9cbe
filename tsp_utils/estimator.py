"""TSP as a scikit-learn clusterer: fit on features, predict for more of them."""

import warnings
from numbers import Integral, Real

import numpy as np
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from tsp_utils.devices import find_device
from tsp_utils.heads import best_head, check_training, init_heads, train_heads, warn_of_collapse
from tsp_utils.neighbors import nearest_neighbors
from tsp_utils.scaling import Scaler


class TSPClustering(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """The clustering head of TSP on features [N, D] from a frozen backbone (Secs 3.2, 4.2).

    `n_init` heads start from their own K-means (or at random) and train at once on Eq. 5; the one
    with the lowest training loss is kept, so no label is read anywhere. Parameters are those of
    `train_heads` and `nearest_neighbors`; n_neighbors is lowered, with a warning, where there are
    too few samples, and a batch is an eighth of them, at least 32 and at most batch_size.

    Attributes: labels_ int64 [N], the clusters of the fitted samples; coef_ [C, D] and intercept_
    [C], which work on X as passed; scale_, the scalar that brought the mean length of the features
    to sqrt(D), folded into coef_; history_, the kept head's curves by name, each [epochs]
    (its last n_nonempty and largest_share: of the finished head on all samples);
    losses_ [n_init], the final losses that it was chosen by; n_features_in_, feature_names_in_.
    `fit` raises ValueError for settings that cannot train, fewer than 4 samples, fewer distinct
    ones than clusters, all-zero X, and where the loss of every head is NaN.
    """

    def __init__(self, n_clusters=8, *, n_neighbors=20, n_init=10, init="k-means",
                 entropy_weight=3.0, max_epochs=100, min_steps=2000, batch_size=256,
                 learning_rate=1e-4, metric="cosine", device="auto", random_state=None):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.n_init = n_init
        self.init = init
        self.entropy_weight = entropy_weight
        self.max_epochs = max_epochs
        self.min_steps = min_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.metric = metric
        self.device = device
        self.random_state = random_state

    def fit(self, X, y=None):
        """Learn the clusters of features X [N, D]; y is ignored. Returns self."""
        if hasattr(X, "images") or getattr(X, "ndim", 2) == 4:
            raise ValueError("These are images, and TSPClustering takes features [N, D]; pass "
                             "cached_features(load_backbone(NAME), images).")
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=4)
        device = self._checked_settings()
        scaler = Scaler().fit(X)
        features = scaler.transform(X)
        neighbors = nearest_neighbors(features, self._usable_neighbors(len(X)), self.metric, device)
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=self.n_init).tolist()
        heads = init_heads(features, self.n_clusters, seeds, self.init)
        with warnings.catch_warnings():  # of heads that are not kept nobody needs to hear
            warnings.filterwarnings("ignore", "Collapse", UserWarning)
            curves = train_heads(
                heads, features, neighbors, entropy_weight=self.entropy_weight,
                max_epochs=self.max_epochs, min_steps=self.min_steps,
                batch_size=min(self.batch_size, max(32, len(X) // 8)),
                learning_rate=self.learning_rate, device=device, progress=False).curves
        self.losses_ = curves["loss"][-1].copy()
        kept = best_head(self.losses_)
        self.history_ = {name: curve[:, kept].copy() for name, curve in curves.items()}
        self.scale_ = scaler.scale_
        self.coef_ = heads.weight[kept].detach().numpy().astype(np.float64) * self.scale_
        self.intercept_ = heads.bias[kept].detach().numpy().astype(np.float64)
        self.labels_ = self._logits(X).argmax(1)
        # An epoch counts while the head still moves, and drops what fills no batch: the last
        # entries are those of the finished head on all samples.
        sizes = np.bincount(self.labels_, minlength=self.n_clusters)
        self.history_["n_nonempty"][-1] = (sizes > 0).sum()
        self.history_["largest_share"][-1] = sizes.max() / len(X)
        warn_of_collapse({name: curve[:, None] for name, curve in self.history_.items()},
                         [seeds[kept]], self.n_clusters, self.entropy_weight)
        return self

    def _checked_settings(self) -> str:
        """Raise ValueError for settings that cannot train; the device to train on."""
        if isinstance(self.n_clusters, str):
            raise ValueError(f"n_clusters is {self.n_clusters!r}, and no criterion that was tried "
                             f"tells the number well enough to be trusted unseen; look at "
                             f"suggest_n_clusters(X), and pass a whole number.")
        for name, least in (("n_clusters", 1), ("n_neighbors", 1), ("n_init", 1),
                            ("batch_size", 1), ("max_epochs", 0), ("min_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} is {value!r}; pass a whole number of at least {least}.")
        for name in ("entropy_weight", "learning_rate"):
            if not isinstance(value := getattr(self, name), Real):
                raise ValueError(f"{name} is {value!r}; pass a number.")
        check_training(self.entropy_weight, self.max_epochs, self.min_steps, self.batch_size,
                       self.learning_rate)
        return find_device(self.device)

    def _usable_neighbors(self, n_samples: int) -> int:
        if self.n_neighbors < n_samples:
            return self.n_neighbors
        warnings.warn(f"n_neighbors is {self.n_neighbors} and there are only {n_samples} samples; "
                      f"{n_samples - 1} neighbours are used.", stacklevel=3)
        return n_samples - 1

    def _logits(self, X) -> np.ndarray:
        return X @ self.coef_.T + self.intercept_  # [N, C]

    def transform(self, X):
        """The logits X @ coef_.T + intercept_, float64 [N, C]."""
        check_is_fitted(self)
        return self._logits(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))

    def predict(self, X):
        """The most probable cluster of each sample, int64 [N]."""
        return self.transform(X).argmax(1)

    def predict_proba(self, X):
        """Probabilities of the clusters, float64 [N, C]; rows sum to 1."""
        return softmax(self.transform(X), axis=1)

    @property
    def _n_features_out(self):
        return len(self.coef_)  # as fitted, whatever set_params said since
