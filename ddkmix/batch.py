"""The nouns with tensors.

Axis letters, everywhere in ddkmix: B rows, T tokens in a row, V vocabulary, D hidden size, n tokens taken
out of their rows, N domains.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """How hidden states become logits: `softcap(scale * (h W^T + b))`, cut to `vocab_size` classes."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    """Factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)."""
    softcap: float | None = None
    """Gemma's final_logit_softcapping: c tanh(z / c)."""
    vocab_size: int | None = None
    """Classes kept; the rows of `weight` behind it belong to no token."""

    def finish(self, raw: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Logits from `h W^T + b`: scale and soft cap."""
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        return raw


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseSignal:
    """What a live teacher says about a batch: hidden states from which any chunk of logits can be made."""

    hidden: Float[Tensor, "B T D"]
    head: Head
