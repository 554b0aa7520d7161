"""Responses to the prompts of a step: the teacher's out of a store, the student's new or out of a buffer.

An answer is a function of (seed, step, row, the row's place in the global batch) and of the model: ranks and
micro-batches do not matter, and a resumed run gives the answers that the uninterrupted one gave.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from ddkmix.errors import ModelError, RunError
from ddkmix.generation.decode import Decoder, Prompt
from ddkmix.generation.replay_buffer import ReplayBuffer, Rollout
from ddkmix.ranks import everyones
from ddkmix.response_store.prompts import LeadingTokens
from ddkmix.response_store.reader import ResponseStore
from ddkmix.truncation import seeded_uniforms

_SILENT_IN_A_ROW = 64
"""New responses without a word, one after the other, after which a run is not worth going on with."""

ROLLOUT_VALUES = ("tokens", "ended", "empty", "age")
"""What is recorded of each response of the student: its tokens, whether it ended by itself, whether it says
nothing, and the steps since it was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A prompt: the row whose beginning it is."""

    domain: int
    """As in `domain_ids`."""
    shard: int
    row: int
    slot: int = 0
    """Place of the row in the global batch."""
    tokens: Int[np.ndarray, " T"] | None = field(default=None, compare=False, repr=False)
    """The row, where it is at hand: then it is not read again, which would be slow from afar."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """A prompt and a response to it."""

    place: Place
    prompt: Int[np.ndarray, " p"]
    ids: Int[np.ndarray, " n"]
    """At least one token."""
    step: int = 0
    """Completed steps of the student that gave it; 0 of a teacher."""


@dataclass(kw_only=True, slots=True, eq=False)
class Answers:
    """Who answers in a run."""

    domains: Sequence[str]
    prompts: Mapping[str, LeadingTokens]
    """Of the domains that have some."""
    silent: Mapping[str, frozenset[int]]
    """Tokens that say nothing, in each domain."""
    store: ResponseStore | None
    """The teacher's responses, where they are wanted."""
    decoder: Decoder | None
    """The student's, where it answers."""
    buffer: ReplayBuffer
    seed: int
    stop_ids: frozenset[int]
    padding_id: int
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    """In which the student answers: autocast, where it is trained so."""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_SILENT_IN_A_ROW))
    """Whether the last new responses of all ranks were empty."""

    def has_prompts(self, domain: int) -> bool:
        """Whether a domain's rows are prompts and responses."""
        return self.domains[domain] in self.prompts

    def of_teacher(self, places: Sequence[Place]) -> list[Answer]:
        """What the store holds for some prompts; responses that say nothing are left out.

        Raises:
            DataError, RowError: see `ResponseStore.read`.
        """
        assert self.store is not None
        found = []
        for place in places:
            name = self.domains[place.domain]
            ids = self.store.read((name, place.shard, place.row)).ids
            if not set(ids.tolist()) <= self.silent[name]:
                found.append(Answer(place=place, prompt=self.prompt(place), ids=ids))
        return found

    def of_student(self, places: Sequence[Place], step: int) -> list[Answer]:
        """New responses to some prompts of this rank, which enter every rank's buffer. Collective.

        Args:
            places: of this rank's prompts.
            step: completed steps of the student.

        Raises:
            DataError, ModelError, NumericsError: see `Decoder.responses`; or it has nothing to say any more.
        """
        assert self.decoder is not None
        asked = [self.prompt(place) for place in places]
        with self.precision():
            said = self.decoder.responses(
                [self._asked(place, ids, step) for place, ids in zip(places, asked, strict=True)]
            )
        own = [
            Answer(place=place, prompt=prompt, ids=ids, step=step)
            for place, prompt, ids in zip(places, asked, said, strict=True)
        ]
        every = sorted(
            (one for of_rank in everyones([_rollout(answer) for answer in own]) for one in of_rank),
            key=lambda numbered: numbered[0],
        )
        self.buffer.push([rollout for _, rollout in every])
        self.recent.extend(self.is_empty(rollout.domain, rollout.ids) for _, rollout in every)
        if len(self.recent) == self.recent.maxlen and all(self.recent):
            raise ModelError(
                f"step {step + 1}: the student's last {len(self.recent)} responses are nothing but tokens "
                "that end or pad a text; there is nothing to learn from them. Look at its template and at "
                "generate.stop, train it on responses first, or lower optimizer.lr."
            )
        return own

    def replayed(self, slots: Sequence[int], count: int, step: int) -> list[Answer]:
        """Old responses in the place of this rank's prompts.

        Args:
            slots: numbers of this rank's prompts among the `count` of the global batch.
            count: prompts in the global batch.
            step: completed steps.
        """
        chosen = self.buffer.sample(min(count, len(self.buffer)), step)
        found = []
        for slot in slots:
            if slot < len(chosen):
                own = chosen[slot]
                place = Place(domain=own.domain, shard=own.shard, row=own.row, slot=slot)
                answer = Answer(place=place, prompt=self.prompt(place), ids=own.ids, step=own.step)
                found.append(answer)
        return found

    def prompt(self, place: Place) -> Int[np.ndarray, " p"]:
        """The tokens of a prompt."""
        own = self.prompts[self.domains[place.domain]]
        if place.tokens is None:
            return own.read(place.shard, [place.row])[0]
        return place.tokens[: own.num_tokens(place.shard)[place.row]]

    def of_data(self, place: Place) -> Int[np.ndarray, " n"]:
        """The data's own response to a prompt."""
        own = self.prompts[self.domains[place.domain]]
        if place.tokens is None:
            return own.response(place.shard, place.row)
        start = own.num_tokens(place.shard)[place.row]
        return place.tokens[start : own.rows.tokens_at(place.shard, place.row)]

    def is_empty(self, domain: int, ids: Int[np.ndarray, " n"]) -> bool:
        """Whether a response says nothing."""
        return set(ids.tolist()) <= self.silent[self.domains[domain]]

    def values(self, answer: Answer, step: int) -> list[float]:
        """`ROLLOUT_VALUES` of a response."""
        ended = int(answer.ids[-1]) in self.stop_ids
        empty = self.is_empty(answer.place.domain, answer.ids)
        return [float(len(answer.ids)), float(ended), float(empty), float(step - answer.step)]

    def state(self) -> dict[str, np.ndarray]:
        """The buffer and what the silence is told by, as arrays for a checkpoint."""
        recent = np.array(list(self.recent), dtype=np.uint8)
        arrays = {**self.buffer.state_dict(), "recent": recent}
        return {f"rollouts/{name}": array for name, array in arrays.items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take up what `state` gave.

        Raises:
            RunError: it is damaged or not there.
        """
        own = {
            name.removeprefix("rollouts/"): a for name, a in arrays.items() if name.startswith("rollouts/")
        }
        if "recent" not in own:
            raise RunError("the checkpoint has no replay buffer; resume from another one.")
        recent = own.pop("recent")
        self.buffer.load_state_dict(own)
        self.recent.clear()
        self.recent.extend(bool(value) for value in recent.tolist())

    def _asked(self, place: Place, ids: Int[np.ndarray, " p"], step: int) -> Prompt:
        name = self.domains[place.domain]
        shard = self.prompts[name].shards[place.shard]
        # a row may stand in a batch twice, where its domain begins another pass
        key = ("rollout", self.seed, step, place.slot, name, shard.sha256, place.row)
        return Prompt(ids=ids, key=key, name=f"{name}/{shard.name}#{place.row}")


def uniform_of(seed: int, step: int) -> float:
    """The number in [0, 1) by which a step's source of responses is decided: equal on every rank.

    Args:
        seed: of the run.
        step: completed steps.
    """
    return float(seeded_uniforms(["source", seed, step], 1, 1)[0, 0])


def _rollout(answer: Answer) -> tuple[int, Rollout]:
    place = answer.place
    own = Rollout(domain=place.domain, shard=place.shard, row=place.row, step=answer.step, ids=answer.ids)
    return place.slot, own
