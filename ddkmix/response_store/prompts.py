"""The prompts of packed rows: the first tokens of each, as many as its index says."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from ddkmix.config import Storage
from ddkmix.errors import DataError
from ddkmix.index import DomainRows, ShardIndex
from ddkmix.rows import RowReader, byte_reader


@runtime_checkable
class PromptRows(Protocol):
    """The prompts of one domain."""

    @property
    def domain(self) -> str:
        """Its name."""
        ...

    @property
    def shards(self) -> tuple[ShardIndex, ...]:
        """Its shards of rows."""
        ...

    def num_tokens(self, shard: int) -> Int[np.ndarray, " R"]:
        """Tokens of the prompt of each row of a shard; reads no row."""
        ...

    def read(self, shard: int, rows: Sequence[int]) -> list[Int[np.ndarray, " _"]]:
        """The prompts of some rows of a shard.

        Raises:
            RowError: a row is not the one that was packed.
        """
        ...


class LeadingTokens:
    """Prompts at the beginnings of packed rows."""

    def __init__(
        self,
        rows: DomainRows,
        num_prompt_tokens: Sequence[Int[np.ndarray, " _"]],
        storage: Storage | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            rows: packed rows of a domain.
            num_prompt_tokens: tokens of the prompt of each row, for each shard.
            storage: how remote rows are read; the default settings when None.

        Raises:
            DataError: a prompt is longer than its row, or the numbers are not those of the rows.
        """
        self.rows = rows
        self._lengths = tuple(lengths.astype(np.int64) for lengths in num_prompt_tokens)
        self._reader = RowReader(rows, remote=byte_reader(storage))
        for number, (shard, lengths) in enumerate(zip(rows.shards, self._lengths, strict=True)):
            if len(lengths) != shard.num_rows:
                raise DataError(
                    f"{rows.domain}/{shard.name} has {shard.num_rows} rows and {len(lengths)} lengths of "
                    "prompts; pack it again."
                )
            if len(wrong := np.flatnonzero((lengths < 0) | (lengths > shard.num_tokens))):
                row = int(wrong[0])
                raise DataError(
                    f"{rows.name_of(number, row)}: a prompt of {lengths[row]} tokens in a row of "
                    f"{shard.num_tokens[row]}; pack it again."
                )

    @property
    def domain(self) -> str:
        """The name of the domain."""
        return self.rows.domain

    @property
    def shards(self) -> tuple[ShardIndex, ...]:
        """Its shards."""
        return self.rows.shards

    def num_tokens(self, shard: int) -> Int[np.ndarray, " R"]:
        """Tokens of the prompt of each row of a shard."""
        return self._lengths[shard]

    def read(self, shard: int, rows: Sequence[int]) -> list[Int[np.ndarray, " _"]]:
        """The prompts of some rows of a shard.

        Raises:
            RowError: a row is not the one that was packed.
            DataError: the shard cannot be read.
        """
        tokens = np.empty((len(rows), self.rows.seq_len), dtype=self.rows.dtype)
        numbers = np.array(rows, dtype=np.int64)
        for failure in self._reader.read_into(tokens, np.full(len(rows), shard), numbers).values():
            raise failure
        lengths = self._lengths[shard][numbers].tolist()
        return [own[:length].astype(np.int64) for own, length in zip(tokens, lengths, strict=True)]

    def response(self, shard: int, row: int) -> Int[np.ndarray, " _"]:
        """The data's own response to the prompt of a row: its tokens behind that, without padding.

        Raises:
            RowError: the row is not the one that was packed.
            DataError: the shard cannot be read.
        """
        start, end = self.rows.prompt_tokens_at(shard, row), self.rows.tokens_at(shard, row)
        return self._reader.read(shard, row)[start:end].astype(np.int64)


def leading_prompts(rows: DomainRows, storage: Storage | None = None) -> LeadingTokens | None:
    """The prompts of a domain whose rows are prompts and responses; None of one of plain text.

    Args:
        rows: packed rows of the domain.
        storage: how remote rows are read; the default settings when None.
    """
    lengths = [shard.num_prompt_tokens for shard in rows.shards if shard.num_prompt_tokens is not None]
    return LeadingTokens(rows, lengths, storage) if rows.are_prompts else None
