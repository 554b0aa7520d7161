"""Keys and values of the rows that are decoded together: a fixed number of slots of a fixed length.

Every forward pass that reads one token of each row has one shape, whoever sits in the slots and however long
their texts are. What lies in a slot behind its row's last token, of an earlier row, has weight 0. So no
number of a row depends on its neighbours, or on how many there are: on one machine the arithmetic of an entry
of a matrix product is a matter of the matrices' shapes. transformers asks a cache for `update` alone, and
takes a mask with four dimensions as it is.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ddkmix.errors import ModelError
from ddkmix.preference.minillm import mixed_log_probs


class Slots:
    """A cache for `count` rows of at most `length` tokens each."""

    def __init__(self, model: nn.Module, count: int, length: int) -> None:
        """Memory is taken when the first prompt comes.

        Args:
            model: a transformers causal language model in evaluation mode.
            count: rows.
            length: tokens of each, prompt and response.

        Raises:
            ModelError: the model keeps something else than keys and values, or forgets those within `length`.
        """
        _check_layers(model, length)
        self.count, self.length = count, length
        self._model, self._device = model, next(model.parameters()).device
        self._positions = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._cache = _empty_cache(model)
        self._layers = [_SlotLayer(count, length, self._positions) for _ in self._cache.layers]
        self._cache.layers = self._layers

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._layers)

    def read(self, prompt: Int[Tensor, " T"]) -> "ReadPrompt":
        """Let the model read a prompt: alone, so that the lengths of other prompts cannot matter either."""
        cache = _empty_cache(self._model)
        logits = _logits(self._model, prompt[None].to(self._device), past_key_values=cache)
        return ReadPrompt(logits=logits, layers=[(layer.keys[0], layer.values[0]) for layer in cache.layers])

    def fill(self, slot: int, prompt: "ReadPrompt") -> None:
        """Put a prompt into a slot."""
        for own, (keys, values) in zip(self._layers, prompt.layers, strict=True):
            own.fill(slot, keys, values)

    def step(self, tokens: Int[Tensor, " G"], positions: Int[Tensor, " G"]) -> Float[Tensor, "G V"]:
        """Let every slot read one token at its position; gives the logits of the next ones.

        A slot without a row reads something, too, that means nothing: token 0 at position 0.
        """
        self._positions.copy_(positions)
        seen = torch.arange(self.length, device=self._device) <= self._positions[:, None]
        with self._attention():
            return _logits(
                self._model,
                tokens[:, None].to(self._device),
                attention_mask=self._mask(seen)[:, None, None],
                position_ids=self._positions[:, None],
                past_key_values=self._cache,
            )

    def _attention(self) -> AbstractContextManager[None]:
        """On CPUs the fused kernel deals rows to threads, and a thread's numbers depend on where its buffer
        lies: with two threads the second half of the rows differed from the first."""
        on_cpu = self._device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()

    def _mask(self, seen: Tensor) -> Tensor:
        if getattr(self._model.config, "_attn_implementation", None) == "sdpa":
            return seen
        keys = self._layers[0].keys
        assert keys is not None  # a prompt has come
        return torch.zeros_like(seen, dtype=keys.dtype).masked_fill(~seen, torch.finfo(keys.dtype).min)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReadPrompt:
    """What a model keeps of a prompt."""

    logits: Float[Tensor, "1 V"]
    """Of the token behind it."""
    layers: list[tuple[Tensor, Tensor]]
    """Keys (H, T, D) and values (H, T, E) of each layer."""


class MixedSlots:
    """Two models that read the same tokens, and a mixture of what they say: a p + (1 - a) q."""

    def __init__(self, own: Slots, other: Slots, *, share: float, num_classes: int) -> None:
        """`own` has the share 1 - `share`; classes behind `num_classes` are nobody's."""
        self.count, self.length = own.count, own.length
        self._own, self._other, self._share, self._classes = own, other, share, num_classes

    def read(self, prompt: Int[Tensor, " T"]) -> "ReadPrompt":
        """Let both models read a prompt."""
        own, other = self._own.read(prompt), self._other.read(prompt)
        return ReadPrompt(logits=self._mixed(own.logits, other.logits), layers=[*own.layers, *other.layers])

    def fill(self, slot: int, prompt: "ReadPrompt") -> None:
        """Put a prompt into a slot of each."""
        first = self._own.num_layers
        for slots, layers in ((self._own, prompt.layers[:first]), (self._other, prompt.layers[first:])):
            slots.fill(slot, ReadPrompt(logits=prompt.logits, layers=layers))

    def step(self, tokens: Int[Tensor, " G"], positions: Int[Tensor, " G"]) -> Float[Tensor, "G V"]:
        """Let every slot read one token at its position; gives the mixture's log-probabilities."""
        return self._mixed(self._own.step(tokens, positions), self._other.step(tokens, positions))

    def _mixed(self, own: Tensor, other: Tensor) -> Tensor:
        log_q, log_p = (logits[:, : self._classes].float().log_softmax(-1) for logits in (own, other))
        mixed: Tensor = mixed_log_probs(log_q, log_p, self._share)
        return mixed


class _SlotLayer(CacheLayerMixin):
    """One layer's part."""

    is_sliding = False

    def __init__(self, count: int, length: int, positions: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape, self._positions = (count, length), positions
        self._numbers = torch.arange(count, device=positions.device)

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Take the memory: rows like these, which are one token of each slot or more."""
        count, length = self._shape
        self.keys = keys.new_zeros((count, keys.shape[-3], length, keys.shape[-1]))
        self.values = values.new_zeros((count, values.shape[-3], length, values.shape[-1]))
        self.is_initialized = True

    def fill(self, slot: int, keys: Float[Tensor, "H T D"], values: Float[Tensor, "H T E"]) -> None:
        """Put what a prompt left into a slot."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[slot, :, : keys.shape[1]] = keys
        self.values[slot, :, : values.shape[1]] = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of one token of each slot; gives those of all tokens."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[self._numbers, :, self._positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[self._numbers, :, self._positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Asked by some models to find positions, which they are given."""
        return self._shape[1] - 1

    def get_max_length(self) -> int:
        """Tokens of a slot."""
        return self._shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, which models are given."""
        return self._shape[1], 0


def _empty_cache(model: nn.Module) -> Any:
    config: Any = model.config
    return DynamicCache(config=config)


def _logits(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
    return logits


def _check_layers(model: nn.Module, length: int) -> None:
    for layer in _empty_cache(model).layers:
        if type(layer) is DynamicSlidingWindowLayer and length > layer.sliding_window:
            raise ModelError(
                f"{type(model).__name__} sees only the last {layer.sliding_window} tokens, and prompt and "
                f"response may have {length}; generate with a smaller max_new_tokens, or from shorter "
                "prompts."
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"{type(model).__name__} keeps more of a text than keys and values ({type(layer).__name__}); "
                "ddkmix cannot generate with it."
            )
