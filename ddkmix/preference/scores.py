"""Log-probabilities of responses: of each token, without a tokens x vocabulary tensor, and of each row.

A pair objective knows the weight of a token only when it knows both responses whole, so gradients cannot be
made in the forward pass as those of `ddkmix.losses` are. The forward pass keeps nothing but its inputs; the
backward pass makes the logits of each chunk again and takes the same closed form of cross-entropy, weighted
with what came from above: four products with the output weights in the place of three.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import Head
from ddkmix.errors import DataError
from ddkmix.losses import CrossEntropy, LossTerm
from ddkmix.losses.objective import distillation_objective, tokens_within

__all__ = ["ResponseScores", "mean_per_row", "response_log_probs", "response_scores", "sum_per_row"]

_NATS = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResponseScores:
    """What student and teacher think of B responses, each of at least one token."""

    student: Float[Tensor, " B"]
    """log q(y|x): sum over the response's tokens, nats; differentiable."""
    teacher: Float[Tensor, " B"]
    """log p(y|x): sum over the response's tokens, nats; without a gradient."""
    tokens: Int[Tensor, " B"]
    """Tokens of each response, with its end-of-turn token."""
    quality: Float[Tensor, " B"] | None = None
    """How good each response is, as a score; only `PladMargin` asks."""


def response_scores(
    student: Float[Tensor, " n"],
    teacher: Float[Tensor, " n"],
    rows: Int[Tensor, " n"],
    num_rows: int,
) -> ResponseScores:
    """Scores of whole responses from those of their tokens.

    Args:
        student: log q of each response token, nats, as `response_log_probs` gives it.
        teacher: log p of the same tokens, nats.
        rows: which of the batch's rows each token belongs to.
        num_rows: rows in the batch.

    Raises:
        DataError: a row has no response token.
    """
    tokens = _tokens_of(rows, num_rows)
    teacher = sum_per_row(teacher.detach(), rows, num_rows)
    return ResponseScores(student=sum_per_row(student, rows, num_rows), teacher=teacher, tokens=tokens)


def response_log_probs(
    hidden: Float[Tensor, "n D"],
    head: Head,
    labels: Int[Tensor, " n"],
    *,
    chunk_tokens: int | None = None,
    memory_mb: float = 512.0,
) -> Float[Tensor, " n"]:
    """log q(label) of each token; differentiable once in `hidden`, `head.weight` and `head.bias`.

    Softmax in float32 at least, and a chunk of logits at a time in both passes. Under `torch.no_grad` it
    costs one product with the output weights.

    Args:
        hidden: last hidden states of the tokens that predict the response.
        head: output layer, whole, as in `distillation_objective`.
        labels: the response's tokens.
        chunk_tokens: tokens whose logits exist at one time; None: as many as `memory_mb` holds.
        memory_mb: megabytes for logits where `chunk_tokens` is None.

    Returns:
        Nats, negative; float32 unless `hidden` is float64.
    """
    size = chunk_tokens or tokens_within(memory_mb, hidden, head)
    found: Tensor = _LogProbs.apply(hidden, head.weight, head.bias, head, labels, size)  # type: ignore[no-untyped-call]
    return found


def sum_per_row(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], num_rows: int) -> Float[Tensor, " B"]:
    """Sums over the tokens of each row; 0 for a row without one.

    Args:
        values: of each token.
        rows: which of the batch's rows each token belongs to.
        num_rows: rows in the batch.
    """
    return values.new_zeros(num_rows).index_add(0, rows, values)


def mean_per_row(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], num_rows: int) -> Float[Tensor, " B"]:
    """Means over the tokens of each row.

    Args:
        values: of each token.
        rows: which of the batch's rows each token belongs to.
        num_rows: rows in the batch.

    Raises:
        DataError: a row has no token.
    """
    tokens = _tokens_of(rows, num_rows)
    return sum_per_row(values, rows, num_rows) / tokens


def _tokens_of(rows: Tensor, num_rows: int) -> Tensor:
    tokens = torch.bincount(rows, minlength=num_rows)
    if not bool(tokens.all()):
        empty = (tokens == 0).nonzero()[:, 0].tolist()
        raise DataError(
            f"rows {empty[:8]} of a batch of {num_rows} have no response token; a response needs one at "
            "least, its end-of-turn token. Leave these rows out, or mend the response store they came from."
        )
    return tokens


class _LogProbs(torch.autograd.Function):
    """Inputs are kept, logits are not."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        """(n,) log-probabilities of the labels."""
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        nothing = torch.zeros(len(hidden), device=hidden.device)
        _, values = distillation_objective(
            hidden, replace(head, weight=weight, bias=bias), labels, nothing, _NATS, chunk_tokens=chunk_tokens
        )
        return -values[0]

    @staticmethod
    def backward(ctx: Any, by_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        """Those of cross-entropy, each token with the weight of minus its derivative."""
        hidden, weight, bias, labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        inputs = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
            if tensor is not None
        ]
        head = replace(ctx.head, weight=inputs[1], bias=None if bias is None else inputs[2])
        with torch.enable_grad():
            objective, _ = distillation_objective(
                inputs[0], head, labels, -by_log_probs, _NATS, chunk_tokens=ctx.chunk_tokens
            )
        found = iter(torch.autograd.grad(objective, [leaf for leaf in inputs if leaf.requires_grad]))
        return (*(next(found) if want else None for want in wanted), None, None, None)
