"""Preference of the teacher's first choice over the student's, token by token: what DPKD's code computes."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

__all__ = ["DpkdToken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DpkdToken:
    """Direct preference distillation as the authors' code has it (LMOps/dpkd, `get_distil_loss`).

        DPKD[i] = -log sigmoid(beta u_i)
        u = (log q(v) - log q(w)) - (log p(v) - log p(w)),  v = argmax p,  w = argmax q

    The paper (arXiv 2406.19774, Eq. 9) compares whole responses, the pair objective `dpkd`; its code makes
    none, and compares, at every token of the data, the likeliest classes of both sides. Where they agree u
    is 0: the value is log 2, and the gradient exactly 0, so a student whose first choices are the teacher's
    learns nothing more. Elsewhere u < 0, and v is pulled up and w down by between beta / 2 and beta; it is a
    distance, the same with the sides exchanged. The code has beta = 0.1, averages over the tokens of the
    response, takes its softmax in bfloat16 (ours is float32), and adds cross-entropy:
    {name: dpkd_token, weight: 0.5} beside {name: cross_entropy, weight: 0.5}.

    Each is sure of another class by 1 nat: u = -1 - 1, so it is log(1 + e^0.2).

    >>> import torch
    >>> from ddkmix.losses import DpkdToken
    >>> student_logits, teacher_logits = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> nats = DpkdToken()(student_logits, teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.7981]
    """

    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Factor on u, and the largest derivative by a logit."""
    needs_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    """A truncated signal does not know the teacher's probability of the student's first choice."""

    def __call__(self, student_logits: Any, teacher: Any, labels: Any) -> Any:
        """-log sigmoid(beta u) of each token.

        Args:
            student_logits: (n, V) float32.
            teacher: (n, V) float32 logits.
            labels: not looked at.

        Returns:
            (n,) float32, nats per token; log 2 where the first choices agree.
        """
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self.beta * _lead(student_logits, teacher)[0])

    def value_and_slope(self, student: Any, teacher: Any, labels: Any) -> tuple[Any, Any]:
        """The same values; the derivative by log q is -+ beta sigmoid(-beta u) at v and w; see `TokenLoss`.

        Args:
            student: `LogProbs` of its logits, without a gradient.
            teacher: `LogProbs` of its logits.
            labels: not looked at.

        Returns:
            (n,) values, and a `Slope`.
        """
        import torch
        from torch.nn.functional import logsigmoid

        from ddkmix.losses.closed_form import Slope

        lead, ids = _lead(student.logits, teacher.logits)
        pull = (self.beta * torch.sigmoid(-self.beta * lead))[:, None]
        # exactly 0 where both choose one class, and not what rounding leaves of a sum
        pull = pull.masked_fill(ids[:, :1] == ids[:, 1:], 0.0)
        return -logsigmoid(self.beta * lead), Slope(ids=ids, entries=torch.cat([-pull, pull], dim=1))


def _lead(student_logits: Any, teacher_logits: Any) -> tuple[Any, Any]:
    """(n,) u, and (n, 2) the first choices of teacher and student; normalisers cancel in differences."""
    import torch

    first = [logits.detach().argmax(-1, keepdim=True) for logits in (teacher_logits, student_logits)]
    ids = torch.cat(first, dim=1)
    student, teacher = student_logits.gather(1, ids), teacher_logits.gather(1, ids)
    return (student[:, 0] - student[:, 1]) - (teacher[:, 0] - teacher[:, 1]), ids
