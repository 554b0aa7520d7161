"""The nouns with tensors.

Axis letters, everywhere in ddkmix: B rows, T tokens in a row, V vocabulary, D hidden size, n tokens taken
out of their rows, N domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddkmix.errors import ConfigError

__all__ = ["DenseSignal", "EnsembleSignal", "Head", "RoutedSignal", "TruncatedSignal"]

Tail = Literal["bucket", "renormalize", "drop"]
"""What becomes of the teacher's mass outside the classes that were kept; see `TruncatedSignal`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """How hidden states become logits: `softcap(scale * (h W^T + b))`, cut to `vocab_size` classes."""

    weight: Float[Tensor, "V D"]
    """Maps hidden states to logits."""
    bias: Float[Tensor, " V"] | None = None
    """Added to the logits."""
    scale: float = 1.0
    """Factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)."""
    softcap: float | None = None
    """Gemma's final_logit_softcapping, a bound on logits: c tanh(z / c)."""
    vocab_size: int | None = None
    """Classes kept; the rows of `weight` behind it belong to no token."""

    def finish(self, raw: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Logits from what the linear layer gives: scale and soft cap.

        Args:
            raw: logits without them, h W^T + b.
        """
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseSignal:
    """What a teacher says about a batch: hidden states from which any chunk of logits can be made."""

    hidden: Float[Tensor, "*b D"]
    """Last hidden states, after the final norm; the state of token t predicts token t + 1."""
    head: Head
    """The teacher's output layer."""
    layers: Mapping[int, Float[Tensor, "*b D"]] = field(default_factory=dict)
    """Outputs of the layers that a `HiddenMatch` asked for, by their number there."""

    def at(self, index: Any) -> "DenseSignal":
        """The same of some positions only.

        Args:
            index: what `hidden[index]` takes: a mask, a slice, numbers.
        """
        layers = {number: output[index] for number, output in self.layers.items()}
        return replace(self, hidden=self.hidden[index], layers=layers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EnsembleSignal:
    """What several teachers with one vocabulary say together: the geometric mean of their distributions.

    logits = sum_k weights_k log softmax(logits_k). Its softmax is the distribution with the least
    sum_k weights_k KL(p || p_k).
    """

    members: tuple[DenseSignal, ...]
    """What each teacher says."""
    weights: tuple[float, ...]
    """Positive, one for each member, with the sum 1."""

    def __post_init__(self) -> None:
        """Check what the loss takes for granted."""
        same = len(self.members) == len(self.weights) > 0
        if not same or not all(w > 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ConfigError(
                f"an ensemble of {len(self.members)} teachers has the weights {self.weights}; each teacher "
                "needs one above 0, and their sum must be 1."
            )

    def at(self, index: Any) -> "EnsembleSignal":
        """The same of some positions only.

        Args:
            index: what `hidden[index]` takes: a mask, a slice, numbers.
        """
        return replace(self, members=tuple(member.at(index) for member in self.members))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TruncatedSignal:
    """What a teacher says about a batch, of K classes a token: what the logits store keeps.

    `log_probs` are true: log p at temperature 1, not renormalised. p_temperature(v) is therefore exactly
    exp(log_probs / temperature - log_z[temperature]).

    An entry stands for itself (`draws` 0) or was drawn at random. `num_draws` draws with replacement were
    made from p outside the classes that stand for themselves, whose mass is `drawn_mass`; an entry that was
    drawn c times counts c / num_draws x drawn_mass / p(v) times, so that every sum over entries is an
    unbiased estimate of the sum over all classes. Where nothing was drawn, `tail` says what becomes of the
    mass outside:

    - `bucket`: one class more, for teacher and student alike (a lower bound of the divergence);
    - `renormalize`: the kept probabilities are scaled up to 1 (biased: the student's tail is driven to 0);
    - `drop`: they are used as they are (biased likewise, with the gradient scaled by the kept mass).
    """

    ids: Int[Tensor, "*b K"]
    """Classes (token ids). Unused places repeat the token's first class."""
    log_probs: Float[Tensor, "*b K"]
    """log p(class) at temperature 1, nats, float32; -inf in unused places."""
    entropy: Float[Tensor, "*b"]
    """H(p) at temperature 1, nats."""
    teacher_nats: Float[Tensor, "*b"]
    """-log p(next token): the teacher's own loss."""
    log_z: Mapping[float, Float[Tensor, "*b"]] = field(default_factory=dict)
    """log sum_v p(v) ** (1 / temperature) for each temperature in use other than 1 (there it is 0)."""
    draws: Int[Tensor, "*b K"] | None = None
    """Draws of each entry; 0 where it stands for itself. None where nothing was drawn."""
    num_draws: int = 0
    """Draws for each token."""
    drawn_mass: Float[Tensor, "*b"] | None = None
    """Share of the mass from which the draws were made: 1 without classes that stand for themselves."""
    tail: Tail = "bucket"
    """Only where nothing was drawn."""

    def at(self, index: Any) -> "TruncatedSignal":
        """The same of some positions only.

        Args:
            index: applied to the axes before K: a mask, a slice, numbers.
        """
        return replace(
            self,
            ids=self.ids[index],
            log_probs=self.log_probs[index],
            entropy=self.entropy[index],
            teacher_nats=self.teacher_nats[index],
            log_z={t: values[index] for t, values in self.log_z.items()},
            draws=None if self.draws is None else self.draws[index],
            drawn_mass=None if self.drawn_mass is None else self.drawn_mass[index],
        )

    def to(self, device: torch.device) -> "TruncatedSignal":
        """The same on a device.

        Args:
            device: where its tensors go.
        """
        return replace(
            self,
            ids=self.ids.to(device),
            log_probs=self.log_probs.to(device),
            entropy=self.entropy.to(device),
            teacher_nats=self.teacher_nats.to(device),
            log_z={t: values.to(device) for t, values in self.log_z.items()},
            draws=None if self.draws is None else self.draws.to(device),
            drawn_mass=None if self.drawn_mass is None else self.drawn_mass.to(device),
        )


Signal = DenseSignal | EnsembleSignal | TruncatedSignal
"""What a teacher says; the trainer does not know which."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutedSignal:
    """What several teachers say about a batch, each about rows of its own."""

    rows: tuple[Int[Tensor, " _"], ...]
    """Rows of the batch that each signal is about, increasing. Together: every row once."""
    signals: tuple[Signal, ...]
    """Their first axis is that of `rows`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CrossSignal:
    """What a teacher with another tokenizer says about a batch, aligned by the bytes of the text.

    Tokens are counted among those that are predicted, row after row: n of the student, m of the teacher.
    """

    teacher: DenseSignal
    """The teacher's states before each of its m tokens: (m, D)."""
    labels: Int[Tensor, " m"]
    """These tokens."""
    spans: Int[Tensor, "g 4"]
    """(student start, student stop, teacher start, teacher stop) of tokens that cover the same bytes."""
    pairs: Int[Tensor, "p 2"]
    """(student id, teacher id) of tokens that stand for the same bytes."""
