"""Teacher logits -> the few classes and the scalars that are worth keeping of each token.

Kept classes have their true log-probabilities. Four scalars make up for what is left out: the mass outside,
the teacher's own loss, its entropy, and the logarithm of the normaliser at each temperature, with which
tempered probabilities of the kept classes are exact.

A few passes over the vocabulary, in three buffers, do all of it: one finds the largest logit of each block of
64 (the k largest logits lie in the k blocks with the largest ones), one or two take exponentials, and sums of
blocks turn random numbers into draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, TruncatedSignal
from ddkmix.errors import NumericsError
from ddkmix.fingerprint import hash_json
from ddkmix.logits_store.card import Kept
from ddkmix.losses.reference import dense_logits

_BLOCK = 64
_PROJECTED_TOKENS = 256
"""Tokens whose logits are made at once: enough for a fast matrix product."""
_CHUNK_BYTES = {"cpu": 4 << 20, "other": 512 << 20}
"""Of float32 logits that are looked at at once: what fits into a cache, or keeps an accelerator busy."""
_POWERS = (2.0, 3.0, 4.0)


def seeded_uniforms(content: object, num_tokens: int, draws: int) -> Float[np.ndarray, "n N"]:
    """Random numbers in [0, 1) that depend on nothing but what they are for.

    Args:
        content: JSON-able: the store's key, the shard's SHA-256, the row.
        num_tokens: of the row.
        draws: for each token.
    """
    bits = np.random.Philox(key=int(hash_json(content)[:32], 16)).random_raw(num_tokens * draws)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(num_tokens, draws)


def truncate_said(
    said: DenseSignal | EnsembleSignal,
    labels: Int[Tensor, " n"],
    kept: Kept,
    temperatures: Sequence[float] = (),
    *,
    uniforms: Float[Tensor, "n N"] | None = None,
    name: Callable[[int], str] = lambda i: f"token {i}",
) -> TruncatedSignal:
    """What is kept of n tokens about which a teacher, or several, said this; see `truncate`.

    Logits of at most 256 tokens exist at one time.
    """
    parts = []
    for start in range(0, max(len(labels), 1), _PROJECTED_TOKENS):
        part = slice(start, start + _PROJECTED_TOKENS)
        if isinstance(said, DenseSignal):
            raw, head = _project(said.at(part)), said.head
        else:
            raw, head = dense_logits(said.at(part)), None
        parts.append(
            truncate(
                raw,
                labels[part],
                kept,
                temperatures,
                head=head,
                uniforms=None if uniforms is None else uniforms[part],
                name=lambda i, start=start: name(start + i),  # type: ignore[misc]
            )
        )
    return _joined(parts)


def _project(said: DenseSignal) -> Float[Tensor, "n V"]:
    """h W^T + b in the type of h, before scale and soft cap: `dense_logits` would make a float32 copy."""
    head, size = said.head, said.head.vocab_size
    bias = None if head.bias is None else head.bias[:size]
    return torch.nn.functional.linear(said.hidden, head.weight[:size].to(said.hidden.dtype), bias)


@torch.no_grad()
def truncate(
    logits: Float[Tensor, "n V"],
    labels: Int[Tensor, " n"],
    kept: Kept,
    temperatures: Sequence[float] = (),
    *,
    head: Head | None = None,
    uniforms: Float[Tensor, "n N"] | None = None,
    name: Callable[[int], str] = lambda i: f"token {i}",
) -> TruncatedSignal:
    """What is kept of n tokens.

    `top_p_k` keeps the smallest prefix of the classes, likeliest first, whose mass is at least p, at most k
    of them and at least one (arXiv 2410.16215). `drawn` keeps draws with replacement from all classes (RS-KD,
    arXiv 2503.16870), `top_k_drawn` the k likeliest and draws from the others. Classes of probability 0 are
    never kept.

    Args:
        logits: the teacher's, in any floating type.
        labels: next tokens.
        kept: what to keep, not hidden states.
        temperatures: other than 1, whose normalisers are wanted.
        head: whose scale and soft cap are still to be applied.
        uniforms: random numbers in [0, 1), float64, for each token and draw.
        name: what messages call a token.

    Raises:
        NumericsError: a logit is NaN or +inf, or all logits of a token are -inf.
    """
    size = _CHUNK_BYTES["cpu" if logits.device.type == "cpu" else "other"]
    step = min(max(size // (4 * logits.shape[1]), 1), max(len(logits), 1))
    likeliest, ids = _likeliest(logits, min(kept.k or 1, logits.shape[1]))
    values = likeliest.float() if head is None else head.finish(likeliest.float())
    bad = (~values[:, 0].isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise NumericsError(
            f"{name(i)}: the teacher's largest logit is {values[i, 0].item()}; its parameters "
            "are damaged, or its type overflows. Load another copy, or set teacher.dtype: float32."
        )
    buffers = _Buffers(*(logits.new_empty((step, logits.shape[1]), dtype=torch.float32) for _ in range(3)))
    parts = []
    for start in range(0, max(len(logits), 1), step):
        part = slice(start, start + step)
        work = buffers.of(len(logits[part]))
        work.shifted.copy_(logits[part])
        if head is not None:
            work.shifted.copy_(head.finish(work.shifted))
        own = None if uniforms is None else uniforms[part]
        parts.append(_truncate(work, labels[part], values[part], ids[part], kept, temperatures, own))
    return _joined(parts)


class _Buffers(NamedTuple):
    """Of one chunk of logits after the other: fresh memory would cost as much as what is done in it."""

    shifted: Float[Tensor, "n V"]
    exponentials: Float[Tensor, "n V"]
    other: Float[Tensor, "n V"]

    def of(self, tokens: int) -> "_Buffers":
        """For a chunk that may be shorter."""
        return _Buffers(*(buffer[:tokens] for buffer in self))


def _truncate(
    work: _Buffers,
    labels: Int[Tensor, " n"],
    values: Float[Tensor, "n k"],
    ids: Int[Tensor, "n k"],
    kept: Kept,
    temperatures: Sequence[float],
    uniforms: Float[Tensor, "n N"] | None,
) -> TruncatedSignal:
    largest = values[:, :1]
    shifted = work.shifted.sub_(largest)
    exponentials, log_z = _exponentials(work, temperatures)
    total = exponentials.sum(-1)
    log_total = total.log()
    signal = TruncatedSignal(
        ids=ids,
        log_probs=values - largest - log_total[:, None],
        entropy=_entropy(work, exponentials, total),
        teacher_nats=log_total - shifted.gather(1, labels[:, None])[:, 0],
        log_z={t: value - log_total / t for t, value in log_z.items()},
    )
    if kept.p is not None:
        probs = signal.log_probs.double().exp()
        before = probs.cumsum(-1) - probs
        signal = replace(signal, log_probs=signal.log_probs.masked_fill(before >= kept.p, -torch.inf))
    if kept.draws is not None:
        assert uniforms is not None
        if kept.has_exact:
            exponentials.scatter_(1, ids, 0.0)
        signal = _with_draws(signal, kept, shifted, exponentials, total, uniforms)
    unused = signal.log_probs == -torch.inf
    return replace(signal, ids=torch.where(unused, signal.ids[:, :1], signal.ids))


def _likeliest(logits: Float[Tensor, "n V"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest logits, in order, and their classes."""
    whole = logits.shape[1] // _BLOCK
    if whole < 4 * k:
        return logits.topk(k, dim=1)
    blocks = logits[:, : whole * _BLOCK].view(len(logits), whole, _BLOCK)
    chosen = blocks.amax(-1).topk(k, dim=1).indices
    inside = torch.arange(_BLOCK, device=logits.device)
    classes = (chosen[:, :, None] * _BLOCK + inside).flatten(1)
    behind = torch.arange(whole * _BLOCK, logits.shape[1], device=logits.device)
    classes = torch.cat([classes, behind.expand(len(logits), -1)], dim=1)
    values, places = logits.gather(1, classes).topk(k, dim=1)
    return values, classes.gather(1, places)


def _exponentials(
    work: _Buffers, temperatures: Sequence[float]
) -> tuple[Float[Tensor, "n V"], dict[float, Float[Tensor, " n"]]]:
    """exp(shifted), and log sum exp(shifted / temperature) for each temperature.

    The exponential at temperature 2, 3 or 4 to that power is the one at temperature 1, at a fraction of the
    price.
    """
    log_z: dict[float, Tensor] = {}
    powers = [t for t in temperatures if t in _POWERS]
    exponentials = None
    for temperature in temperatures:
        is_last = bool(powers) and temperature == max(powers)
        out = work.exponentials if is_last else work.other
        tempered = torch.mul(work.shifted, 1 / temperature, out=out).exp_()
        log_z[temperature] = tempered.sum(-1).log()
        if is_last:
            exponentials = tempered.pow_(int(temperature))
    if exponentials is None:
        exponentials = torch.exp(work.shifted, out=work.exponentials)
    return exponentials, log_z


def _entropy(
    work: _Buffers, exponentials: Float[Tensor, "n V"], total: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """-sum_v p log p = log Z - sum_v p (z - max)."""
    mean = torch.mul(exponentials, work.shifted, out=work.other).sum(-1) / total
    if mean.isnan().any():  # 0 x -inf of excluded classes
        mean = torch.linalg.vecdot(exponentials, work.shifted.clamp(min=-1e30)) / total
    return (total.log() - mean).clamp(min=0.0)


def _with_draws(
    signal: TruncatedSignal,
    kept: Kept,
    shifted: Float[Tensor, "n V"],
    weights: Float[Tensor, "n V"],
    total: Float[Tensor, " n"],
    uniforms: Float[Tensor, "n N"],
) -> TruncatedSignal:
    """The same with classes drawn in proportion to `weights`, which are 0 where a class is kept already."""
    drawn, mass = draw_classes(weights, uniforms)
    ids, counts = _counted(drawn)
    log_probs = shifted.gather(1, ids) - total.log()[:, None]
    nothing = (counts == 0) | (mass == 0)[:, None]
    counts, log_probs = counts.masked_fill(nothing, 0), log_probs.masked_fill(nothing, -torch.inf)
    if kept.has_exact:
        exact = torch.zeros_like(signal.ids)
        ids, counts = torch.cat([signal.ids, ids], dim=1), torch.cat([exact, counts], dim=1)
        log_probs = torch.cat([signal.log_probs, log_probs], dim=1)
        share = (mass / total.double()).clamp(max=1.0).float()
    else:
        share = torch.ones_like(total)
    assert kept.draws is not None
    return replace(signal, ids=ids, log_probs=log_probs, draws=counts, num_draws=kept.draws, drawn_mass=share)


def draw_classes(
    weights: Float[Tensor, "n V"], uniforms: Float[Tensor, "n N"]
) -> tuple[Int[Tensor, "n N"], Float[Tensor, " n"]]:
    """Classes drawn with replacement, in proportion to `weights`, and the sum of these, float64.

    The inverse of the distribution function over classes in the order of their ids. First a block, by its
    sum, then a class in it: only the classes of drawn blocks are looked at one by one.
    """
    whole = -(-weights.shape[1] // _BLOCK)
    padded = torch.nn.functional.pad(weights, (0, whole * _BLOCK - weights.shape[1]))
    blocks = padded.view(len(weights), whole, _BLOCK)
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    target = _below(uniforms.to(ends.device) * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    share = (target - (ends - sums).gather(1, block)) / sums.gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).double().cumsum(-1)
    target = _below(share * inside[:, :, -1], inside[:, :, -1])
    place = (inside <= target[:, :, None]).sum(-1).clamp(max=_BLOCK - 1)
    return (block * _BLOCK + place).clamp(max=weights.shape[1] - 1), ends[:, -1]


def _below(values: Tensor, end: Tensor) -> Tensor:
    """Rounding must not reach the end: what lies there has no weight."""
    return torch.minimum(values, torch.nextafter(end, torch.zeros_like(end)))


def _counted(drawn: Int[Tensor, "n N"]) -> tuple[Int[Tensor, "n N"], Int[Tensor, "n N"]]:
    """Different classes of each token in increasing order, and how often each was drawn; 0 behind them."""
    drawn = drawn.sort(dim=1).values
    new = torch.ones_like(drawn)
    new[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).long()
    place = new.cumsum(1) - 1
    ids = drawn[:, :1].repeat(1, drawn.shape[1]).scatter_(1, place, drawn)
    return ids, torch.zeros_like(drawn).scatter_add_(1, place, torch.ones_like(drawn))


def _joined(parts: Sequence[TruncatedSignal]) -> TruncatedSignal:
    first = parts[0]
    if len(parts) == 1:
        return first
    return replace(
        first,
        ids=torch.cat([part.ids for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        teacher_nats=torch.cat([part.teacher_nats for part in parts]),
        log_z={t: torch.cat([part.log_z[t] for part in parts]) for t in first.log_z},
        draws=None if first.draws is None else torch.cat([_of(part.draws) for part in parts]),
        drawn_mass=None if first.drawn_mass is None else torch.cat([_of(part.drawn_mass) for part in parts]),
    )


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # parts of one signal are of one kind
    return tensor
