"""The nouns of the domain builder: package, domain, source document and document."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml


class BuildError(Exception):
    """A build that cannot go on; its message is one line that says what, where and the way out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One pinned archive of a package registry."""

    package: str
    """Name in the registry."""
    registry: str
    """`debian`, `pypi` or `npm`."""
    version: str
    """Exact version."""
    license: str
    """SPDX expression of what is taken from it."""
    sha256: str
    """Of the downloaded archive."""
    note: str
    """Which files are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One reader's share of a domain."""

    reader: str
    """`module:function` below `domain_sources.readers`."""
    packages: tuple[str, ...]
    """Packages that the reader opens."""
    share: float
    """Share of the domain's bytes, in (0, 1]."""
    most_bytes: int
    """At most this much text is taken from one source document, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One domain of the manifest: its card and the parts that its text comes from."""

    name: str
    """Name, as in the card."""
    description: str
    """One or two sentences."""
    license: str
    """SPDX expression that covers the whole domain."""
    max_epochs: int
    """For the card."""
    train_bytes: int
    """Bytes of the train shards together."""
    held_out_bytes: int
    """Bytes of the held-out shard."""
    shingle: str
    """Unit of the near-duplicate test: `words` (13 of them) or `characters` (20)."""
    parts: tuple[Part, ...]
    """Where the text comes from."""


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """A document as its package has it: the unit of the split into train and held-out."""

    name: str
    """`package/path`, unique in its domain; the side is a hash of it."""
    pieces: tuple[str, ...]
    """Clean text, cut at natural boundaries, in order."""


@dataclass(frozen=True, slots=True)
class Document:
    """One member of a shard."""

    key: str
    """WebDataset key: a slug without dots."""
    source: str
    """Name of the source document that it was cut from."""
    text: str
    """UTF-8 text."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its response, as a package has them."""

    name: str
    """`package/place`, unique in its domain."""
    prompt: str
    response: str


def load_manifest(path: Path) -> tuple[dict[str, Package], dict[str, Domain]]:
    """Return the packages and the domains of a manifest, both by name."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    packages = {entry["package"]: Package(**entry) for entry in tree["packages"]}
    domains = {}
    for entry in tree["domains"]:
        parts = tuple(Part(**{**part, "packages": tuple(part["packages"])}) for part in entry.pop("parts"))
        domains[entry["name"]] = Domain(parts=parts, **entry)
    return packages, domains


def slug(name: str) -> str:
    """Return `name` as lower-case ASCII letters, digits and hyphens, at most 72 of them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-72:].strip("-")
