"""Cross-entropy with the next token: the language-modelling loss."""

from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["CrossEntropy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """The language-modelling loss, the first term of DDK's objective (arXiv 2407.16154, Eq. 3).

        CE[i] = -log q_i(x_i),  q_i = softmax(student_logits[i]),  x_i = labels[i]

    A student that thinks four tokens equally likely is ln 4 nats away from any of them:

    >>> import torch
    >>> from ddkmix.losses import CrossEntropy
    >>> nats = CrossEntropy()(torch.zeros(2, 4), None, torch.tensor([3, 0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [1.3863, 1.3863]
    """

    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """-log q_i(x_i) of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: not looked at.
            labels: (n,) int64, the next tokens.

        Returns:
            (n,) float32, nats per token.
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(student_logits, labels, reduction="none")

    def value_and_slope(self, student: Any, teacher: Any, labels: Any) -> tuple[Any, Any]:
        """-log q of the labels, whose derivative by log q is -1 at the label; see `TokenLoss`.

        Args:
            student: `LogProbs` of its logits, without a gradient.
            teacher: not looked at.
            labels: (n,) int64, the next tokens.

        Returns:
            (n,) values, and a `Slope`.
        """
        from ddkmix.losses.closed_form import Slope

        ids = labels[:, None]
        chosen = student.of(ids, 1.0)
        return -chosen[:, 0], Slope(ids=ids, entries=-chosen.new_ones(chosen.shape))
