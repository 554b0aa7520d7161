"""The distillation objective as one function of hidden states, output layer and teacher signal.

A student that gives every one of 4 classes the same, and a teacher that excludes two: KL is log 2 and the
cross-entropy log 4.

>>> import torch
>>> from ddkmix import build_terms, distillation_objective
>>> from ddkmix.batch import DenseSignal, Head
>>> states, labels, weight = torch.zeros(3, 2), torch.tensor([0, 1, 0]), torch.full((3,), 1 / 3)
>>> bias = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
>>> teacher = DenseSignal(hidden=torch.zeros(3, 8), head=Head(weight=torch.zeros(4, 8), bias=bias))
>>> terms = build_terms([{"name": "forward_kl", "weight": 0.5}, {"name": "cross_entropy", "weight": 0.1}])
>>> head = Head(weight=torch.zeros(4, 2))
>>> objective, values = distillation_objective(states, head, labels, weight, terms, signal=teacher)
>>> round(objective.item(), 4), [round(nats, 4) for nats in values[:, 0].tolist()]
(0.4852, [0.6931, 1.3863])
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.batch import DenseSignal, EnsembleSignal, Head, Signal, TruncatedSignal
from ddkmix.errors import ConfigError, ModelError, NumericsError
from ddkmix.losses import LossTerm, check_terms, token_multiple
from ddkmix.losses.chunked import ChunkedObjective
from ddkmix.losses.classes import kind_of
from ddkmix.losses.gradients import without_gradients
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch
from ddkmix.losses.liger import liger_objective
from ddkmix.losses.reference import logits_of, reference_objective

__all__ = ["IMPLEMENTATIONS", "distillation_objective", "tokens_within"]

IMPLEMENTATIONS = ("chunked", "reference", "liger")
"""`chunked` needs little memory, `reference` is for reading and for tests, `liger` is another's kernel."""

_FEWEST_TOKENS = 64
"""A chunk that is shorter spends its time on the output weights, which every chunk reads."""


_SUSPECTS = 16
"""Tokens whose teacher logits are made again to see what is wrong with them."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def distillation_objective(
    hidden: Float[Tensor, "n D"],
    head: Head,
    labels: Int[Tensor, " n"],
    token_weight: Float[Tensor, "*k n"],
    terms: Sequence[LossTerm],
    *,
    signal: Signal | None = None,
    impl: str = "chunked",
    chunk_tokens: int | None = None,
    memory_mb: float = 512.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
    """The objective and the value of every term at every token.

    objective = sum_i token_weight_i sum_k weight_k loss_k(i). Differentiable once in `hidden`, `head.weight`
    and `head.bias`; the second result is detached. Computed in the type of `hidden`, whatever autocast says,
    with losses and the sums of gradients in float32 at least. Inside `torch.compile` it runs as it is.

    Args:
        hidden: student's last hidden states of the tokens that predict, without those that do not.
        head: student's output layer, whole: call this inside the forward pass of the module that FSDP wraps.
        labels: next tokens.
        token_weight: share of each token in the objective; the trainer puts all normalisation here. One row
            for all terms, or one for each: a policy gradient weighs its terms differently. May be negative.
        terms: the weighted losses.
        signal: what the teacher says about the same tokens; None if no term needs it.
        impl: `chunked` (never holds a tokens x vocabulary tensor), `reference` (whole logits and autograd,
            the same to rounding), or `liger` (liger-kernel's chunked loss, where that computes the same; its
            values are means over the tokens).
        chunk_tokens: tokens whose logits exist at one time; None: as many as `memory_mb` holds. Raised to a
            multiple of what a loss over groups of tokens needs (`token_multiple`).
        memory_mb: megabytes for logits where `chunk_tokens` is None; 64 tokens are the least.

    Raises:
        ConfigError: a loss is not defined for this signal, or `liger` does not compute this.
        ModelError: the output layer is sharded, or teacher and student have different classes.
        NumericsError: the teacher's logits hold NaN or +inf.
    """
    _check(hidden, head, token_weight, terms, signal, impl)
    hidden, head = without_gradients(hidden, head)
    # the compute type is that of `hidden`; autocast would choose again inside every chunk
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            objective, values = reference_objective(hidden, head, labels, token_weight, terms, signal)
        elif impl == "liger":
            objective, values = liger_objective(hidden, head, labels, token_weight, terms, signal)
        else:
            size = chunk_tokens or tokens_within(memory_mb, hidden, head, signal)
            multiple = token_multiple(terms)
            size = -(-size // multiple) * multiple
            objective, values = ChunkedObjective.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, head, labels, token_weight, tuple(terms), signal, size
            )
        if signal is not None and not bool(values.isfinite().all()):
            _accuse_the_teacher(signal, (~values.isfinite()).any(dim=0).nonzero()[:, 0])
    return objective, values


def tokens_within(
    memory_mb: float, hidden: Float[Tensor, "n D"], head: Head, signal: Signal | None = None
) -> int:
    """Tokens of a chunk whose logits fit into `memory_mb` megabytes.

    A chunk holds one row of logits a token for the student, in the type of `hidden`, and as many for each
    dense teacher; an ensemble's mean is one more. All else is small: losses look at a few rows at a time.
    The chunks are of nearly equal size.

    Args:
        memory_mb: megabytes (of 10^6 bytes) for the logits of a chunk; 64 tokens are the least.
        hidden: student's last hidden states of the tokens that predict.
        head: student's output layer.
        signal: what the teacher says about the same tokens.
    """
    members: tuple[DenseSignal, ...] = ()
    row = hidden.element_size()
    if isinstance(signal, DenseSignal):
        members = (signal,)
    if isinstance(signal, EnsembleSignal):
        members = signal.members
        row += 4
    row += sum(member.hidden.element_size() for member in members)
    most = max(_FEWEST_TOKENS, int(memory_mb * 1e6 / (row * _classes(head))))
    chunks = max(1, -(-len(hidden) // most))
    return max(1, -(-len(hidden) // chunks))


def _classes(head: Head) -> int:
    return len(head.weight[: head.vocab_size])


def _check(
    hidden: Tensor,
    head: Head,
    token_weight: Tensor,
    terms: Sequence[LossTerm],
    signal: Signal | None,
    impl: str,
) -> None:
    """What would otherwise end in an error from inside torch, or in a wrong number."""
    assert token_weight.dim() == 1 or len(token_weight) == len(terms), "a row of weights for each term"
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"impl = {impl!r}; it is one of {', '.join(IMPLEMENTATIONS)}.")
    if hasattr(head.weight, "placements"):
        raise ModelError(
            "the student's output weights are a shard (DTensor); FSDP gathers them in the forward pass of "
            "the module that it wraps: wrap the DistillationModel, and the output layer not by itself."
        )
    kind = kind_of(signal) if isinstance(signal, TruncatedSignal) else "dense"
    for term in terms:
        if isinstance(term.loss, HiddenMatch | HiddenConsistency):
            raise ConfigError(
                f"loss {term.name} compares hidden states of other layers, which are not here; use a "
                "DistillationModel, or ddkmix.matching."
            )
    if signal is not None:
        check_terms(terms, kind, signal.log_z.keys() if isinstance(signal, TruncatedSignal) else None)
    members = signal.members if isinstance(signal, EnsembleSignal) else (signal,)
    for member in members:
        if isinstance(member, DenseSignal) and _classes(member.head) != _classes(head):
            raise ModelError(
                f"the teacher has {_classes(member.head)} classes and the student {_classes(head)}; "
                "cut both heads to the classes that they share (vocab_size)."
            )


def _accuse_the_teacher(signal: Signal, tokens: Int[Tensor, " m"]) -> None:
    """Some values are not finite; raise if that is the teacher's doing."""
    if isinstance(signal, EnsembleSignal):
        for member in signal.members:
            _accuse_the_teacher(member, tokens)
        return
    for token in tokens[:_SUSPECTS].tolist():
        said = signal.at(slice(token, token + 1))
        if isinstance(said, TruncatedSignal):
            logits, name = said.log_probs, "log-probabilities"
        else:
            logits, name = logits_of(said.hidden, said.head).detach(), "logits"
        nan, infinite = bool(logits.isnan().any()), bool((logits == torch.inf).any())
        if nan or infinite:
            raise NumericsError(
                f"the teacher's {name} hold {'NaN' if nan else '+inf'} at predicted token {token} of the "
                f"batch ({len(tokens)} losses are not finite); only -inf, an excluded class, is allowed. "
                "Use a wider teacher.dtype, or mend the checkpoint or the store."
            )
