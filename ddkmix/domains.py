"""Read and check domain cards: one YAML file per domain, which names its shards.

    name: code
    text_field: txt                                  # or json.FIELD
    train: code/train-{000000..000001}.tar           # relative to the card, braces expand
    held_out: code/held_out-000000.tar
    license: MIT

Nothing is opened but the cards; `pack` reads the shards.
"""

from collections.abc import Sequence
from glob import escape, glob  # Path.glob takes no absolute pattern
from pathlib import Path
from typing import Annotated

import yaml
from braceexpand import braceexpand
from pydantic import Field, ValidationError

from ddkmix.config import Positive, Section
from ddkmix.errors import DataError, did_you_mean


class Source(Section):
    """Where the text of a domain comes from."""

    package: str
    registry: str
    version: str
    license: str
    sha256: str | None = None
    note: str | None = None


class Card(Section):
    """The content of a card."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Lower-case letters, digits, _ and -; seeds and file names derive from it."""
    description: str = ""
    text_field: Annotated[str, Field(pattern=r"^(txt|text|json\.[A-Za-z0-9_]+)$")] = "txt"
    """WebDataset member that holds a document: `txt`, `text`, or `json.FIELD`."""
    train: str | tuple[str, ...]
    """Shards to learn from; brace expansion; paths relative to the card."""
    held_out: str | tuple[str, ...] | None = None
    """Shards to measure on; required."""
    license: str
    max_epochs: Positive | None = None
    """Passes allowed over the train rows."""
    prior: Positive | None = None
    """Share in the `natural` mixture, relative to the others; the number of train rows when unset."""
    sources: tuple[Source, ...] = ()


class Domain(Section):
    """A card whose shards have been found."""

    name: str
    card: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    text_field: str
    license: str
    max_epochs: float | None
    prior: float | None


def load_domains(patterns: Sequence[str]) -> tuple[Domain, ...]:
    """The domains of a run, sorted by name.

    Args:
        patterns: cards, globs of cards, or folders whose *.yaml are cards.

    Raises:
        DataError: no card is found, a card is wrong, a shard is missing or empty, two domains share a
            name, or a shard appears twice.
    """
    domains = [_load(path) for path in _card_paths(patterns)]
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


def _load(path: Path) -> Domain:
    try:
        card = Card.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as a card: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise DataError(_explain(error, path)) from None
    if not card.held_out:
        raise DataError(
            f"{path}: domain {card.name!r} has no held_out shards; its loss gap cannot be measured "
            "without them. Set aside a few documents and name them under held_out."
        )
    if not card.train:
        raise DataError(f"{path}: domain {card.name!r} has no train shards; name them under train.")
    return Domain(
        name=card.name,
        card=path,
        train=_shards(card.train, path, "train"),
        held_out=_shards(card.held_out, path, "held_out"),
        text_field=card.text_field,
        license=card.license,
        max_epochs=card.max_epochs,
        prior=card.prior,
    )


def _explain(error: ValidationError, path: Path) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key {key!r}; {did_you_mean(key, Card.model_fields)}"
    if first["type"] == "missing":
        return f"{path}: {key} is missing; a card needs name, train, held_out and license."
    return f"{path}: {key or 'card'} = {first['input']!r}; {first['msg']}."


def _shards(spec: str | tuple[str, ...], card: Path, split: str) -> tuple[Path, ...]:
    shards: list[Path] = []
    for pattern in (spec,) if isinstance(spec, str) else spec:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise DataError(
                f"{card}: {split} shard {pattern!r} is remote; this version reads local shards. "
                "Download it and name the file."
            )
        try:
            shards += [card.parent / name for name in braceexpand(pattern)]
        except ValueError:
            raise DataError(f"{card}: {split} = {pattern!r} has unbalanced braces.") from None
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"{card}: {split} shard {shard} does not exist; correct the card or add it.")
        if shard.stat().st_size == 0:
            raise DataError(f"{card}: {split} shard {shard} is empty (0 bytes); write it again.")
    return tuple(shards)


def _check_distinct(domains: Sequence[Domain]) -> None:
    names: dict[str, Path] = {}
    shards: dict[Path, str] = {}
    for domain in domains:
        if domain.name in names:
            raise DataError(
                f"domain {domain.name!r} is in two cards, {names[domain.name]} and {domain.card}; "
                "names must differ."
            )
        names[domain.name] = domain.card
        for split, paths in (("train", domain.train), ("held_out", domain.held_out)):
            for path in paths:
                place = f"{domain.name}/{split}"
                if path.resolve() in shards:
                    raise DataError(
                        f"shard {path} is in {shards[path.resolve()]} and in {place}; a shard belongs to "
                        "one split of one domain."
                    )
                shards[path.resolve()] = place
