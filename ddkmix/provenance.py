"""Which data a run is served, written into its directory: `RUN/data.json`.

Together with the planner's states in `intervals.jsonl` this names every row of every step (`replay`). It is a
list of blocks; the block in force at step S (counted from 1) is the last one whose `from_step` is less than
S. A run has one block, and one more for each time it was resumed with other data. Rows are kept by content,
so where they lie (`folder`, the tokenizer's `path`) may change without changing what was served.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ddkmix.config import RunConfig
from ddkmix.errors import RunError
from ddkmix.fingerprint import write_atomically
from ddkmix.index import DomainRows
from ddkmix.planner import PlannerState, PlanSettings
from ddkmix.tokenizer import TokenizerCard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One packed train shard."""

    name: str
    rows: int
    """Rows that are served."""
    sha256: str
    kept: str | None = None
    """Which rows these are, a bit for each row of the shard (`as_text`); None where all are."""

    @property
    def kept_rows(self) -> Int[np.ndarray, " n"]:
        """The numbers of the rows that are served."""
        return np.arange(self.rows) if self.kept is None else np.flatnonzero(from_text(self.kept))

    def __post_init__(self) -> None:
        """Check what replaying takes for granted."""
        if self.kept is not None and len(self.kept_rows) != self.rows:
            raise ValueError(f"{self.name} serves {self.rows} rows and keeps {len(self.kept_rows)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainRecord:
    """The packed train rows of one domain."""

    fingerprint: str
    """Of the rows; see `index.DomainRows`."""
    folder: str = field(compare=False)
    """Where the shards lie: an absolute path or a URL. A place, not an identity."""
    tokens: int
    """Without padding."""
    max_epochs: float | None
    """Passes allowed: the smaller of the card's limit and the config's."""
    shards: tuple[ShardRecord, ...]
    """In the order that `order.locate` counts them."""

    @property
    def num_rows(self) -> int:
        """One epoch."""
        return sum(shard.rows for shard in self.shards)

    @property
    def kept_rows(self) -> Int[np.ndarray, " n"] | None:
        """What `DomainRows.kept_rows` was."""
        if all(shard.kept is None for shard in self.shards):
            return None
        return np.concatenate([shard.kept_rows for shard in self.shards])


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecord:
    """What turns the rows back into text."""

    name: str
    path: str = field(compare=False)
    """Its tokenizer.json."""
    fingerprint: str
    separator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataBlock:
    """The data of the steps after `from_step`, and everything that shapes their order."""

    from_step: int = field(compare=False)
    seed: int
    block_rows: int
    seq_len: int
    count: str
    """What a weight is a share of: "rows" or "tokens"."""
    settings: PlanSettings
    """Domains, rows of a batch, rows and caps by domain."""
    domains: tuple[DomainRecord, ...]
    """In the order of `settings.domains`."""
    tokenizer: TokenizerRecord
    planner: PlannerState | None = field(default=None, compare=False)
    """The planner's state after `from_step` steps, where the data change between two weight updates."""

    @property
    def row_sizes(self) -> tuple[float, ...] | None:
        """Mean tokens of a row of each domain where weights are shares of tokens, else None."""
        if self.count == "rows":
            return None
        return tuple(domain.tokens / domain.num_rows for domain in self.domains)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        tree = asdict(self)
        tree["domains"] = dict(zip(self.settings.domains, tree["domains"], strict=True))
        tree["planner"] = None if self.planner is None else self.planner.to_json()
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "DataBlock":
        """The block that `to_json` wrote."""
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in tree["settings"].items()
        }
        domains = [tree["domains"][name] for name in settings["domains"]]
        return cls(
            **{name: tree[name] for name in ("from_step", "seed", "block_rows", "seq_len", "count")},
            settings=PlanSettings(**settings),
            domains=tuple(
                DomainRecord(**{**d, "shards": tuple(ShardRecord(**s) for s in d["shards"])}) for d in domains
            ),
            tokenizer=TokenizerRecord(**tree["tokenizer"]),
            planner=None if tree["planner"] is None else PlannerState.from_json(tree["planner"]),
        )


def describe(
    config: RunConfig,
    rows: Mapping[str, DomainRows],
    settings: PlanSettings,
    tokenizer: TokenizerCard,
    *,
    from_step: int = 0,
    planner: PlannerState | None = None,
) -> DataBlock:
    """What a config serves from `from_step` on.

    Args:
        config: the run.
        rows: packed train rows of each domain.
        settings: of the planner.
        tokenizer: that packed them.
        from_step: steps taken before.
        planner: the state after these; needed only where the data change between two weight updates.
    """
    domains = []
    for name in settings.domains:
        limits = [x for x in (rows[name].max_epochs, config.mixture.max_epochs) if x is not None]
        domains.append(
            DomainRecord(
                fingerprint=rows[name].fingerprint,
                folder=_folder(rows[name].shards[0].location),
                tokens=rows[name].counted_tokens,
                max_epochs=min(limits, default=None),
                shards=_shards(rows[name]),
            )
        )
    return DataBlock(
        from_step=from_step,
        seed=config.seed,
        block_rows=config.mixture.block_rows,
        seq_len=config.pack.seq_len,
        count=config.mixture.count,
        settings=settings,
        domains=tuple(domains),
        tokenizer=TokenizerRecord(
            name=tokenizer.name,
            path=str(tokenizer.path.absolute()),
            fingerprint=tokenizer.fingerprint,
            separator=tokenizer.separator,
        ),
        planner=planner,
    )


def record_data(run_dir: Path, block: DataBlock) -> None:
    """Write down that a run goes on with `block`; the file is rewound to its step first, as the logs are.

    Where the block in force says the same, only the places of its rows are brought up to date.

    Raises:
        RunError: `data.json` cannot be read or written.
    """
    path = run_dir / "data.json"
    before = [b for b in read_blocks(run_dir) if b.from_step < block.from_step] if path.exists() else []
    before = [_moved(old, block) for old in before]
    blocks = before if before and before[-1] == block else [*before, block]
    try:
        write_atomically(path, json.dumps([b.to_json() for b in blocks], indent=1))
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); free space.") from None


def read_blocks(run_dir: Path) -> list[DataBlock]:
    """The blocks of a run, oldest first.

    Raises:
        RunError: there is no `data.json`, or it is damaged.
    """
    path = run_dir / "data.json"
    try:
        return [DataBlock.from_json(tree) for tree in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise RunError(
            f"{run_dir} has no data.json, which says what data it is served; an older ddkmix started it. "
            "Resuming the run writes it for the steps from there on."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"{path} cannot be read ({reason}); it is damaged or of another version of ddkmix."
        ) from None


def block_at(blocks: Sequence[DataBlock], step: int, run_dir: Path) -> DataBlock:
    """The block in force at a step, counted from 1.

    Raises:
        RunError: the file starts later.
    """
    found = [block for block in blocks if block.from_step < step]
    if not found:
        raise RunError(
            f"{run_dir / 'data.json'} starts after step {blocks[0].from_step if blocks else 0}; what step "
            f"{step} was served is not known."
        )
    return found[-1]


def as_text(bits: Bool[np.ndarray, " n"]) -> str:
    """One bit for each row, as text that JSON holds: 1,000 rows are at most 184 characters."""
    return b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def from_text(text: str) -> Bool[np.ndarray, " n"]:
    """The bits that `as_text` wrote, and up to seven more behind them that are not set.

    Raises:
        ValueError: it wrote something else.
    """
    try:
        packed = np.frombuffer(zlib.decompress(b64decode(text)), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"bits of rows are damaged: {error}") from None
    return np.unpackbits(packed).astype(np.bool_)


def _shards(rows: DomainRows) -> tuple[ShardRecord, ...]:
    found = []
    for shard, served, start in zip(rows.shards, rows.shard_rows, rows.places.starts.tolist(), strict=True):
        bits = None if rows.kept is None else rows.kept[start : start + shard.num_rows]
        kept = None if bits is None or bits.all() else as_text(bits)
        found.append(ShardRecord(name=shard.name, rows=served, sha256=shard.sha256, kept=kept))
    return tuple(found)


def _folder(location: str) -> str:
    folder = location.partition("?")[0].rpartition("/")[0] or "."  # a signed query is nobody's business
    return folder if "://" in folder else str(Path(folder).absolute())


def _moved(old: DataBlock, new: DataBlock) -> DataBlock:
    """`old` with the places that `new` knows for the same content."""
    places = {domain.fingerprint: domain.folder for domain in new.domains}
    domains = tuple(replace(d, folder=places.get(d.fingerprint, d.folder)) for d in old.domains)
    tokenizer = new.tokenizer if new.tokenizer == old.tokenizer else old.tokenizer
    return replace(old, domains=domains, tokenizer=tokenizer)
