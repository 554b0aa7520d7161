"""The rows of any past step, from the run directory alone: no model, no torch, no documents.

    data.json        what the planner and the order depend on (`provenance`)
    intervals.jsonl  the planner's exact state at every weight update

A plan is a pure function of that state, so the steps after an update are planned again until the one asked
for. The replay goes on to the next record and must arrive at its state: an answer that cannot be the truth
(another version, an edited file) is an error. Only where weights are shares of tokens are the packed rows'
indices needed as well, because their lengths decide who is served.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddkmix.checkpoint import latest_checkpoint
from ddkmix.errors import DataError, RunError
from ddkmix.index import DomainRows, ShardIndex, read_index
from ddkmix.order import DomainOrder, locate
from ddkmix.planner import PlannerState, StepPlan, plan_step
from ddkmix.provenance import DataBlock, ShardRecord, block_at, read_blocks
from ddkmix.records import read_lines
from ddkmix.resolved_config import read_run_config
from ddkmix.rows import RowReader


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenRow:
    """One row of the global batch of one step."""

    step: int
    """The optimizer step, counted from 1 as in metrics.jsonl."""
    slot: int
    """Place in the global batch, from 0."""
    domain: str
    j: int
    """The domain's j-th row of the run, from 0."""
    epoch: int
    """Pass over the domain's rows, from 0."""
    shard: str
    row: int
    """Place in the shard, from 0."""
    instead_of: str | None = None
    """Name of the damaged row that this one stood in for."""
    reason: str | None = None
    """Why it did."""

    @property
    def name(self) -> str:
        """The row's name, the same in every run: `code/train-000003.tar#17`."""
        return f"{self.domain}/{self.shard}#{self.row}"


class PackedRows:
    """The packed rows that a block of data names; opened one shard at a time."""

    def __init__(self, block: DataBlock) -> None:
        self._block = block
        self._shards: dict[tuple[str, str], ShardIndex] = {}
        self._readers: dict[tuple[str, str], RowReader] = {}

    def tokens(self, domain: str, shard: str, row: int) -> list[int]:
        """The tokens of a row, without padding.

        Raises:
            DataError: its shard is gone, damaged, or another one.
        """
        index = self._index(domain, shard)
        if (domain, shard) not in self._readers:
            rows = DomainRows(domain=domain, shards=(index,), fingerprint="")
            self._readers[domain, shard] = RowReader(rows)
        tokens = self._readers[domain, shard].read(0, row)
        return list(tokens[: self.length(domain, shard, row)].tolist())

    def length(self, domain: str, shard: str, row: int) -> int:
        """Tokens in a row, without padding.

        Raises:
            DataError: its shard is gone, damaged, or another one.
        """
        return int(self._index(domain, shard).num_tokens[row])

    def counted(self, domain: str, shard: str, row: int) -> int:
        """What a row counts where weights are shares of tokens; see `DomainRows.counted_tokens_at`.

        Raises:
            DataError: its shard is gone, damaged, or another one.
        """
        prompts = self._index(domain, shard).num_prompt_tokens
        return self.length(domain, shard, row) - (0 if prompts is None else int(prompts[row]))

    def close(self) -> None:
        """Close every file."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _index(self, domain: str, shard: str) -> ShardIndex:
        if (domain, shard) not in self._shards:
            record = self._block.domains[self._block.settings.domains.index(domain)]
            if "://" in record.folder:
                raise DataError(f"{record.folder} is not on this machine; copy the folder here")
            path = Path(record.folder) / shard
            if not path.exists():
                raise DataError(f"{path} is gone")
            index = read_index(path)
            known = {s.name: s.sha256 for s in record.shards}
            if index.sha256 != known[shard]:
                raise DataError(f"{path} holds other rows than the run was served")
            self._shards[domain, shard] = index
        return self._shards[domain, shard]


class Replay:
    """A run directory whose steps can be planned again."""

    def __init__(self, run_dir: Path) -> None:
        """Read the run's records.

        Raises:
            RunError: the folder is not a run, or its records are missing or damaged.
        """
        config = read_run_config(run_dir)
        self.run_dir = run_dir
        self.steps = int(config["trainer"]["steps"])
        """Steps of the whole run."""
        self.blocks = read_blocks(run_dir)
        records = _lines(run_dir / "intervals.jsonl")
        self._states = {r["step"]: PlannerState.from_json(r["planner"]) for r in records if "planner" in r}
        self.last_step = _last_step(run_dir, records)
        """The last step that the run's files show to have been taken."""
        newest = max(self._states, default=0)
        interval = int(config["mixture"]["interval_steps"])
        self.last_planned = max(self.last_step, min(newest + interval, self.steps))
        """The last step whose rows are decided: weights may change after it."""
        self._substitutes = _substitutes(run_dir)
        self._packed: dict[int, PackedRows] = {}
        self._orders: dict[int, list[DomainOrder]] = {}

    def packed(self, step: int) -> PackedRows:
        """The packed rows that step `step` was served from."""
        block = self.block(step)
        return self._packed.setdefault(block.from_step, PackedRows(block))

    def block(self, step: int) -> DataBlock:
        """The data in force at a step.

        Raises:
            RunError: it is not known.
        """
        return block_at(self.blocks, step, self.run_dir)

    def rows(self, first: int, last: int) -> Iterator[SeenRow]:
        """The rows of steps `first` to `last`, both counted from 1 and included, in slot order.

        Raises:
            RunError: the steps do not exist, are not known, or cannot be planned again.
        """
        self._check_range(first, last)
        for plan in self._plans(first, last):
            yield from self._rows_of(plan)

    def close(self) -> None:
        """Close every file."""
        for packed in self._packed.values():
            packed.close()

    def _check_range(self, first: int, last: int) -> None:
        if first < 1 or last < first:
            raise RunError(
                f"step {f'{first}:{last}' if last != first else first}: steps count from 1, as in "
                f"metrics.jsonl, and a range is FIRST:LAST; {self.run_dir} has taken {self.last_step}."
            )
        if last > self.last_planned:
            more = ""
            if self.last_step < self.last_planned:
                more = f", and rows are decided up to step {self.last_planned}, the next weight update"
            raise RunError(
                f"step {last}: {self.run_dir} has taken {self.last_step} of {self.steps} steps{more}."
            )

    def _plans(self, first: int, last: int) -> Iterator[StepPlan]:
        """Plan from the last record before `first`, and on to the first record at or after `last`."""
        state, block = self._start(first)
        end = min((s for s in self._states if s >= last and self.block(s) is self.block(last)), default=last)
        while state.step < end:
            step = state.step + 1
            if self.block(step) is not block:
                state, block = self._start(step)
            plan, state = self._plan(block, state)
            if first <= step <= last:
                yield plan
            state = self._agreed(state)

    def _start(self, step: int) -> tuple[PlannerState, DataBlock]:
        """The last recorded state before a step (counted from 1) and the data in force."""
        block = self.block(step)
        known = {s: state for s, state in self._states.items() if block.from_step <= s < step}
        if block.planner is not None:
            known.setdefault(block.from_step, block.planner)
        if not known:
            raise RunError(
                f"{self.run_dir / 'intervals.jsonl'} has no planner state between step {block.from_step} and "
                f"{step}; an older ddkmix wrote it, so the rows of step {step} are not known."
            )
        return known[max(known)], block

    def _plan(self, block: DataBlock, state: PlannerState) -> tuple[StepPlan, PlannerState]:
        sizes: tuple[Any, ...] = ()
        if block.count == "tokens":
            sizes = (lambda domain, j: self._length(block, domain, j),)
        try:
            return plan_step(block.settings, state, *sizes)
        except DataError as error:
            raise RunError(f"step {state.step + 1} has no rows: {error}") from None

    def _agreed(self, state: PlannerState) -> PlannerState:
        """The state to go on from; where a record says it, the replay must have arrived there."""
        recorded, step = self._states.get(state.step), state.step
        if recorded is None or self.block(step + 1) is not self.block(step):
            return state
        if (recorded.served, recorded.credit) != (state.served, state.credit):
            raise RunError(
                f"planning {self.run_dir} again gives {list(state.served)} rows served after step {step} and "
                f"intervals.jsonl records {list(recorded.served)}: another version of ddkmix ran it, or a "
                "file was changed. Use the version in its versions.json."
            )
        return recorded

    def _place(self, block: DataBlock, domain: int, j: int) -> tuple[str, int]:
        if block.from_step not in self._orders:
            self._orders[block.from_step] = [
                DomainOrder(
                    domain=name,
                    shard_rows=tuple(shard.rows for shard in record.shards),
                    seed=block.seed,
                    block_rows=block.block_rows,
                    kept_rows=record.kept_rows,
                )
                for name, record in zip(block.settings.domains, block.domains, strict=True)
            ]
        shard, row = locate(self._orders[block.from_step][domain], j)
        return block.domains[domain].shards[shard].name, row

    def _length(self, block: DataBlock, domain: int, j: int) -> int:
        name = block.settings.domains[domain]
        try:
            return self.packed(block.from_step + 1).counted(name, *self._place(block, domain, j))
        except DataError as error:
            raise RunError(
                f"weights are shares of tokens in this run, so its packed rows are needed to plan it again: "
                f"{error}. `ddkmix pack {self.run_dir / 'config.yaml'}` packs the same rows again."
            ) from None

    def _rows_of(self, plan: StepPlan) -> Iterator[SeenRow]:
        step = plan.step + 1
        block = self.block(step)
        for slot, (i, j) in enumerate(zip(plan.domain_ids.tolist(), plan.row_numbers.tolist(), strict=True)):
            name = block.settings.domains[i]
            shard, row = self._place(block, i, j)
            seen = SeenRow(
                step=step,
                slot=slot,
                domain=name,
                j=j,
                epoch=j // block.settings.num_rows[i],
                shard=shard,
                row=row,
            )
            yield _substituted(seen, block.domains[i].shards, self._substitutes.get((name, j)))


def _substituted(seen: SeenRow, shards: Sequence[ShardRecord], record: dict[str, Any] | None) -> SeenRow:
    """The row that was really served; a record says which by its name, or by shard and row."""
    if record is None:
        return seen
    if "substitute" in record:
        shard, _, row = str(record["substitute"]).rpartition("/")[2].rpartition("#")
    else:
        place, row = record["substitute_shard"], record["substitute_row"]
        shard = shards[place].name if isinstance(place, int) else str(place)
    return replace(
        seen, shard=shard, row=int(row), instead_of=seen.name, reason=str(record.get("reason", ""))
    )


def _substitutes(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What stood in for damaged rows, by (domain, j), which a run serves once; the last attempt counts."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for record in _lines(run_dir / "substitutions.jsonl"):
        key = (str(record["domain"]), int(record["j"]))
        if key not in found or record.get("attempt", 0) >= found[key].get("attempt", 0):
            found[key] = record
    return found


def _last_step(run_dir: Path, intervals: Sequence[dict[str, Any]]) -> int:
    metrics = [record["step"] for record in _lines(run_dir / "metrics.jsonl")]
    checkpoint = latest_checkpoint(run_dir)
    saved = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    return max([0, saved, *metrics[-1:], *(record["step"] for record in intervals[-1:])])


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_lines(path)) if path.exists() else []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}).") from None
