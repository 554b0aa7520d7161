"""The logits of a chunk of tokens, of the student and of whatever teacher there is.

A chunk is made by one matrix product into a buffer that all chunks share, in the compute type of its hidden
states. The losses then look at it a block of rows at a time, in float32, small enough to stay in a cache.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, Signal, TruncatedSignal
from ddkmix.losses.closed_form import LogProbs

Block = LogProbs | TruncatedSignal | None
"""What a teacher says about some rows of a chunk."""

_BLOCK_ELEMENTS = {"cpu": 2**20}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24
"""Logits of a block: 4 MB, which a CPU's cache holds; on a GPU large enough to hide the launches."""


def compute_type(hidden: Tensor) -> torch.dtype:
    """In which type losses are computed: float32 or better."""
    return torch.promote_types(hidden.dtype, torch.float32)


def blocks(tokens: int, classes: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Rows of a chunk that losses look at together: a multiple of `multiple`, but for the last."""
    elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    rows = max(1, elements // classes // multiple) * multiple
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


class Projection:
    """A head in the compute type of some hidden states, and the buffer for a chunk of its logits."""

    def __init__(self, head: Head, hidden: Float[Tensor, "n D"], chunk_tokens: int) -> None:
        """`hidden` are the states of all tokens, of which `chunk_tokens` are projected at a time."""
        self.head, self._hidden = head, hidden.detach()
        self.weight = head.weight.detach()[: head.vocab_size].to(hidden.dtype)
        self._bias = None if head.bias is None else head.bias.detach()[: head.vocab_size].to(hidden.dtype)
        self._type = compute_type(hidden)
        self._buffer = hidden.new_empty((min(chunk_tokens, len(hidden)), len(self.weight)))

    @property
    def classes(self) -> int:
        """V."""
        return len(self.weight)

    def project(self, part: slice) -> Float[Tensor, "c V"]:
        """h W^T + b of a chunk, before scale and soft cap; it is gone with the next chunk."""
        hidden = self._hidden[part]
        out = self._buffer[: len(hidden)]
        if self._bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self._bias, hidden, self.weight.T, out=out)  # rounded once

    def finish(self, raw: Float[Tensor, "b V"]) -> Float[Tensor, "b V"]:
        """The logits of a block."""
        return self.head.finish(raw.to(self._type))

    def pull_back(self, gradient: Float[Tensor, "b V"], logits: Float[Tensor, "b V"]) -> Tensor:
        """The derivative by `raw` from that by the logits, which is changed in place."""
        if self.head.softcap is not None:  # (c tanh(z / c))' = 1 - tanh^2
            gradient.mul_(1 - (logits / self.head.softcap).square())
        return gradient if self.head.scale == 1.0 else gradient.mul_(self.head.scale)


def teacher_chunks(signal: Signal | None, chunk_tokens: int) -> Callable[[slice], Callable[[slice], Block]]:
    """A function from a chunk to a function from rows of that chunk to what the teacher says about them."""
    if isinstance(signal, DenseSignal):
        return _dense(signal, chunk_tokens)
    if isinstance(signal, EnsembleSignal):
        return _ensemble(signal, chunk_tokens)

    def said(part: slice) -> Callable[[slice], Block]:
        chunk = None if signal is None else signal.at(part)
        return lambda rows: None if chunk is None else chunk.at(rows)

    return said


def _dense(signal: DenseSignal, chunk_tokens: int) -> Callable[[slice], Callable[[slice], Block]]:
    projection = Projection(signal.head, signal.hidden, chunk_tokens)

    def said(part: slice) -> Callable[[slice], Block]:
        raw = projection.project(part)
        return lambda rows: LogProbs(projection.finish(raw[rows]))

    return said


def _ensemble(signal: EnsembleSignal, chunk_tokens: int) -> Callable[[slice], Callable[[slice], Block]]:
    """The members' log-probabilities are added up in one more buffer; each member has one of its own."""
    members = [Projection(member.head, member.hidden, chunk_tokens) for member in signal.members]
    like = members[0].finish(signal.members[0].hidden[:0] @ members[0].weight.T)
    mean = like.new_empty((min(chunk_tokens, len(signal.members[0].hidden)), members[0].classes))

    def said(part: slice) -> Callable[[slice], Block]:
        for k, (member, weight) in enumerate(zip(members, signal.weights, strict=True)):
            raw = member.project(part)
            for rows in blocks(len(raw), member.classes, raw.device):
                log_p = member.finish(raw[rows]).log_softmax(-1).mul_(weight)
                mean[rows] = log_p if k == 0 else log_p.add_(mean[rows])
        return lambda rows: LogProbs(mean[rows])

    return said
