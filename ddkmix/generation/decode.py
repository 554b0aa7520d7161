"""Responses of a causal language model to prompts, in batches, each as if there were no batch.

A sum of many numbers depends on the order of its terms, and libraries choose that order by the shapes of
matrices: a row that is decoded among 8 others has other logits, in the last digits, than the same row alone,
and sometimes another response. So shapes are fixed here: prompts are read one by one, and
tokens are made in forward passes of exactly `block_rows` rows over a cache whose length follows from the row
alone (`slots`). How many rows there are, which ones, in which order, and where each of them sits, changes
nothing.

A slot whose row has ended takes the next one, so the more rows are handed over at once, the fewer slots are
idle.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.errors import DataError, ModelError, NumericsError
from ddkmix.generation.sampling import Sampling, choose
from ddkmix.generation.slots import MixedSlots, Slots
from ddkmix.truncation import seeded_uniforms

_PROBE_TOKENS = 6
_ROUNDING = {True: 0.01, False: 0.3}
"""Of logits as a share of their standard deviation, in float32 and in half precision: a real model of 30
layers shows 2e-5 and 0.12 on the nonsense that it is probed with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What is to be answered."""

    ids: Int[np.ndarray, " T"]
    key: tuple[object, ...]
    """JSON-able; with it the random numbers of its response are made, and with nothing else."""
    name: str
    """What messages call it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beside:
    """A second model, which has a share in what is drawn: p~ = share p + (1 - share) q."""

    model: nn.Module
    """With the tokens of the first."""
    share: float
    """In (0, 1); at temperature 1 what is drawn from is exactly p~."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Live:
    """A row in a slot."""

    number: int
    """Among the prompts of a call."""
    uniforms: Float[np.ndarray, " n"]
    position: int
    """Of the token that it reads next."""
    response: list[int] = field(default_factory=list)


class Decoder:
    """Makes responses with one model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        num_classes: int,
        block_rows: int,
        beside: Beside | None = None,
        tokens: int | None = None,
        section: str = "generate",
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: a transformers causal language model, which is in evaluation mode while it decodes.
            sampling: how tokens are chosen.
            max_new_tokens: of a response at most, the one that ends it included.
            stop_ids: tokens that end a response; they are its last token.
            num_classes: tokens that there are; what the model has behind them is padding of its vocabulary.
            block_rows: rows in a forward pass.
            beside: a model whose probabilities are mixed in (MiniLLM's teacher-mixed sampling).
            tokens: of the longest prompt with its response, where all that will be asked are known: they then
                share slots of one length, and blocks are fuller. None: a row's slot is as long as it needs.
            section: of the config that `block_rows` comes from, for messages.
        """
        self._section = section
        self._tokens = tokens
        self._beside = beside
        self._model, self._sampling, self._stop = model, sampling, frozenset(stop_ids)
        self._max_new, self._num_classes, self._block_rows = max_new_tokens, num_classes, block_rows
        self._proved: set[int] = set()

    def prove(self) -> None:
        """Find out now whether the model can decode, where the length of all that will be asked is known.

        Raises:
            ModelError: see `responses`.
        """
        assert self._tokens is not None
        with _evaluating(self._model):
            self._slots(slot_length(self._tokens))

    def responses(self, prompts: Sequence[Prompt]) -> list[Int[np.ndarray, " _"]]:
        """The response to each prompt: at least one token, up to and with the one that ends it.

        Raises:
            DataError: a prompt is empty, or leaves no room for a response.
            ModelError: the model cannot decode this way, or its rows depend on each other.
            NumericsError: logits are not finite.
        """
        self._check(prompts)
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            wanted = len(prompt.ids) + self._max_new
            assert self._tokens is None or wanted <= self._tokens
            by_length.setdefault(slot_length(self._tokens or wanted), []).append(number)
        found: dict[int, Int[np.ndarray, " _"]] = {}
        with _evaluating(self._model):
            for length, numbers in sorted(by_length.items()):
                slots = self._slots(length)
                found.update(self._decoded(slots, prompts, numbers))
        return [found[number] for number in range(len(prompts))]

    def _slots(self, length: int) -> Slots | MixedSlots:
        """Empty ones, of models that were proved to fill them as they must."""
        models = [self._model, *([] if self._beside is None else [self._beside.model])]
        opened = [Slots(model, self._block_rows, length) for model in models]
        if length not in self._proved:
            for model, slots in zip(models, opened, strict=True):
                prove(slots, model, section=self._section)
            self._proved.add(length)
        if self._beside is None:
            return opened[0]
        return MixedSlots(*opened, share=self._beside.share, num_classes=self._num_classes)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        longest = getattr(self._model.config, "max_position_embeddings", None)
        for prompt in prompts:
            if not len(prompt.ids):
                raise DataError(f"{prompt.name}: the prompt is empty; a response needs at least one token.")
            if longest is not None and len(prompt.ids) + self._max_new > longest:
                raise DataError(
                    f"{prompt.name}: a prompt of {len(prompt.ids)} tokens and a response of up to "
                    f"{self._max_new} are more than the {longest} positions of {type(self._model).__name__}; "
                    "allow fewer."
                )

    def _decoded(
        self, slots: Slots | MixedSlots, prompts: Sequence[Prompt], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
        """(number, response) of prompts that need slots of one length, as they end."""
        waiting, live = deque(numbers), dict[int, _Live]()
        while waiting or live:
            for slot in range(slots.count):
                while slot not in live and waiting:
                    row = self._begin(slots, slot, waiting.popleft(), prompts)
                    if self._has_ended(row):
                        yield row.number, np.array(row.response)
                    else:
                        live[slot] = row
            if live:
                self._step(slots, live, prompts)
            for slot, row in list(live.items()):
                if self._has_ended(row):
                    yield row.number, np.array(row.response)
                    del live[slot]

    def _begin(self, slots: Slots | MixedSlots, slot: int, number: int, prompts: Sequence[Prompt]) -> _Live:
        prompt = prompts[number]
        uniforms = seeded_uniforms(list(prompt.key), self._max_new, 1)[:, 0]
        row = _Live(number=number, uniforms=uniforms, position=len(prompt.ids) - 1)
        read = slots.read(torch.from_numpy(prompt.ids.astype(np.int64)))
        slots.fill(slot, read)
        self._choose(read.logits, [row], prompts)
        return row

    def _step(self, slots: Slots | MixedSlots, live: dict[int, _Live], prompts: Sequence[Prompt]) -> None:
        tokens = torch.zeros(slots.count, dtype=torch.int64)
        positions = torch.zeros(slots.count, dtype=torch.int64)
        for slot, row in live.items():
            tokens[slot], positions[slot] = row.response[-1], row.position
        logits = slots.step(tokens, positions)
        self._choose(logits, [live.get(slot) for slot in range(slots.count)], prompts)

    def _choose(self, logits: Tensor, rows: Sequence[_Live | None], prompts: Sequence[Prompt]) -> None:
        """Give every row its next token; places without a row take part, so that shapes stay as they are."""
        logits = logits[:, : self._num_classes].float()
        largest = logits.amax(-1).tolist()
        uniforms = [0.0 if row is None else float(row.uniforms[len(row.response)]) for row in rows]
        for row, value in zip(rows, largest, strict=True):
            if row is not None and not np.isfinite(value):
                raise NumericsError(
                    f"{prompts[row.number].name}: the largest logit of token {len(row.response)} of its "
                    f"response is {value}; the model's parameters are damaged, or its type overflows. Load "
                    "another copy, or use float32."
                )
        chosen = choose(logits, torch.tensor(uniforms, dtype=torch.float64), self._sampling)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row is not None:
                row.response.append(token)
                row.position += 1

    def _has_ended(self, row: _Live) -> bool:
        return row.response[-1] in self._stop or len(row.response) == self._max_new


def slot_length(tokens: int) -> int:
    """Tokens of the slots for a row of at most so many: a power of two or one and a half times that, from 32.

    A function of the row alone, and few values, so that rows of different lengths share a block; a slot is at
    most twice, on average 1.2 times as long as it must be.
    """
    length = 32
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length


@torch.no_grad()
def prove(slots: Slots, model: nn.Module, *, section: str = "generate") -> None:
    """Check that slots give the model's own logits, and that neither place nor neighbours change a digit.

    Every slot gets the same few tokens, and then only the last one does: equal numbers in all slots, equal
    numbers in the last one, and the numbers of a pass without a cache to within rounding.

    Raises:
        ModelError: one of the three does not hold.
    """
    ids = torch.arange(1, _PROBE_TOKENS + 1).remainder(_num_embeddings(model))
    last = slots.count - 1
    first = _probed(slots, ids, ids)
    second = _probed(slots, ids, ids.flip(0)[:-2])
    whole = torch.cat([ids, ids[:2]])[None].to(first.device)
    expected = model(input_ids=whole, use_cache=False).logits[0, -1].float()
    name = type(model).__name__
    if not expected.isfinite().all():
        raise ModelError(
            f"{name} gives logits that are not finite; its parameters are damaged. Load another copy."
        )
    error, spread = (first[0] - expected).square().mean().sqrt().item(), expected.std(correction=0).item()
    exact = next(model.parameters()).dtype == torch.float32
    exact = exact and not torch.is_autocast_enabled(first.device.type)
    if not error <= spread * _ROUNDING[exact]:
        raise ModelError(
            f"{name}: logits with a cache differ from the model's own by {error:.3g}, which spread by "
            f"{spread:.3g}; it does not take positions and masks as ddkmix gives them. Use another model."
        )
    if not (torch.equal(first, first[:1].expand_as(first)) and torch.equal(first[last], second[last])):
        raise ModelError(
            f"{name}: the logits of a row depend on its place among {slots.count} rows or on the others, so "
            f"its response would depend on the batch; set {section}.block_rows to a multiple of 32, or to 1."
        )


def _probed(slots: Slots, own: Int[Tensor, " T"], others: Int[Tensor, " _"]) -> Float[Tensor, "G V"]:
    """The logits after the last slot has read a prompt, the others another, and all their first two tokens
    again."""
    kept = [slots.read(others), slots.read(own)]
    prompts = [others] * (slots.count - 1) + [own]
    for slot in range(slots.count):
        slots.fill(slot, kept[slot == slots.count - 1])
    positions = torch.tensor([len(prompt) for prompt in prompts])
    slots.step(torch.stack([prompt[0] for prompt in prompts]), positions)
    return slots.step(torch.stack([prompt[1] for prompt in prompts]), positions + 1).float()


def _num_embeddings(model: nn.Module) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[operator]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
