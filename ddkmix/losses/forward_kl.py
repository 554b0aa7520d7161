"""Forward KL, the standard distillation term: KL(teacher || student) = sum_v p_v (log p_v - log q_v).

p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature). DDK's Eq. 3 prints the
arguments the other way round but calls the reverse direction a different method, so this is its term
(gamma = 0.2, temperature 1). With another temperature the gradient shrinks like 1 / temperature**2;
`scale_by_temperature` undoes that, as Hinton et al. (arXiv 1503.02531) do.
"""

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["forward_kl"]

_NO_MASS = -1e30
"""A finite logarithm whose exponential is 0 in every float type."""


def forward_kl(
    student_logits: Float[Tensor, "n V"],
    teacher_logits: Float[Tensor, "n V"],
    *,
    temperature: float = 1.0,
    scale_by_temperature: bool = True,
) -> Float[Tensor, " n"]:
    """KL(teacher || student) of each token, nats; `ddkmix.losses.ForwardKL` is this in a config.

    >>> import torch
    >>> from ddkmix.losses.forward_kl import forward_kl
    >>> logits = torch.tensor([[3.0, 1.0]]).log()
    >>> forward_kl(logits, logits).tolist()
    [0.0]
    >>> [round(value, 4) for value in forward_kl(torch.zeros(1, 2), logits).tolist()]
    [0.1308]

    Args:
        student_logits: of the tokens that predict; the result is differentiable in them.
        teacher_logits: of the same tokens.
        temperature: divides the logits of both; > 0.
        scale_by_temperature: multiply the result by temperature**2.

    Returns:
        Nats per token, times temperature**2 if so scaled.
    """
    if temperature != 1.0:  # at 1 a division would only copy the two largest tensors of the step
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    excluded = log_p == -math.inf
    if excluded.any():  # a class that the teacher excludes adds nothing, but 0 x inf would be nan
        log_q, log_p = log_q.masked_fill(excluded, 0.0), log_p.masked_fill(excluded, _NO_MASS)
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return terms * temperature**2 if scale_by_temperature else terms
