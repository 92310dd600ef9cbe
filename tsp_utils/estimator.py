"""TSP as a scikit-learn clusterer: heads that vote by their loss, fitted on features."""

import bisect
import warnings
from numbers import Integral, Real

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from sklearn import base
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data

from tsp_utils.approximate import find_neighbors
from tsp_utils.devices import find_device
from tsp_utils.heads import (
    LinearHeads,
    best_head,
    check_training,
    init_heads,
    train_heads,
    warn_of_collapse,
)
from tsp_utils.scaling import Scaler

# Nats of loss by which a head's vote falls to 1 / e of the best one's: chosen on five feature sets
# for fits that agree, with their ACC in sight, and checked on others (experiments/stability.py).
TEMPERATURE = 0.02
LEAST_VOTE = 0.01  # of all; heads with less are left out
MATCHED_ON = 20_000  # samples
RATES = (1e-4, 3e-4, 1e-3)  # of Adam: the paper's, and those for a loss that does not rest at it
LATE = (1 / 20, 1 / 8)  # of its fall come in the second half, at most, for the first two


class TSPClustering(base.ClassNamePrefixFeaturesOutMixin, base.TransformerMixin, base.ClusterMixin,
                    base.BaseEstimator):
    """The clustering head of TSP on features [N, D] from a frozen backbone (Secs 3.2, 4.2).

    `n_init` heads start from their own K-means (or at random) and train at once on Eq. 5. keep
    "all": they vote by their probabilities, matched to the head with the lowest training loss, each
    with the weight exp(-(its loss - the lowest) / 0.02), so that two fits agree better. keep
    "best": that head alone, as in the paper. No label is read. neighbor_search and metric are
    those of `find_neighbors`, others those of `train_heads`; n_neighbors is lowered, with a
    warning, for too few samples, and a batch is an eighth of them, from 32 to batch_size.
    learning_rate "auto": the paper's 1e-4 where at most a twentieth of the fall of the first head's
    loss comes in the second half of the training, 3e-4 for an eighth, else 1e-3 (docs/budget.md).

    Attributes: labels_ int64 [N], the clusters of the fitted samples; stability_ [N], the share of
    the votes that each sample's heads give to its cluster as their most probable one; votes_ [S] of
    the S heads kept, the best one first; coef_ [S, C, D] and intercept_ [S, C], which work on X as
    passed; scale_, the scalar that brought the mean length of the features to sqrt(D), folded into
    coef_; history_, the best head's curves by name, each [epochs] (its last n_nonempty and
    largest_share: of labels_); losses_ [n_init], the final ones; learning_rate_;
    n_features_in_, feature_names_in_.
    `fit` raises ValueError for settings that cannot train, fewer than 4 samples, fewer distinct
    ones than clusters, all-zero X, X of which a row or a column outweighs the rest (named), and
    where the loss of every head is NaN.
    """

    def __init__(self, n_clusters=8, *, n_neighbors=20, n_init=10, init="k-means",
                 entropy_weight=3.0, max_epochs=100, min_steps=2000, batch_size=256,
                 learning_rate="auto", metric="cosine", neighbor_search="auto", keep="all",
                 device="auto", random_state=None):
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
        self.neighbor_search = neighbor_search
        self.keep = keep
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
        check_weights(X)
        features = scaler.transform(X)
        neighbors = find_neighbors(features, self._usable_neighbors(len(X)), self.metric,
                                   device, self.neighbor_search)
        seeds = check_random_state(self.random_state).randint(2**31 - 1, size=self.n_init).tolist()
        heads = init_heads(features, self.n_clusters, seeds, self.init)

        def train(heads, rate):
            with warnings.catch_warnings():  # of heads that are not kept nobody needs to hear
                warnings.filterwarnings("ignore", "Collapse", UserWarning)
                return train_heads(
                    heads, features, neighbors, entropy_weight=self.entropy_weight,
                    max_epochs=self.max_epochs, min_steps=self.min_steps,
                    batch_size=min(self.batch_size, max(32, len(X) // 8)),
                    learning_rate=rate, device=device, progress=False).curves

        rate = self.learning_rate
        if isinstance(rate, str):  # auto: the first head tells, alone
            first = LinearHeads(heads.weight[:1], seeds[:1])
            rate = rate_for(last_fall(train(first, RATES[0])["loss"]))
        curves, self.learning_rate_ = train(heads, rate), rate
        self.losses_ = curves["loss"][-1].copy()
        best = best_head(self.losses_)
        self.history_ = {name: curve[:, best].copy() for name, curve in curves.items()}
        self.scale_ = scaler.scale_
        self._keep_heads(heads, best, features)
        self.labels_, self.stability_ = self._combined(X)[1:]
        # An epoch counts while the head still moves, and drops what fills no batch.
        sizes = np.bincount(self.labels_, minlength=self.n_clusters)
        self.history_["n_nonempty"][-1] = (sizes > 0).sum()
        self.history_["largest_share"][-1] = sizes.max() / len(X)
        warn_of_collapse({name: curve[:, None] for name, curve in self.history_.items()},
                         [seeds[best]], self.n_clusters, self.entropy_weight)
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
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; pass a whole number of at least {least}.")
        if self.keep not in ("all", "best"):
            raise ValueError(f"keep is {self.keep!r}; pass all or best.")
        auto = isinstance(self.learning_rate, str) and self.learning_rate == "auto"
        rate = RATES[0] if auto else self.learning_rate
        for name, value in (("entropy_weight", self.entropy_weight), ("learning_rate", rate)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; pass a number"
                                 f"{', or auto' * (name == 'learning_rate')}.")
        if 1e6 < self.entropy_weight < np.inf:
            raise ValueError(f"entropy_weight is {self.entropy_weight}; pass 0 or more, about 3.")
        check_training(self.entropy_weight, self.max_epochs, self.min_steps, self.batch_size, rate)
        return find_device(self.device)

    def _usable_neighbors(self, n_samples: int) -> int:
        if self.n_neighbors < n_samples:
            return self.n_neighbors
        warnings.warn(f"n_neighbors is {self.n_neighbors} and there are only {n_samples} samples; "
                      f"{n_samples - 1} neighbours are used.", stacklevel=3)
        return n_samples - 1

    def _keep_heads(self, heads, best: int, features: np.ndarray) -> None:
        """The heads that vote, their clusters renumbered as the best one's, by shared samples."""
        gaps = np.where(np.isfinite(self.losses_), self.losses_ - self.losses_[best], np.inf)
        votes = np.exp(-gaps / TEMPERATURE) if self.keep == "all" else np.eye(len(gaps))[best]
        kept = np.argsort(gaps, kind="stable")[:np.sum(votes >= LEAST_VOTE * votes.sum())]
        self.votes_ = votes[kept] / votes[kept].sum()
        some = np.linspace(0, len(features) - 1, min(len(features), MATCHED_ON)).astype(int)
        proba = heads.predict_proba(features[some])  # [n_init, n, C]
        matched = [linear_sum_assignment(proba[kept[0]].T @ proba[s], maximize=True)[1]
                   for s in kept]
        self.coef_ = self.scale_ * np.stack([heads.weight[s].detach().numpy()[order] for s, order
                                             in zip(kept, matched, strict=True)]).astype(float)
        self.intercept_ = np.stack([heads.bias[s].detach().numpy()[order] for s, order
                                    in zip(kept, matched, strict=True)]).astype(float)

    def _combined(self, X) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean probabilities [N, C], the most probable cluster [N], the votes that it has [N]."""
        proba = np.empty((len(X), self._n_features_out))
        clusters, agreeing = np.empty(len(X), np.int64), np.empty(len(X))
        for rows in gen_batches(len(X), 8192):
            each = softmax(np.einsum("nd,scd->nsc", X[rows], self.coef_, optimize=True)
                           + self.intercept_, axis=2)  # [n, S, C]
            proba[rows] = np.einsum("s,nsc->nc", self.votes_, each)
            clusters[rows] = proba[rows].argmax(1)
            agreeing[rows] = (each.argmax(2) == clusters[rows, None]) @ self.votes_
        return proba, clusters, agreeing

    def _checked(self, X):
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)

    def transform(self, X):
        """The logarithms of `predict_proba`, float64 [N, C]."""
        return np.log(np.maximum(self.predict_proba(X), np.finfo(float).tiny))

    def predict(self, X):
        """The most probable cluster of each sample, int64 [N]."""
        return self._combined(self._checked(X))[1]

    def predict_proba(self, X):
        """Probabilities of the clusters, the votes' mean, float64 [N, C]; rows sum to 1."""
        return self._combined(self._checked(X))[0]

    @property
    def _n_features_out(self):
        return self.coef_.shape[1]  # as fitted, whatever set_params said since


def rate_for(late: float) -> float:
    """The learning rate for a loss of which this share of its fall comes late (NaN: the first)."""
    return RATES[bisect.bisect_left(LATE, late)]


def last_fall(losses: np.ndarray) -> float:
    """The share of its fall that comes in the second half, of losses [E, S], a mean over heads."""
    means, tenth = losses.mean(1), max(1, len(losses) // 10)
    half = means[max(tenth, len(losses) // 2) - tenth :][:tenth].mean()
    end = means[-tenth:].mean()
    return float((half - end) / max(means[0] - end, 1e-6))  # one cluster: no fall, but noise


def check_weights(X: np.ndarray) -> None:
    """Raise ValueError naming the row or the column that outweighs the rest of X [N, D].

    A row: over a thousand times as long as the median, and nine tenths of all lengths together. A
    column: what all rows share is over 200 times what tells them apart (of our backbones' vectors
    seven times at most); from 50 times on a warning, and where one column holds all that spread.
    """
    largest = max(np.float64(X.max()), -np.float64(X.min()))  # so that squares do not overflow
    first, lengths = X[0] / largest, np.empty(len(X))
    total, squares = np.zeros((2, X.shape[1]))
    for at in range(0, len(X), 4096):  # no copy of all of X
        part = X[at : at + 4096] / largest
        lengths[at : at + 4096] = np.linalg.norm(part, axis=1)
        part -= first  # what is alike cancels before it is squared
        total += part.sum(0)
        squares += (part**2).sum(0)
    usual = np.median(lengths[lengths > 0])
    heavy = lengths > 1000 * usual
    if lengths[heavy].sum() > 0.9 * lengths.sum():
        raise ValueError(f"Row {lengths.argmax()} of the features outweighs the rest: it is "
                         f"{lengths.max() / usual:.0e} times as long as the median. Correct or "
                         f"remove it, or bring all to unit length (sklearn's Normalizer).")
    mean = np.abs(first + total / len(X))
    variance = np.maximum(squares / len(X) - (total / len(X)) ** 2, 0)
    spread, share = np.sqrt(variance.sum()), variance.max() / max(variance.sum(), 1e-300)
    common = np.linalg.norm(mean) / spread if spread else 0.0  # all alike: said elsewhere
    said = (f"Column {mean.argmax()} of the features outweighs the rest: its mean is "
            f"{mean.max() / max(spread, 1e-300):.0e} times what tells the rows apart. Subtract "
            f"each column's mean first (sklearn's StandardScaler).")
    if common > 200:
        raise ValueError(said)
    if common > 50:
        warnings.warn(said, stacklevel=3)
    elif share > 0.999 and len(mean) > 1:
        warnings.warn(f"Column {variance.argmax()} of the features outweighs the rest: it holds "
                      f"{100 * share:.1f} % of their variance. Divide the columns by their spread "
                      f"if that is not meant.", stacklevel=3)
