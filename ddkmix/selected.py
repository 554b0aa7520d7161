"""What `selection: {name: difference}` keeps of the train rows: decided once, on disk, laid over packed rows.

A decision is a bit for each row of a domain, in `<cache_dir>/selection/`, named by everything that it follows
from: the rows, the teacher, the reference model and the share. So every run of these, and `plan`, takes the
same rows without a model. The rows themselves stay as they are: a domain then counts fewer of them, and those
that it counts have their old places and names.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ddkmix.config import RunConfig
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_json, write_atomically
from ddkmix.hub import model_fingerprint, read_model_config
from ddkmix.index import DomainRows
from ddkmix.pack import PackedDomain
from ddkmix.preflight import Prepared, student_config
from ddkmix.provenance import as_text, from_text
from ddkmix.selection import DifferenceSelection


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What was kept of a domain."""

    rows: int
    """Train rows of the domain."""
    offered: int
    """Those of them that predict a token; the others teach nothing and are never kept."""
    kept: int
    """Those of them that are served."""
    threshold: float | None
    """The least difference that was kept, reference minus teacher, nats per token; None before any was
    measured."""
    bits: str
    """A bit for each row (`provenance.as_text`)."""

    @property
    def mask(self) -> Bool[np.ndarray, " R"]:
        """Whether each row is served."""
        return from_text(self.bits)[: self.rows]


def keeping(rows: DomainRows, kept: Bool[np.ndarray, " R"]) -> DomainRows:
    """The domain with only these rows to serve; other rows make other data, all of them the same.

    Args:
        rows: packed rows.
        kept: a bit for each row of all shards, end to end.
    """
    if kept.all():
        return rows
    digest = sha256(np.packbits(kept).tobytes()).hexdigest()
    return replace(rows, kept=kept, fingerprint=hash_json([rows.fingerprint, digest]))


def predicted_tokens(rows: DomainRows) -> Int[np.ndarray, " R"]:
    """Predicted tokens of each row: all but a text's first, or those of a response."""
    prompts = rows.places.num_prompt_tokens
    given = np.ones(len(rows.places.offsets), dtype=np.int64)
    if prompts is not None:
        given = np.maximum(given, prompts)
    counts: Int[np.ndarray, " R"] = np.maximum(rows.places.num_tokens - given, 0)
    return counts


def decide(
    selection: DifferenceSelection,
    rows: DomainRows,
    reference: Float[np.ndarray, " R"],
    teacher: Float[np.ndarray, " R"],
) -> Kept:
    """What is kept of a domain, given each row's sum of nats under both models.

    Raises:
        DataError: no row predicts a token.
        NumericsError: a sum is not finite.
    """
    counts = predicted_tokens(rows)
    offered = np.flatnonzero(counts)
    if not len(offered):
        raise DataError(f"domain {rows.domain!r}: its train rows have no token to predict; add text.")
    means = [sums[offered] / counts[offered] for sums in (reference, teacher)]
    chosen = offered[selection.keep(*means)]
    mask = np.zeros(len(counts), dtype=np.bool_)
    mask[chosen] = True
    difference = means[0] - means[1]
    return Kept(
        rows=len(counts),
        offered=len(offered),
        kept=len(chosen),
        threshold=float(difference[mask[offered]].min()),
        bits=as_text(mask),
    )


def to_be_kept(selection: DifferenceSelection, rows: DomainRows) -> Kept:
    """As many rows as will be kept, before anything was measured; which ones is not known."""
    nothing = np.zeros(len(rows.places.offsets))
    return replace(decide(selection, rows, nothing, nothing), threshold=None)


def with_kept(packed: Mapping[str, PackedDomain], kept: Mapping[str, Kept]) -> dict[str, PackedDomain]:
    """The domains with only what was kept of their train rows."""
    return {
        name: replace(domain, train=keeping(domain.train, kept[name].mask)) if name in kept else domain
        for name, domain in packed.items()
    }


def reference_fingerprint(prepared: Prepared, selection: DifferenceSelection) -> str:
    """Changes with whatever changes the probabilities that the reference gives to a row's tokens.

    Raises:
        ModelError: a model has no safetensors.
    """
    config = prepared.config
    own: list[Any]
    if selection.reference is not None:
        model = selection.reference
        digest = model_fingerprint(model.model, model.revision, config.cache_dir)
        own = [digest, model.dtype, prepared.separator_id]
    else:
        own = [*_untrained(config), "float32", prepared.vocab_size, prepared.separator_id]
    return hash_json(own)


def _untrained(config: RunConfig) -> list[Any]:
    """What the student's first parameters follow from."""
    student, teacher = config.student, config.teacher
    if student.init == "config":
        tree = student_config(config, read_model_config(teacher.model, teacher.revision))
        return ["config", tree, config.seed]
    source = student.model if student.init == "load" else None
    revision = student.revision if student.init == "load" else teacher.revision
    return [
        student.init,
        model_fingerprint(source or teacher.model, revision, config.cache_dir),
        student.layers,
    ]


def read_kept(prepared: Prepared, selection: DifferenceSelection, rows: DomainRows) -> Kept | None:
    """What was decided for a domain; None if nothing was, or it cannot be read: it costs a decision."""
    try:
        tree = json.loads(_path(prepared, selection, rows).read_text(encoding="utf-8"))
        digest = tree.pop("digest")
        kept = Kept(**tree)
        same = digest == hash_json(tree) and kept.rows == len(kept.mask) == len(rows.places.offsets)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return kept if same else None


def write_kept(prepared: Prepared, selection: DifferenceSelection, rows: DomainRows, kept: Kept) -> None:
    """Remember a decision; atomic.

    Raises:
        DataError: the cache folder cannot be written.
    """
    path = _path(prepared, selection, rows)
    try:
        write_atomically(path, json.dumps({**asdict(kept), "digest": hash_json(asdict(kept))}))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or move cache_dir."
        ) from None


def _path(prepared: Prepared, selection: DifferenceSelection, rows: DomainRows) -> Path:
    key = [
        [type(selection).__qualname__, selection.share],
        [rows.domain, rows.fingerprint],
        prepared.teacher_fingerprint(rows.domain),
        reference_fingerprint(prepared, selection),
    ]
    return prepared.config.cache_dir / "selection" / f"{hash_json(key)[:32]}.json"


def planned(
    prepared: Prepared, packed: Mapping[str, PackedDomain]
) -> tuple[dict[str, PackedDomain], str | None]:
    """The rows that a run would serve as far as that is known without a model, and a line that says so."""
    selection = prepared.selection
    if selection is None:
        return dict(packed), None
    if not isinstance(selection, DifferenceSelection):
        return dict(packed), "selection confidence: every row is served, and weighed in its step."
    known = {name: read_kept(prepared, selection, domain.train) for name, domain in packed.items()}
    kept = {name: found or to_be_kept(selection, packed[name].train) for name, found in sorted(known.items())}
    line = describe(kept)
    if None in known.values():
        line += " Which rows these are is decided when `train` has measured them; tokens are estimates."
    return with_kept(packed, kept), line


def describe(kept: Mapping[str, Kept]) -> str:
    """A line: rows kept of all, domain by domain."""
    parts = [
        f"{name} {one.kept:,} of {one.rows:,} rows"
        + ("" if one.threshold is None else f" (from {one.threshold:.3f} nats per token)")
        for name, one in sorted(kept.items())
    ]
    return f"selection difference keeps {', '.join(parts)}."


def record_kept(run_dir: Path, kept: Mapping[str, Kept]) -> None:
    """Write RUN/selection.json: offered, kept and threshold of each domain. data.json has the rows."""
    if kept:
        counts = ("rows", "offered", "kept", "threshold")
        tree = {name: {key: getattr(one, key) for key in counts} for name, one in sorted(kept.items())}
        write_atomically(run_dir / "selection.json", json.dumps(tree, indent=1))
