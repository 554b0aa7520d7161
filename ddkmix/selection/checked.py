"""Losses per row that a selection may go by."""

import numpy as np
from jaxtyping import Shaped

from ddkmix.errors import NumericsError


def finite(name: str, losses: Shaped[np.ndarray, " R"]) -> Shaped[np.ndarray, " R"]:
    """The losses as float64.

    Raises:
        NumericsError: one is not finite; a comparison with nan would drop the row without a word.
    """
    values = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        raise NumericsError(
            f"{name} is not finite at rows {bad[:8]} ({len(bad)} of {len(values)}); rows cannot be selected "
            "by it. A row without predicted tokens has no loss: leave it out; otherwise look at the model."
        )
    return values
