"""Universal logit distillation: sorted probabilities are compared, whatever the classes are."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

__all__ = ["ULD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ULD:
    """Sorted L1 distance, the Wasserstein distance with equal costs (Boizard et al. 2024, arXiv 2402.12030).

        ULD[i] = sum_c | q_i sorted(c) - p_i sorted(c) |
        p = softmax(teacher_logits / temperature),  q = softmax(student_logits / temperature)

    Both sorted from the largest on, the shorter one padded with zeros. Not nats: between 0 and 2. The paper
    weighs it 1.5 beside cross-entropy.

    The paper compares the i-th token of both models, which drift apart over a text. With another tokenizer
    the two distributions here are those at the beginning of an aligned span, where both models have read the
    same bytes; its value counts at the span's first token and is 0 at the others.

    A student of two classes and a teacher of three:

    >>> import torch
    >>> from ddkmix.losses import ULD
    >>> student, teacher = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.25, 0.25]])
    >>> round(ULD()(student.log(), teacher.log(), torch.tensor([0])).item(), 4)
    0.5
    """

    temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Divides both logits."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "cross"})
    """Logits of all classes: of the same vocabulary, or of another."""
    merge: ClassVar[str] = "none"
    """Of a span of several tokens only the first distribution counts."""

    def across(self, q: Any, p: Any, pairs: Any) -> Any:
        """The distance of two distributions over different classes.

        Args:
            q: (g, V) probabilities of the student, differentiable.
            p: (g, W) probabilities of the teacher.
            pairs: not looked at.

        Returns:
            (g,) between 0 and 2, no nats.
        """
        from torch.nn.functional import pad

        size = max(q.shape[1], p.shape[1])
        q, p = (pad(x.sort(dim=-1, descending=True).values, (0, size - x.shape[1])) for x in (q, p))
        return (q - p).abs().sum(-1)

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The distance of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, W) float32 logits of the same positions.
            labels: not looked at.

        Returns:
            (n,) float32, between 0 and 2, no nats.
        """
        q, p = ((logits / self.temperature).softmax(-1) for logits in (student_logits, teacher))
        return self.across(q, p, None)
