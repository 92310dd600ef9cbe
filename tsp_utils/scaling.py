"""Features normalised by one scalar, as K-means, neighbours and heads receive them."""

import math

import numpy as np

SCALINGS = ("mean-norm", "raw", "l2")


class Scaler:
    """Features as K-means, neighbours and heads receive them; learned from the fitted ones.

    "mean-norm" multiplies all by ONE scalar, `scale_`, so that the mean norm of the fitted features
    is sqrt(D): the geometry is the backbone's, and a learning rate means the same for every
    backbone. "raw" leaves them, "l2" makes each vector sqrt(D) long (`scale_` is 1 for both).
    """

    def __init__(self, scaling: str = "mean-norm"):
        if scaling not in SCALINGS:
            raise ValueError(f"The scaling {scaling!r} is not known; pass {', '.join(SCALINGS)}.")
        self.scaling = scaling

    def fit(self, features: np.ndarray) -> "Scaler":
        """Learn `scale_`. Raises ValueError for no features [N, D], all-zero or non-finite ones."""
        features = np.asarray(features)
        if features.ndim != 2 or not len(features):
            raise ValueError(f"Features are a table [N, D] of at least one row, and these have the "
                             f"shape {features.shape}.")
        check_finite(features)
        norms = _norms(features)
        if norms.max() == 0:
            raise ValueError("All features are 0, so there is nothing to cluster; check the "
                             "images.")
        self.scale_ = (math.sqrt(features.shape[1]) / float(norms.mean())
                       if self.scaling == "mean-norm" else 1.0)
        return self

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] scaled, a float32 array of its own [N, D]."""
        features = np.asarray(features)
        check_finite(features)
        if self.scaling == "l2":
            factor = math.sqrt(features.shape[1]) / np.maximum(_norms(features), 1e-300)[:, None]
        else:
            factor = self.scale_
        # In float64 only where float32 cannot hold the features or the factor: it doubles the time.
        fits = features.dtype == np.float32 and np.all((factor > 1e-30) & (factor < 1e30))
        wide = features if fits else features.astype(np.float64)
        return np.asarray(wide * np.asarray(factor, wide.dtype), np.float32)


def _norms(features: np.ndarray) -> np.ndarray:
    """Lengths of the rows, float64 [N]."""
    largest = max(float(features.max()), -float(features.min()))
    if not 1e-100 < largest < 1e100 and largest:  # whose square float64 cannot hold
        return largest * _norms(features / largest)
    return np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))


def scale_features(features: np.ndarray, scaling: str = "mean-norm") -> np.ndarray:
    """`Scaler`, fitted on the features [N, D] that it transforms; float32 [N, D]."""
    return Scaler(scaling).fit(features).transform(features)


def check_finite(features: np.ndarray) -> None:
    """Raise ValueError naming the first row with a NaN or an infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(features.sum(1, dtype=np.float64))  # one pass, no [N, D] mask
    for row in np.flatnonzero(~finite):  # a sum of finite numbers may overflow, too
        finite[row] = np.isfinite(features[row]).all()
    if not finite.all():
        raise ValueError(f"{(~finite).sum()} of {len(features)} feature vectors hold NaN or "
                         f"infinite values, the first in row {int((~finite).argmax())}; remove "
                         f"these rows or extract them again in float32.")
