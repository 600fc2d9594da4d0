"""Summary statistics of repeated draws, and how far a confidence can be trusted."""

import numpy as np
from jaxtyping import Bool, Float

from hypdefect.errors import DataError


def calibration_error(confidence: Float[np.ndarray, "Q"], correct: Bool[np.ndarray, "Q"], bins: int = 15) -> float:
    """Expected calibration error (Guo et al., ICML 2017, eq. 3): gap of accuracy and mean confidence, over bins of
    equal width (low, high] of the top probability, weighted by their share of the queries.

    Raises:
        DataError: no query, or a confidence outside [0, 1].
    """
    if not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError("calibration needs at least one confidence, each in [0, 1]")
    own = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(own, correct.astype(np.float64) - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))
