"""The domain builder's cleaning, cutting, splitting and deduplication, and the shards in `domains/`."""

import itertools
import re
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from domain_sources import clean, formats, model, shards, split  # noqa: E402
from domain_sources.archives import fetch  # noqa: E402
from domain_sources.model import BuildError, Document, Package, SourceDocument  # noqa: E402
from domain_sources.readers.wml import story_lines  # noqa: E402

DOMAINS = ROOT / "domains"
NAMES = sorted(path.stem for path in DOMAINS.glob("*.yaml"))
CARD_KEYS = ["name", "description", "text_field", "train", "held_out", "license", "max_epochs", "sources"]
SOURCE_KEYS = ["package", "registry", "version", "license", "sha256", "note"]
MOST_BYTES = 12_500_000


def read_side(name: str, side: str) -> dict[str, str]:
    """Return a side's documents by shard and member name."""
    documents = {}
    for path in sorted((DOMAINS / name).glob(f"{side}-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                documents[f"{path.name}/{info.name}"] = tar.extractfile(info).read().decode("utf-8")
    return documents


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, dict[str, str]]]:
    """Every committed document, by domain and side."""
    return {name: {side: read_side(name, side) for side in ("train", "held_out")} for name in NAMES}


def test_html_keeps_paragraphs_and_code_and_drops_navigation_and_tables() -> None:
    """Blocks become paragraphs, `pre` keeps its lines with four spaces, chrome goes."""
    html = (
        "<html><head><title>x</title></head><body><ul class='docnav'><li>Next</li></ul>"
        "<p>One <b>two</b>\n three &amp; four.</p><pre>$ ls\n a</pre><table><tr><td>1</td></tr></table>"
        "<ul><li><p>item</p></li></ul></body></html>"
    )
    expected = ["One two three & four.", "    $ ls\n     a", "- item"]
    assert expected == clean.html_paragraphs(html)


def test_restructured_text_loses_labels_and_roles_but_keeps_words() -> None:
    """References read as words; labels and index entries are gone."""
    rst = ".. _top:\n\nTitle\n=====\n\n.. index:: a\n\nSee :ref:`the rest <x>` and :func:`~a.b`.\n"
    assert clean.rst_text(rst) == "Title\n=====\n\nSee the rest and ``a.b``."


def test_licence_header_is_stripped_and_other_comments_stay() -> None:
    """Only leading comment blocks that speak of copyright or a licence go."""
    assert (
        clean.without_licence_header("# Copyright 2020 A\n# MIT License\n\nx = 1  # keep") == "x = 1  # keep"
    )
    assert clean.without_licence_header("# What it does.\nx = 1") == "# What it does.\nx = 1"


def test_manual_page_becomes_plain_text() -> None:
    """Macros and escapes go, tags of a list stand on their own line, tables are left out."""
    troff = (
        '.\\" c\n.TH a 2\n.SH NAME\na \\- does \\fIthings\\fP\n.TP\n.B EIO\nIt broke.\n.TS\nl l.\n1\t2\n.TE\n'
    )
    assert formats.man_text(troff) == "NAME\n\na - does things\n\nEIO\n    It broke."


def test_story_lines_name_the_speaker_and_translate() -> None:
    """Messages read `Speaker: text`; an untranslated line is left out when a catalogue is given."""
    said = '[message]\n speaker=Ada\n message= _ "Hello ""you""!"\n[/message]\n'
    wml = said + '[message]\n message= _ "No"\n[/message]'
    assert list(story_lines(wml, None)) == ['Ada: Hello "you"!', "No"]
    assert list(story_lines(wml, {'Hello "you"!': "Salut"})) == ["Ada: Salut"]


def test_cut_breaks_only_at_boundaries_and_loses_nothing() -> None:
    """Pieces end at blank lines, stay near the size asked for, and join to the whole text."""
    text = "\n\n".join(["a" * 40] * 10)
    pieces = split.cut(text, 100)
    assert text == "\n\n".join(pieces)
    assert max(map(len, pieces)) <= 2 * 100


def test_side_depends_on_the_name_alone_and_holds_out_about_a_quarter() -> None:
    """The same name gives the same side; 22 to 25 % of many names are held out."""
    sides = [split.side_of("code", f"file-{i}") for i in range(20_000)]
    assert sides == [split.side_of("code", f"file-{i}") for i in range(20_000)]
    assert 0.22 < sides.count("held_out") / len(sides) < 0.25


def words(start: int, count: int) -> str:
    """Return `count` distinct words."""
    return " ".join(f"word{i}" for i in range(start, start + count))


def names_on(side: str, count: int) -> list[str]:
    """Return source names that the split sends to `side`."""
    every = (f"s{i}" for i in itertools.count())
    return list(itertools.islice((n for n in every if split.side_of("d", n) == side), count))


def test_sampler_drops_exact_and_near_duplicates_across_the_split() -> None:
    """A train document goes when it equals held-out text up to white space, or shares a fifth of it."""
    (held,) = names_on("held_out", 1)
    copy, near, fresh = names_on("train", 3)
    base = words(0, 200)
    sources = [
        SourceDocument(held, (base,)),
        SourceDocument(copy, (base.replace(" ", "\n"),)),
        SourceDocument(near, (words(100, 200),)),
        SourceDocument(fresh, (words(1000, 200),)),
    ]
    sampler = split.Sampler("d", "words")
    sampler.fill("held_out", sources, 10**6, 10**6)
    sampler.fill("train", sources, 10**6, 10**6)
    assert [held] == [document.source for document in sampler.sides["held_out"]]
    assert [fresh] == [document.source for document in sampler.sides["train"]]
    assert dict(sampler.dropped) == {"exact duplicate": 1, "near duplicate of held-out": 1}


def test_shards_are_reproducible_and_read_by_webdataset(tmp_path: Path) -> None:
    """Two writes give equal bytes, and webdataset reads what was written."""
    documents = [Document(f"k{i}", "s", f"text {i}\n") for i in range(7)]
    first = shards.write_shards(documents, tmp_path / "a" / "train", 2)
    second = shards.write_shards(documents, tmp_path / "b" / "train", 2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    read = []
    for path in first:
        with path.open("rb") as file:
            members = webdataset.tariterators.tar_file_iterator(file)
            read += [member["data"].decode() for member in members]
    assert [document.text for document in documents] == read


def test_archive_with_a_wrong_sha256_is_refused_in_one_line(tmp_path: Path) -> None:
    """The message names the file and the way out."""
    package = Package(package="p", registry="npm", version="1", license="MIT", sha256="0" * 64, note="")
    (tmp_path / "p_1.tgz").write_bytes(b"x")
    with pytest.raises(BuildError, match="sha256") as caught:
        fetch(package, tmp_path, sys.executable)
    assert "\n" not in str(caught.value)


def test_manifest_shares_add_up_and_its_domains_are_the_committed_ones() -> None:
    """Every domain's shares sum to at most one, and each has a card."""
    packages, domains = model.load_manifest(ROOT / "tools" / "domain_sources" / "manifest.yaml")
    assert sorted(domains) == NAMES
    for domain in domains.values():
        assert sum(part.share for part in domain.parts) <= 1 + 1e-9
        assert {name for part in domain.parts for name in part.packages} <= set(packages)


@pytest.mark.parametrize("name", NAMES)
def test_card_has_the_agreed_keys_and_its_shards_exist(name: str) -> None:
    """Keys, their order and the brace range agree with the files."""
    card = yaml.safe_load((DOMAINS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert list(card) == CARD_KEYS
    assert all(list(source) == SOURCE_KEYS for source in card["sources"])
    assert (name, "txt", f"{name}/held_out-000000.tar") == (
        card["name"],
        card["text_field"],
        card["held_out"],
    )
    last = int(re.fullmatch(rf"{name}/train-\{{000000\.\.(\d{{6}})\}}\.tar", card["train"])[1])
    expected = [*(f"train-{i:06d}.tar" for i in range(last + 1))]
    assert ["held_out-000000.tar", *expected] == sorted(path.name for path in (DOMAINS / name).iterdir())
    assert all(re.fullmatch(r"[0-9a-f]{64}", source["sha256"]) for source in card["sources"])


def test_every_source_has_a_licence_text() -> None:
    """The index in `licenses/` names an existing file for each package and text for each identifier."""
    folder = DOMAINS / "licenses"
    rows = re.findall(
        r"^\| (\S+) \| [^|]+ \| \[[^\]]+\]\(([^)]+)\) \|$", (folder / "README.md").read_text(), re.M
    )
    index = dict(rows)
    for name in NAMES:
        for source in yaml.safe_load((DOMAINS / f"{name}.yaml").read_text())["sources"]:
            assert (folder / index[source["package"]]).stat().st_size > 0
            for identifier in re.split(r" (?:AND|OR) ", source["license"]):
                assert (folder / "texts" / f"{identifier}.txt").stat().st_size > 0


def test_committed_text_is_within_the_size_limit() -> None:
    """Everything under `domains/` together."""
    assert sum(path.stat().st_size for path in DOMAINS.rglob("*") if path.is_file()) <= MOST_BYTES


def test_every_domain_has_enough_documents(texts: dict) -> None:
    """At least 150 documents to train on and 40 held out, none empty, keys without dots."""
    for sides in texts.values():
        assert len(sides["train"]) >= 150
        assert len(sides["held_out"]) >= 40
        for name, text in itertools.chain(sides["train"].items(), sides["held_out"].items()):
            assert len(text) >= 150
            assert re.fullmatch(r"[\w-]+-\d{6}\.tar/[a-z0-9-]+\.txt", name)


def test_no_document_occurs_twice_anywhere(texts: dict) -> None:
    """No exact duplicate, white space ignored, within a domain, across its split or across domains."""
    prints = [
        "".join(t.split()) for sides in texts.values() for side in sides.values() for t in side.values()
    ]
    assert len(prints) == len(set(prints))


@pytest.mark.parametrize("name", NAMES)
def test_train_documents_hardly_overlap_held_out_text(name: str, texts: dict) -> None:
    """No train document shares more than a fifth of its 13-word (20-character) runs with held-out."""

    def runs(text: str) -> set[tuple[str, ...] | str]:
        if name == "chinese":
            plain = re.sub(r"[\W_]+", "", text)
            return {plain[i : i + 20] for i in range(len(plain) - 19)}
        found = re.findall(r"\w+", text.lower())
        return {tuple(found[i : i + 13]) for i in range(len(found) - 12)}

    held_out = set().union(*(runs(text) for text in texts[name]["held_out"].values()))
    for text in texts[name]["train"].values():
        own = runs(text)
        assert len(own & held_out) <= split.OVERLAP_LIMIT * len(own)


@pytest.mark.parametrize("name", NAMES)
def test_no_source_document_is_on_both_sides(name: str, texts: dict) -> None:
    """A key is its source document and the number of the piece; no source is in train and held-out."""
    stems = {
        side: {re.sub(r"-\d{3}(-[0-9a-f]{6})?\.txt$", r"\1", key.split("/")[1]) for key in documents}
        for side, documents in texts[name].items()
    }
    assert set() == stems["train"] & stems["held_out"]


def test_text_has_no_residue_of_markup_or_broken_encoding(texts: dict) -> None:
    """No replacement or control characters, no HTML entities in prose, no Project Gutenberg headers."""
    bad = re.compile(r"[\ufffd\x00-\x08\x0b-\x1f]|Project Gutenberg|SPDX-License-Identifier")
    entity = re.compile(r"&(?:nbsp|lt|gt|quot);|</?(?:div|span|p)>")
    for name, sides in texts.items():
        for text in itertools.chain(sides["train"].values(), sides["held_out"].values()):
            assert not bad.search(text)
            assert name in ("code", "docs") or not entity.search(text)
