"""Cross-entropy with the next token: -log q(x), q = softmax(student_logits)."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Per token, nats."""
    return F.cross_entropy(student_logits, labels, reduction="none")
