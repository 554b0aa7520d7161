"""Losses between models that do not share a vocabulary, span by span, a chunk of tokens at a time.

As `chunked`, but of spans: the logits of some spans exist at one time, for student and teacher, and their
gradient is folded into those of the hidden states and the output weights at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import CrossSignal, Head
from ddkmix.losses import LossTerm
from ddkmix.losses.gradients import Gradients, MadeInForward, without_gradients
from ddkmix.losses.logits import compute_type
from ddkmix.losses.reference import logits_of


@runtime_checkable
class AcrossVocabularies(Protocol):
    """What a loss of two vocabularies must offer beside `TokenLoss`."""

    merge: str
    """`none`, `observed` or `bayesian`; see `merged`."""
    temperature: float

    def across(self, q: Any, p: Any, pairs: Any) -> Any:
        """(g, V) and (g, W) probabilities and (m, 2) ids of the same tokens -> (g,) losses."""
        ...


def is_across(term: LossTerm) -> bool:
    """Whether a term compares different vocabularies."""
    return "cross" in getattr(term.loss, "accepts", ())


def aligned_objective(
    hidden: Float[Tensor, "n D"],
    head: Head,
    labels: Int[Tensor, " n"],
    token_weight: Float[Tensor, " n"],
    terms: Sequence[LossTerm],
    signal: CrossSignal,
    *,
    chunk_tokens: int = 256,
) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
    """The objective and the value of every term at every token; a span's value counts at its first token.

    objective = sum over spans of token_weight[first token] x sum_k weight_k loss_k. Differentiable in
    `hidden`, `head.weight` and `head.bias`; the values are detached.

    Args:
        hidden: student's last hidden states of the tokens that predict.
        head: student's output layer.
        labels: next tokens.
        token_weight: share of each token in the objective.
        terms: the weighted losses, all of them across vocabularies.
        signal: what the teacher says about the same text.
        chunk_tokens: tokens, of either model, whose logits exist at one time; a longer span has them to
            itself.
    """
    hidden, head = without_gradients(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        objective, values = _AlignedObjective.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, head, labels, token_weight, tuple(terms), signal, chunk_tokens
        )
    return objective, values


def merged(
    logits: Float[Tensor, "c V"],
    labels: Int[Tensor, " c"],
    start: Int[Tensor, " g"],
    stop: Int[Tensor, " g"],
    merge: str,
) -> Float[Tensor, "g V"]:
    """One distribution for each span of tokens, from the logits that predict them.

    `none`: that at the first token. `observed`: that, times the probabilities of the later tokens.
    `bayesian`: that at the last token, times the probabilities of the earlier ones.
    """
    base = stop - 1 if merge == "bayesian" else start
    if merge == "none":
        return logits[base].softmax(-1)
    log_probs = logits.log_softmax(-1)
    lengths = stop - start
    span_of = torch.arange(len(start), device=start.device).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    token = torch.arange(len(span_of), device=start.device) - first[span_of] + start[span_of]
    others = log_probs[token, labels[token]].masked_fill(token == base[span_of], 0.0)
    rest = others.new_zeros(len(start)).index_add(0, span_of, others)
    return (log_probs[base] + rest[:, None]).exp()


class _AlignedObjective(MadeInForward):
    """Gradients are made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        token_weight: Tensor,
        terms: tuple[LossTerm, ...],
        signal: CrossSignal,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        total = compute_type(hidden)
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], covered=False)
        values = hidden.new_zeros((len(terms), len(hidden)), dtype=total)
        objective = hidden.new_zeros((), dtype=total)
        own = weight.detach()[: head.vocab_size].to(hidden.dtype)
        own_bias = None if bias is None else bias.detach()[: head.vocab_size].to(hidden.dtype)
        for spans, part, theirs in _chunks(signal.spans, chunk_tokens):
            raw = torch.nn.functional.linear(hidden[part].detach(), own, own_bias).to(total)
            said = logits_of(signal.teacher.hidden[theirs], signal.teacher.head).detach()
            inside = spans - spans.new_tensor([part.start, part.start, theirs.start, theirs.start])
            firsts = spans[:, 0]
            with torch.set_grad_enabled(gradients.wanted):
                raw.requires_grad_(gradients.wanted)
                chunk = raw.new_zeros(())
                for k, term in enumerate(terms):
                    value = _span_losses(
                        term.loss,
                        head.finish(raw),
                        labels[part],
                        said,
                        signal.labels[theirs],
                        inside,
                        signal.pairs,
                    )
                    values[k, firsts] = value.detach()
                    chunk = chunk + term.weight * (value * token_weight[firsts]).sum()
            objective += chunk.detach()
            if gradients.wanted:
                gradients.add(part, torch.autograd.grad(chunk, raw)[0].to(hidden.dtype), own)
        gradients.keep(ctx, values)
        return objective, values


def _span_losses(
    loss: Any,
    logits: Tensor,
    labels: Tensor,
    said: Tensor,
    their_labels: Tensor,
    spans: Tensor,
    pairs: Tensor,
) -> Tensor:
    start, stop, their_start, their_stop = spans.unbind(1)
    q = merged(logits / loss.temperature, labels, start, stop, loss.merge)
    p = merged(said / loss.temperature, their_labels, their_start, their_stop, loss.merge)
    value: Tensor = loss.across(q, p, pairs)
    return value


def _chunks(spans: Int[Tensor, "g 4"], chunk_tokens: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Consecutive spans whose tokens, of either model, are at most `chunk_tokens`, with those tokens."""
    lines, begin = spans.tolist(), 0
    while begin < len(lines):
        first, end = lines[begin], begin + 1
        while end < len(lines) and max(lines[end][1] - first[0], lines[end][3] - first[2]) <= chunk_tokens:
            end += 1
        last = lines[end - 1]
        yield spans[begin:end], slice(first[0], last[1]), slice(first[2], last[3])
        begin = end
