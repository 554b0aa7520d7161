"""Forward KL, the standard distillation term: KL(teacher || student) = sum_v p_v (log p_v - log q_v).

p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature). DDK's Eq. 3 prints the
arguments the other way round but calls the reverse direction a different method, so this is its term
(gamma = 0.2, temperature 1). With another temperature the gradient shrinks like 1 / temperature**2;
`scale_by_temperature` undoes that, as Hinton et al. (arXiv 1503.02531) do.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def forward_kl(
    student_logits: Float[Tensor, "n V"],
    teacher_logits: Float[Tensor, "n V"],
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Float[Tensor, " n"]:
    """Per token, nats (times temperature**2 if so scaled)."""
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    # xlogy-like: a class that the teacher excludes (log p = -inf) adds nothing
    terms = log_p.exp() * (log_p.clamp(min=-1e30) - log_q)
    factor = temperature**2 if scale_by_temperature else 1.0
    return terms.sum(dim=-1) * factor
