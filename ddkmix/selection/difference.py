"""MiniPLM's difference sampling: keep what a large model knows and a small one does not."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from ddkmix.config import Teacher
from ddkmix.selection.checked import finite

__all__ = ["DifferenceSelection"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DifferenceSelection:
    """The rows with the largest reference_loss - teacher_loss (MiniPLM, arXiv 2410.17215; its code).

        keep the top `share` of r(x) = log p(x) - log p_ref(x), per token

    p teacher, p_ref a small model of general text (there 104M parameters; the untrained student serves). Easy
    rows, noise and rows that are as hard for the teacher have small differences. The paper ranks its whole
    corpus and keeps half; this ranks the rows of a domain among themselves, so that selection says which
    rows and mixture weights alone say how many.

    >>> import numpy as np
    >>> from ddkmix.selection.difference import DifferenceSelection
    >>> DifferenceSelection().keep(np.array([3.0, 2.0, 9.0, 2.5]), np.array([2.0, 1.9, 8.8, 1.0])).tolist()
    [True, False, False, True]
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the domain's rows that are kept, to the nearest row, at least one."""
    reference: Teacher | None = None
    """The small model, with the tokenizer of the rows; None is the student before its first step."""

    def keep(
        self, reference_loss: Float[np.ndarray, " R"], teacher_loss: Float[np.ndarray, " R"]
    ) -> Bool[np.ndarray, " R"]:
        """Which rows of a domain are kept. Of equal differences the earlier rows are.

        Args:
            reference_loss: of the small model, mean over the row's tokens, nats per token.
            teacher_loss: of the teacher on the same rows, nats per token.

        Raises:
            NumericsError: a loss is not finite.
        """
        difference = finite("reference_loss", reference_loss) - finite("teacher_loss", teacher_loss)
        count = min(len(difference), max(1, int(np.floor(self.share * len(difference) + 0.5))))
        kept = np.zeros(len(difference), dtype=np.bool_)
        kept[np.argsort(-difference, kind="stable")[:count]] = True
        return kept
