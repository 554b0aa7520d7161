"""Sinkhorn distance between groups of tokens: optimal transport of the student's predictions to the
teacher's."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

__all__ = ["Sinkhorn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinkhorn:
    """Batch-wise Sinkhorn distance (SinKD, arXiv 2402.17110; constants of its code).

        D_ij = sum_v |q_i(v) - p_j(v)|,  K = exp(-D / epsilon)
        P = K, rows and then columns divided by their sums, `iterations` times;  SINK[i] = sum_j P_ij D_ij
        i, j tokens of one group of `group_tokens`; p teacher, q student, both at `temperature`

    The sum over a group is the authors' loss of a batch. They use it beside cross-entropy and KL, with a
    weight of 0.0008 on that sum in their language-model scripts; per token that is 0.0008 x their batch.
    The gradient runs through the plan P as in their code, and no factor temperature**2 is applied. It is not
    0 for a perfect student: the plan is blurred by epsilon. Not nats: at most 2 a token on average.

    Groups are consecutive tokens from the first of a call, so a call must be given whole groups but for the
    last: `token_multiple` says of what its length has to be a multiple, and the chunked kernel keeps to it.
    What falls into a group still depends on the micro-batch, as for every loss over a batch.

    Costs tokens x group_tokens x V: at 64 tokens a group twice as much as an output layer of 576 hidden units
    on one CPU core, forwards and backwards. With `top_k`, or a truncated signal, tokens x group_tokens x K (a
    third of that layer at 50): each D_ij is then taken over the classes of teacher token j and one for all
    others, which never exceeds the full distance.

    One token is a group without choice: its L1 distance, here 1/4 + 1/4.

    >>> import torch
    >>> from ddkmix.losses import Sinkhorn
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> values = Sinkhorn(temperature=1.0)(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in values.tolist()]
    [0.5]
    """

    temperature: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Divides the logits of both sides."""
    epsilon: Annotated[float, Field(ge=1e-3, le=100)] = 0.1
    """Weight of the plan's entropy; the factor by which distances are divided."""
    iterations: Annotated[int, Field(ge=1, le=1000)] = 20
    """Steps of row and column normalisation."""
    group_tokens: Annotated[int, Field(ge=1, le=256)] = 64
    """Tokens between which mass is moved."""
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Classes of each teacher token that the distance is taken over. None is the published form: all."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "bucket"})
    """A distance is not linear in p, so random draws would not estimate it without bias."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the teacher's probabilities are wanted."""
        return (self.temperature,)

    @property
    def token_multiple(self) -> int:
        """Tokens of which the length of a call has to be a multiple, unless it is the last of a batch."""
        return self.group_tokens

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """What it costs to move each token's prediction.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits, or a TruncatedSignal of the n tokens with the tail `bucket`.
            labels: not looked at.

        Returns:
            (n,) float32; a group's mean is in [0, 2].
        """
        import torch

        from ddkmix.losses.transport import distances, plan, teacher_side

        q = (student_logits / self.temperature).softmax(-1)
        said = teacher_side(teacher, self.temperature, self.top_k)
        values = []
        for start in range(0, len(q), self.group_tokens):
            part = slice(start, start + self.group_tokens)
            cost = distances(q[part], said.at(part))
            values.append((plan(cost, self.epsilon, self.iterations) * cost).sum(-1))
        return torch.cat(values) if values else q.sum(-1)
