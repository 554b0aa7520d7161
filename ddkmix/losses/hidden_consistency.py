"""Consistency of the student's hidden states under mixing of rows: the regulariser of CR-ILD."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ddkmix.losses.hidden_match import distance_between

__all__ = ["HiddenConsistency"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenConsistency:
    """The states of a mixture of two rows lie between those of the rows (CR-ILD, arXiv 2302.01530).

        R[i] = lam d(f(m), f(x))[i] + (1 - lam) d(f(m), f(x'))[i],   m = lam x + (1 - lam) x'
        lam = max(u, 1 - u), u ~ Beta(1, 1), once for each row

    f the outputs of a layer of the student, x the embeddings of a row, x' those of another one of the
    micro-batch; the mean over `layers`. Gradients run through all three states. Beside `hidden_match` with

        {name: hidden_consistency, weight: {schedule: linear, start: 0, end: 0.1}}

    it has the authors' weight 0.1 x epoch / epochs, step by step. They train encoders, and
    mix for attention as well; this is for hidden states. Where x' has ended, lam is 1.
    A micro-batch of one row has no other to mix with, and the loss is 0. No nats. It costs a
    second forward and backward pass of the student, and needs no teacher.

    Partners and lam follow from `seed` and the tokens, so that a resumed run draws them again.

    As a function it is d of one layer: an error of 1 in one of two dimensions.

    >>> import torch
    >>> from ddkmix.losses import HiddenConsistency
    >>> mixed, plain = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])
    >>> HiddenConsistency()(mixed, plain, torch.tensor([0])).tolist()
    [0.5]
    """

    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (-1,)
    """Layers of the student, counted from 0 or from the end."""
    distance: Literal["mse", "cosine"] = "mse"
    """d, as in `HiddenMatch`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of partners and lam."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the teacher."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """The distance of each token's two states, of one layer.

        Args:
            student_logits: not logits: (n, D) states of the student for the mixture, differentiable.
            teacher: not the teacher: (n, D) states of the student for one of the two rows.
            labels: not looked at.

        Returns:
            (n,) mean squared difference, or 1 - cosine; no nats.
        """
        return distance_between(self.distance, student_logits, teacher)
