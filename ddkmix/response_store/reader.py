"""Reading responses: (domain, shard, row) -> the tokens that a model answered with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ddkmix.errors import DataError, RowError
from ddkmix.fingerprint import hash_json
from ddkmix.logits_store.sidecar import GENERATE, Sidecar, sidecar_of
from ddkmix.response_store.card import ResponseCard, find_store, read_card
from ddkmix.response_store.prompts import PromptRows

Place = tuple[str, int, int]
"""Domain, number of the shard in its rows, number of the row in the shard."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Response:
    """What a model answered to one prompt."""

    ids: Int[np.ndarray, " n"]
    """At least one token; the last one ends it, if it ended by itself."""
    ended: bool
    """By itself; otherwise it was cut at the most tokens that were allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseTotals:
    """Sums over some responses: kept in each file, shown by `generate`."""

    rows: int = 0
    tokens: int = 0
    ended: int = 0
    """Responses that ended by themselves."""
    empty: int = 0
    """Responses that say nothing: nothing but tokens that end a response or pad a row."""

    def __add__(self, other: "ResponseTotals") -> "ResponseTotals":
        return ResponseTotals(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    def to_facts(self) -> dict[str, str]:
        """Text for a file's metadata."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}


def totals_of(responses: Iterable[Response], silent: frozenset[int]) -> ResponseTotals:
    """The sums over some responses.

    Args:
        responses: of any rows.
        silent: tokens that say nothing.
    """
    totals = ResponseTotals()
    for response in responses:
        totals += ResponseTotals(
            rows=1,
            tokens=len(response.ids),
            ended=int(response.ended),
            empty=int(set(response.ids.tolist()) <= silent),
        )
    return totals


def encode(ids: Int[np.ndarray, " n"], dtype: str) -> bytes:
    """The record of a response, in the type of its shard's tokens."""
    return ids.astype(dtype).tobytes()


def decode(data: bytes | memoryview, card: ResponseCard, dtype: str) -> Response:
    """What `encode` stored.

    Raises:
        RowError: no response of that card is like that; the message says only what is wrong.
    """
    if not len(data) or len(data) % np.dtype(dtype).itemsize:
        raise RowError(f"{len(data)} bytes are no tokens of type {dtype}")
    ids = np.frombuffer(data, dtype=dtype).astype(np.int64)
    if len(ids) > card.max_new_tokens or int(ids.max()) >= card.num_classes:
        raise RowError(
            f"{len(ids)} tokens up to {ids.max()}, where {card.max_new_tokens} below {card.num_classes} may "
            "be"
        )
    return Response(ids=ids, ended=int(ids[-1]) in card.stop_ids)


def response_path(store: Path, prompts: PromptRows, shard: int) -> Path:
    """Where the responses to a shard lie: under its name, its content, and where its prompts end."""
    index, prompt_key = prompts.shards[shard], prompts_key(prompts, shard)
    return store / prompts.domain / f"{index.name}-{index.sha256[:12]}-{prompt_key[:8]}.responses"


def prompts_key(prompts: PromptRows, shard: int) -> str:
    """Changes with the lengths of a shard's prompts; their tokens are in the shard's own hash."""
    return hash_json(prompts.num_tokens(shard).tolist())


def open_responses(store: Path, prompts: PromptRows, shard: int) -> Sidecar:
    """The file of responses to a shard.

    Raises:
        DataError: it is missing, damaged, or answers other prompts.
    """
    path = response_path(store, prompts, shard)
    found = sidecar_of(path, prompts.shards[shard], GENERATE)
    if found.facts.get("prompts") != prompts_key(prompts, shard):
        raise DataError(f"{path} answers prompts of other lengths. Delete it and generate again.")
    return found


def totals_of_file(file: Sidecar) -> ResponseTotals:
    """The sums that a file says of itself.

    Raises:
        DataError: it does not.
    """
    try:
        return ResponseTotals(**{field.name: int(file.facts[field.name]) for field in fields(ResponseTotals)})
    except (KeyError, ValueError):
        raise DataError(f"{file.path} lacks its totals; delete it and generate again.") from None


class ResponseStore:
    """What a model answered, or a model for each domain."""

    def __init__(self, folders: Mapping[str, Path], prompts: Mapping[str, PromptRows]) -> None:
        """Open stores whatever they are of; `open` checks that.

        Args:
            folders: of each domain's store, with its store.json.
            prompts: of each domain.

        Raises:
            DataError: store.json is missing or damaged.
        """
        cards = {folder: read_card(folder) for folder in set(folders.values())}
        self._cards = {domain: cards[folder] for domain, folder in folders.items()}
        self._folders, self._prompts = dict(folders), dict(prompts)
        self._files: dict[tuple[str, int], Sidecar] = {}

    @classmethod
    def open(
        cls, folder: Path, wanted: Mapping[str, ResponseCard], prompts: Mapping[str, PromptRows]
    ) -> "ResponseStore":
        """The stores of a folder of stores that a run asks for.

        Args:
            folder: of stores (`generate.folder`).
            wanted: whose responses, for each domain.
            prompts: of each domain.

        Raises:
            DataError: there are none; the message says what the nearest ones differ in.
        """
        return cls({name: find_store(folder, wanted[name]) for name in prompts}, prompts)

    def missing(self) -> dict[str, int]:
        """Shards of each domain without responses; domains without any are left out.

        Raises:
            DataError: a file is damaged, or answers other prompts.
        """
        counts = dict.fromkeys(self._prompts, 0)
        for name, own in self._prompts.items():
            for shard in range(len(own.shards)):
                if response_path(self._folders[name], own, shard).exists():
                    self._file(name, shard)
                else:
                    counts[name] += 1
        return {name: count for name, count in counts.items() if count}

    def read(self, place: Place) -> Response:
        """The response to the prompt of one row.

        Raises:
            RowError: its record is not the one that was written.
            DataError: the shard's file is missing, damaged, or answers other prompts.
        """
        domain, shard, row = place
        file, index = self._file(domain, shard), self._prompts[domain].shards[shard]
        try:
            return decode(file.record(row), self._cards[domain], index.dtype)
        except RowError as error:
            raise RowError(
                f"{domain}/{index.name}#{row}: its response in {file.path} is damaged: {error}. Delete that "
                "file and generate again."
            ) from None

    def _file(self, domain: str, shard: int) -> Sidecar:
        if (domain, shard) not in self._files:
            opened = open_responses(self._folders[domain], self._prompts[domain], shard)
            self._files[domain, shard] = opened
        return self._files[domain, shard]
