"""Held-out loss of student and teacher per domain.

Nats are summed per row and divided once at the end. Standard errors are over rows, because tokens of one
row are not independent: with row sums s_r and token counts n_r, the mean is m = sum s / sum n and its
standard error sqrt(R / (R - 1) sum (s_r - m n_r)^2) / sum n (the linearised ratio estimator). The error of
the gap pairs student and teacher row by row. The teacher never changes, so its row sums are kept on disk.

Two measures more are taken where a policy needs them: the excess over the teacher, clipped at zero token by
token (DoReMi, arXiv 2305.10429, Algorithm 1), and KL(teacher || student).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from ddkmix.config import Storage
from ddkmix.held_out import HeldOutRows
from ddkmix.nats_cache import NatsCache
from ddkmix.predicted_tokens import predicted
from ddkmix.types import DomainLosses

TokenNats = Callable[[Tensor, Tensor], Tensor]
"""(input_ids (B, T), labels (B, T)) -> cross-entropy (n,) of the predicted tokens in row order."""
_Values = Callable[[Sequence[int], Tensor, Tensor], Tensor]
"""(numbers of the rows, input_ids, labels) -> (k, n) values of the predicted tokens."""


@dataclass(frozen=True, slots=True)
class WithDivergence:
    """A student whose KL to the teacher is measured in the same forward pass as its loss."""

    values: Callable[[str, Tensor, Tensor], Tensor]
    """(domain, input_ids (B, T), labels (B, T)) -> (2, n): cross-entropy and KL(teacher || student)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherNats:
    """What a frozen teacher loses on the held-out rows of every domain."""

    sums: Mapping[str, Float[np.ndarray, " R"]]
    """Over each row, nats."""
    tokens: Mapping[str, Float32[np.ndarray, " n"]] | None = None
    """At each predicted token, row after row; None where nobody asked."""


def row_sums(
    held_out: HeldOutRows,
    values: _Values,
    count: int,
    *,
    batch_rows: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    storage: Storage | None = None,
) -> Float[Tensor, "k R"]:
    """`count` values of every token, summed over each row, float64; rows of other ranks are 0.

    Every rank calls the model equally often, because wrapped models (FSDP, DDP with buffers) exchange data in
    their forward pass: a rank without rows of its own goes through the first one for the others' sake.
    """
    rows = held_out.open(storage)
    num_rows = len(held_out.num_tokens)
    sums = torch.zeros((count, num_rows), dtype=torch.float64)
    mine = list(range(rank, num_rows, world_size))
    most = -(-num_rows // world_size)
    try:
        for start in range(0, most, batch_rows):
            chosen = mine[start : start + batch_rows]
            input_ids, labels = rows.read(chosen or [0])
            found = values(chosen, input_ids.to(device), labels.to(device)).double().cpu()
            if chosen:
                row_of = predicted(labels).nonzero()[:, 0]
                own = torch.zeros((count, len(chosen)), dtype=torch.float64)
                sums[:, torch.tensor(chosen)] = own.index_add(1, row_of, found)
    finally:
        rows.close()
    return sums


def row_nats(
    held_out: HeldOutRows,
    token_nats: TokenNats,
    *,
    batch_rows: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    storage: Storage | None = None,
) -> Float[Tensor, " R"]:
    """Cross-entropy summed over each row, float64; rows of other ranks are 0."""
    return row_sums(
        held_out,
        lambda _, input_ids, labels: token_nats(input_ids, labels)[None],
        1,
        batch_rows=batch_rows,
        device=device,
        rank=rank,
        world_size=world_size,
        storage=storage,
    )[0]


def summarise(
    held_out: Mapping[str, HeldOutRows],
    student: Mapping[str, Float[np.ndarray, " R"]],
    teacher: Mapping[str, Float[np.ndarray, " R"]],
    *,
    excess: Mapping[str, Float[np.ndarray, " R"]] | None = None,
    divergence: Mapping[str, Float[np.ndarray, " R"]] | None = None,
) -> DomainLosses:
    """Row sums of every domain -> losses with their standard errors.

    All means are over the tokens of `held_out`; a teacher with other tokens is given by its nats on the same
    text, and its loss is then per token of the student.
    """
    names = tuple(sorted(held_out))
    means = {name: _mean_and_error(student[name], held_out[name].num_tokens) for name in names}
    teacher_means = {name: _mean_and_error(teacher[name], held_out[name].num_tokens) for name in names}
    gaps = {name: _mean_and_error(student[name] - teacher[name], held_out[name].num_tokens) for name in names}
    num_tokens = np.array([held_out[name].num_tokens.sum() for name in names])

    def optional(sums: Mapping[str, Float[np.ndarray, " R"]] | None) -> Float[np.ndarray, " N"] | None:
        return None if sums is None else np.array([sums[name].sum() for name in names]) / num_tokens

    return DomainLosses(
        domains=names,
        effective_rows=np.array([_effective_rows(held_out[name].num_tokens) for name in names]),
        student_loss=np.array([means[name][0] for name in names]),
        teacher_loss=np.array([teacher_means[name][0] for name in names]),
        student_error=np.array([means[name][1] for name in names]),
        gap_error=np.array([gaps[name][1] for name in names]),
        num_tokens=num_tokens,
        num_bytes=np.array([held_out[name].num_bytes.sum() for name in names]),
        excess_loss=optional(excess),
        forward_kl=optional(divergence),
    )


def _mean_and_error(sums: Float[np.ndarray, " R"], counts: Int[np.ndarray, " R"]) -> tuple[float, float]:
    total, num_rows = counts.sum(), len(sums)
    mean = sums.sum() / total
    if num_rows < 2:
        return float(mean), float("nan")
    spread = np.sqrt(num_rows / (num_rows - 1) * ((sums - mean * counts) ** 2).sum())
    return float(mean), float(spread / total)


def _effective_rows(counts: Int[np.ndarray, " R"]) -> float:
    """How many equally long rows would weigh as these do: Kish's effective size."""
    return float(counts.sum() ** 2 / (counts**2).sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluator:
    """Measures models on the same held-out rows, the rows split over ranks."""

    held_out: Mapping[str, HeldOutRows]
    batch_rows: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sum over ranks."""
    storage: Storage | None = None
    """How remote rows are read."""

    def sums(
        self, token_nats: TokenNats, cache: NatsCache | None = None
    ) -> dict[str, Float[np.ndarray, " R"]]:
        """Row sums of a model for every domain, taken from the cache and put there if one is given."""
        return dict(self.frozen(token_nats, cache).sums)

    def frozen(
        self, token_nats: TokenNats, cache: NatsCache | None = None, *, tokens: bool = False
    ) -> TeacherNats:
        """Row sums of a frozen model for every domain, with the losses of its single tokens if they are
        wanted; taken from the cache and put there if one is given. What is there stays as it is."""
        sums, singles = {}, {}
        for name, held_out in self.held_out.items():
            known = cache.load(held_out) if cache else None
            single = cache.load_tokens(held_out) if cache and tokens else None
            # all ranks measure or none does: a rank that sees the file late must not wait alone
            lacks_sums = self._anywhere(known is None)
            lacks_tokens = tokens and self._anywhere(single is None)
            if lacks_sums or lacks_tokens:
                found, table = self._measure(held_out, token_nats, tokens=lacks_tokens)
                known = found if lacks_sums else known
                single = table if lacks_tokens else single
                if cache and self.rank == 0:
                    if lacks_sums:
                        cache.save(held_out, found)
                    if table is not None:
                        cache.save_tokens(held_out, table)
            assert known is not None
            sums[name], singles[name] = known, single
        kept = {name: single for name, single in singles.items() if single is not None}
        return TeacherNats(sums=sums, tokens=kept if tokens else None)

    def cached(self, cache: NatsCache, *, tokens: bool = False) -> TeacherNats | None:
        """What `frozen` gives, from the cache; None on all ranks if one of them lacks some of it."""
        sums = {name: cache.load(held_out) for name, held_out in self.held_out.items()}
        singles = {name: cache.load_tokens(rows) for name, rows in self.held_out.items()} if tokens else {}
        found = {name: one for name, one in sums.items() if one is not None}
        kept = {name: one for name, one in singles.items() if one is not None}
        lacking = len(found) < len(sums) or len(kept) < len(singles)
        if self._anywhere(lacking):
            return None
        return TeacherNats(sums=found, tokens=kept if tokens else None)

    def _anywhere(self, found: bool) -> bool:
        """Whether something holds on any rank."""
        return bool(self.reduce(torch.tensor(float(found), device=self.device)).item() > 0)

    def _measure(
        self, held_out: HeldOutRows, token_nats: TokenNats, *, tokens: bool
    ) -> tuple[Float[np.ndarray, " R"], Float32[np.ndarray, " n"] | None]:
        table = torch.zeros(int(held_out.num_tokens.sum()) if tokens else 0, dtype=torch.float32)

        def values(rows: Sequence[int], input_ids: Tensor, labels: Tensor) -> Tensor:
            nats = token_nats(input_ids, labels)
            if tokens and rows:
                table[_places(held_out, rows)] = nats.float().cpu()
            return nats[None]

        sums = self._row_sums(held_out, values, 1)[0]
        if not tokens:
            return sums, None
        return sums, self.reduce(table.to(self.device)).cpu().numpy()

    def _row_sums(self, held_out: HeldOutRows, values: _Values, count: int) -> Float[np.ndarray, "k R"]:
        sums = row_sums(
            held_out,
            values,
            count,
            batch_rows=self.batch_rows,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            storage=self.storage,
        )
        return self.reduce(sums.to(self.device)).cpu().numpy()

    def measure(
        self,
        student: TokenNats | WithDivergence,
        teacher: Mapping[str, Float[np.ndarray, " R"]] | TeacherNats,
    ) -> DomainLosses:
        """The student's losses beside the teacher's.

        Args:
            student: its loss at predicted tokens, with its KL to the teacher where `forward_kl` is wanted.
            teacher: row sums; with the losses of single tokens `excess_loss` is measured.
        """
        beside = teacher if isinstance(teacher, TeacherNats) else TeacherNats(sums=teacher)
        has_kl = isinstance(student, WithDivergence)
        sums: dict[str, dict[str, Float[np.ndarray, " R"]]] = {"student": {}, "kl": {}, "excess": {}}
        for name, held_out in self.held_out.items():
            own = None if beside.tokens is None else beside.tokens[name]
            names = ["student", *["kl"] * has_kl, *["excess"] * (own is not None)]
            values = _student_values(student, held_out, own)
            for column, found in zip(names, self._row_sums(held_out, values, len(names)), strict=True):
                sums[column][name] = found
        return summarise(
            self.held_out,
            sums["student"],
            beside.sums,
            excess=None if beside.tokens is None else sums["excess"],
            divergence=sums["kl"] if has_kl else None,
        )


def _student_values(
    student: TokenNats | WithDivergence, held_out: HeldOutRows, teacher: Float32[np.ndarray, " n"] | None
) -> _Values:
    """Cross-entropy; KL if it is measured; max(0, student - teacher) if the teacher's losses are known."""

    def values(rows: Sequence[int], input_ids: Tensor, labels: Tensor) -> Tensor:
        if isinstance(student, WithDivergence):
            found = student.values(held_out.domain, input_ids, labels)
        else:
            found = student(input_ids, labels)[None]
        found = found.double().cpu()
        if teacher is None:
            return found
        if not rows:  # for the other ranks' sake; the values count nowhere
            return torch.cat([found, found[:1]])
        theirs = torch.from_numpy(teacher)[_places(held_out, rows)].double()
        return torch.cat([found, (found[:1] - theirs).clamp(min=0)])

    return values


def _places(held_out: HeldOutRows, rows: Sequence[int]) -> Int[Tensor, " n"]:
    """Where the predicted tokens of some rows lie among those of all rows."""
    ends = np.cumsum(held_out.num_tokens)
    starts = ends - held_out.num_tokens
    return torch.from_numpy(np.concatenate([np.arange(starts[i], ends[i]) for i in rows]))
