"""Read and check domain cards: one YAML file per domain, which names its shards.

    name: code
    text_field: txt                                  # what holds the text, see `documents`
    train: code/train-{000000..000001}.tar           # relative to the card, braces and * expand; or a URL,
                                                     # a wids list, {dataset: owner/name}, or a list of these
    held_out: code/held_out-000000.tar               # the same, or {share_of_train: 0.01}
    license: MIT

or, where the rows have been packed already, `rows: FOLDER` (a path or a URL) in place of train and held_out.
Nothing is opened but the cards and local wids lists; `pack` reads the shards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob  # Path.glob takes no absolute pattern
from pathlib import Path
from typing import Any, Literal

from ddkmix.card import (
    NEEDS,
    Card,
    DatasetEntry,
    HeldOutShare,
    PromptResponse,
    ReferenceLoss,
    Source,
    read_card,
)
from ddkmix.config import Storage
from ddkmix.document_shards import (
    DocumentShard,
    shard_of_dataset,
    shards_of_pattern,
    with_checksums,
    with_names,
)
from ddkmix.documents import HubSplit
from ddkmix.errors import DataError
from ddkmix.storage.location import check_location, is_remote

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A card whose shards have been found."""

    name: str
    card: Path
    license: str
    train: tuple[DocumentShard, ...] = ()
    held_out: tuple[DocumentShard, ...] = ()
    """Empty where the held-out documents are a share of the train shards'."""
    share_of_train: float | None = None
    rows: str | None = None
    """Path or URL of the packed rows; then there are no shards of documents."""
    text_field: str = "txt"
    prompt_response: PromptResponse | None = None
    """Where the documents are prompts with responses: which fields hold them, in place of text_field."""
    max_epochs: float | None = None
    prior: float | None = None
    teacher: str | None = None
    """An entry of the config's `teachers`."""
    reference_loss: ReferenceLoss | None = None
    """A measured loss to compare with."""
    sources: tuple[Source, ...] = ()

    def shards(self) -> Iterator[tuple[Split, DocumentShard]]:
        """All shards of documents, each with its split."""
        for shard in self.train:
            yield "train", shard
        for shard in self.held_out:
            yield "held_out", shard


def load_domains(patterns: Sequence[str], storage: Storage | None = None) -> tuple[Domain, ...]:
    """The domains of a run, sorted by name.

    Args:
        patterns: cards, globs of cards, or folders whose *.yaml are cards.
        storage: how remote shards will be read; the default settings when None.

    Raises:
        DataError: no card is found, a card is wrong, a local shard is missing or empty, two domains share a
            name, or a shard appears twice.
    """
    domains = [_load(path, storage or Storage()) for path in _card_paths(patterns)]
    _check_distinct(domains)
    return tuple(sorted(domains, key=lambda domain: domain.name))


def _card_paths(patterns: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            pattern = str(Path(escape(pattern)) / "*.yaml")
        elif Path(pattern).is_file():
            pattern = escape(pattern)
        found = sorted(Path(match) for match in glob(pattern))  # noqa: PTH207
        if not found:
            raise DataError(
                f"domains: {pattern!r} matches no card; give YAML files, a glob or a folder, relative to "
                f"the working directory."
            )
        paths += found
    return list(dict.fromkeys(paths))


def _load(path: Path, storage: Storage) -> Domain:
    card = read_card(path)
    shards = _packed(card, path, storage) if card.rows is not None else _documents(card, path, storage)
    return Domain(
        name=card.name,
        card=path,
        license=card.license,
        max_epochs=card.max_epochs,
        prior=card.prior,
        teacher=card.teacher,
        reference_loss=card.reference_loss,
        sources=card.sources,
        **shards,
    )


def _packed(card: Card, path: Path, storage: Storage) -> dict[str, Any]:
    for key in ("train", "held_out", "sha256", "prompt_response"):
        if getattr(card, key):
            raise DataError(f"{path}: {key} beside rows; packed rows hold both splits. Remove one of them.")
    assert card.rows is not None
    if is_remote(card.rows):
        check_location(card.rows, storage, f"{path}: rows")
        return {"rows": card.rows}
    return {"rows": str(path.parent / card.rows)}


def _documents(card: Card, path: Path, storage: Storage) -> dict[str, Any]:
    if card.train is None:
        raise DataError(f"{path}: train is missing; {NEEDS}")
    if not card.held_out:
        raise DataError(
            f"{path}: domain {card.name!r} has no held_out shards; its loss gap cannot be measured without "
            "them. Name some documents under held_out, or set aside a part: {share_of_train: 0.01}."
        )
    if not card.train:
        raise DataError(f"{path}: domain {card.name!r} has no train shards; name them under train.")
    found: set[str] = set()
    train = _shards(card, card.train, path, "train", storage, found)
    held_out: tuple[DocumentShard, ...] = ()
    share = None
    if isinstance(card.held_out, HeldOutShare):
        share = card.held_out.share_of_train
    else:
        held_out = _shards(card, card.held_out, path, "held_out", storage, found)
    if unknown := sorted(set(card.sha256) - found):
        raise DataError(f"{path}: sha256 names {unknown[0]!r}, which is no shard of the card; correct it.")
    return {
        "train": train,
        "held_out": held_out,
        "share_of_train": share,
        "text_field": card.text_field,
        "prompt_response": card.prompt_response,
    }


def _shards(
    card: Card,
    entries: Sequence[str | DatasetEntry],
    path: Path,
    split: Split,
    storage: Storage,
    found: set[str],
) -> tuple[DocumentShard, ...]:
    where = f"{path}: {split}"
    shards: list[DocumentShard] = []
    for entry in entries:
        if isinstance(entry, DatasetEntry):
            shards.append(_dataset(entry, path.parent))
        else:
            shards += shards_of_pattern(entry, path.parent, storage, where=where)
    try:
        return with_names(with_checksums(shards, card.sha256, found), where=split)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _dataset(entry: DatasetEntry, folder: Path) -> DocumentShard:
    local = entry.dataset.startswith(".")
    split = HubSplit(
        dataset=str(folder / entry.dataset) if local else entry.dataset,
        config=entry.config,
        split=entry.split,
        revision=entry.revision,
    )
    return shard_of_dataset(split, entry.shards)


def _check_distinct(domains: Sequence[Domain]) -> None:
    names: dict[str, Path] = {}
    shards: dict[Any, str] = {}
    for domain in domains:
        if domain.name in names:
            raise DataError(
                f"domain {domain.name!r} is in two cards, {names[domain.name]} and {domain.card}; "
                "names must differ."
            )
        names[domain.name] = domain.card
        for split, shard in domain.shards():
            place, key = f"{domain.name}/{split}", _identity(shard)
            if key in shards:
                raise DataError(
                    f"shard {shard} is in {shards[key]} and in {place}; a shard belongs to one split of one "
                    "domain."
                )
            shards[key] = place
        if domain.rows is not None:
            if domain.rows in shards:
                raise DataError(
                    f"rows {domain.rows} are in {shards[domain.rows]} and in {domain.name}; rows belong to "
                    "one domain."
                )
            shards[domain.rows] = domain.name


def _identity(shard: DocumentShard) -> Any:
    """Equal for two entries that read the same bytes, as far as names tell."""
    if shard.dataset is not None:
        return (shard.dataset.dataset, shard.dataset.config, shard.dataset.split, shard.index)
    return shard.location if shard.remote else Path(shard.location).resolve()
