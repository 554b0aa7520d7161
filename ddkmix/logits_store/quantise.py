"""Numbers in one or two bytes, each with the error that it can make.

Log-probabilities lie on a grid that is fine where probability is: code c stands for -20 (c / 255)**2 nats.
Against a uniform grid over the same range its KL error is about half, and a fortieth where the mass outside
is not known (SmolLM2, top-0.95-50: 8e-5 against 1.4e-4 nats, and 2.3e-4 against 1.3e-2). Normalisers and
entropies have bounds that follow from the number of classes, so they are fixed-point numbers between these.
No bfloat16: three of its bits would be spent on a range of 10**38.
"""

import math

import numpy as np
from jaxtyping import Float, UInt

LOWEST = -20.0
"""Nats. Smaller log-probabilities are stored as this one: their classes weigh 2e-9 and less."""
_WIDEST = 16.0
_CODES = 255
_STEPS = 65_535


def encode_log_probs(values: Float[np.ndarray, " E"], num_bytes: int) -> UInt[np.ndarray, " bytes"]:
    """Log-probabilities (nats, finite) as bytes: one each, on the grid, or two, in half precision."""
    if num_bytes == 2:
        return values.astype("<f2").view(np.uint8)
    roots = np.sqrt(np.clip(values, LOWEST, 0.0) / LOWEST)
    return np.rint(roots * _CODES).astype(np.uint8)


def decode_log_probs(data: UInt[np.ndarray, " bytes"], num_bytes: int) -> Float[np.ndarray, " E"]:
    """What `encode_log_probs` stored, float32 nats."""
    if num_bytes == 2:
        return data.view("<f2").astype(np.float32)
    return _GRID[data]


_GRID = (LOWEST * (np.arange(_CODES + 1, dtype=np.float64) / _CODES) ** 2).astype(np.float32)


def log_prob_error(log_prob: float, num_bytes: int) -> float:
    """The most by which a stored log-probability can differ from the true one, nats.

    One byte: half of the larger of the steps beside it, sqrt(20 |log p|) / 255 + 20 / (2 255**2); at
    log p = -1 that is 0.018. Two bytes: 2**-11 |log p|.
    """
    size = abs(log_prob)
    if num_bytes == 2:
        return 2.0**-11 * size + 2.0**-24
    return math.sqrt(-LOWEST * size) / _CODES - LOWEST / (2 * _CODES**2) + max(0.0, size + LOWEST)


def log_z_range(temperature: float, num_classes: int) -> float:
    """The end of the range of log sum_v p(v) ** (1 / temperature) that is not 0, nats.

    One class with all mass gives 0, equal classes give (1 - 1 / temperature) log V; by Jensen's inequality
    all else lies between. An error of a stored value is at most this range / 131,070: 4.1e-5 nats at
    temperature 2 and 49,152 classes.
    """
    return (1.0 - 1.0 / temperature) * math.log(num_classes)


def encode_between(values: Float[np.ndarray, " n"], end: float) -> UInt[np.ndarray, " bytes"]:
    """Values between 0 and `end` in two bytes each, with an error of at most |end| / 131,070."""
    scale = _STEPS / end if end else 0.0
    codes = np.clip(np.rint(values.astype(np.float64) * scale), 0, _STEPS)
    return codes.astype("<u2").view(np.uint8)


def decode_between(data: UInt[np.ndarray, " bytes"], end: float) -> Float[np.ndarray, " n"]:
    """What `encode_between` stored, float32."""
    return (data.view("<u2") * (end / _STEPS)).astype(np.float32)


def encode_mass(values: Float[np.ndarray, " n"]) -> UInt[np.ndarray, " bytes"]:
    """Masses between 0 and 1 in two bytes each.

    They lie on a grid of log(r / (1 - r)), so that both r and 1 - r have a relative error of at most 2.5e-4
    down to 1.2e-7; what is smaller is stored as 0.
    """
    inside = values.astype(np.float64).clip(1e-12, 1 - 1e-12)
    logits = np.log(inside) - np.log1p(-inside)
    codes = 1 + np.rint((logits / (2 * _WIDEST) + 0.5) * (_STEPS - 2))
    return np.where(codes < 1, 0, codes.clip(0, _STEPS)).astype("<u2").view(np.uint8)


def decode_mass(data: UInt[np.ndarray, " bytes"]) -> Float[np.ndarray, " n"]:
    """What `encode_mass` stored, float64; exactly 0 and 1 at the ends of the grid."""
    codes = data.view("<u2").astype(np.float64)
    logits = ((codes - 1) / (_STEPS - 2) - 0.5) * (2 * _WIDEST)
    return np.where(codes == 0, 0.0, np.where(codes == _STEPS, 1.0, 1.0 / (1.0 + np.exp(-logits))))
