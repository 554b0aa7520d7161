"""Cross-entropy with the teacher's distribution: forward KL and the teacher's entropy."""

from dataclasses import dataclass
from typing import Any

from ddkmix.losses.forward_kl import ForwardKL

__all__ = ["NLL"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NLL(ForwardKL):
    """Negative log-likelihood under the teacher, the NLL of pre-training distillation (arXiv 2410.16215,
    Eq. 3).

        NLL[i] = temperature**2 * -sum_v p_i(v) log q_i(v) = ForwardKL[i] + temperature**2 * H(p_i)
        p = softmax(teacher_logits / temperature),  q = softmax(student_logits / temperature)

    Its gradient is that of forward KL; its value is not 0 for a perfect student but the teacher's entropy.
    The paper tempers and renormalises the teacher; whether the student is tempered it does not say
    (`temperature_on`).

    Any teacher of an undecided student costs ln 2.

    >>> import torch
    >>> from ddkmix.losses import NLL
    >>> teacher_logits = torch.tensor([[3.0, 1.0]]).log()
    >>> nats = NLL()(torch.zeros(1, 2), teacher_logits, torch.tensor([0]))
    >>> [round(value, 4) for value in nats.tolist()]
    [0.6931]
    """

    def _nats(self, log_q: Any, log_p: Any) -> Any:
        """What is averaged over p."""
        return -log_q
