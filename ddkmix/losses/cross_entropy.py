"""Cross-entropy with the next token: -log q(x), q = softmax(student_logits)."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy"]


def cross_entropy(student_logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log q_i(x_i) of each token, nats; `ddkmix.losses.CrossEntropy` is this in a config.

    >>> import torch
    >>> from ddkmix.losses.cross_entropy import cross_entropy
    >>> nats = cross_entropy(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([1]))
    >>> [round(value, 4) for value in nats.tolist()]  # ln 4
    [1.3863]

    Args:
        student_logits: of the tokens that predict.
        labels: the next tokens.
    """
    return F.cross_entropy(student_logits, labels, reduction="none")
