"""What several readers share: opening archives, and the Debian books that exist in many languages."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from domain_sources.archives import members
from domain_sources.clean import html_paragraphs, tidy
from domain_sources.model import SourceDocument
from domain_sources.split import cut

PIECE_BYTES = 6500
SECTION = re.compile(r'(?=<div class="section">(?:\s*<div(?: class="titlepage")?>)+\s*<h2)')
CAPTION = re.compile(r"(?:Table|Tableau|表格?|Figure|图)\s*\d+\.\d+")
Archives = dict[str, Path]


def files(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the members whose path matches `pattern` somewhere."""
    wanted = re.compile(pattern)
    for path, content in members(archive):
        if wanted.search(path):
            yield path, content


def document(
    name: str, text: str, boundary: str = r"\n\n+", most: int = PIECE_BYTES, blank_lines: int = 1
) -> SourceDocument:
    """Return a source document of tidied text in pieces of at most about `most` bytes."""
    return SourceDocument(_short(name), tuple(cut(tidy(text, blank_lines), most, boundary)))


def _short(name: str) -> str:
    """Leave out of `package/path` the folders that say nothing, so that keys stay readable."""
    package, _, path = name.partition("/")
    dull = r"usr|share|lib|ocaml|coq|src|include|stb|doc|package|library|theories|rst|Help|_sources"
    dull += r"|go-1\.19|rustc-1\.63\.0|cmake-3\.25|policy\.html"
    folders = [part for part in path.split("/") if not re.fullmatch(dull, part)]
    return "/".join([package, *(part for part in folders if part != package)])


def html_book(
    archive: Path,
    package: str,
    pattern: str,
    wanted: Callable[[str], bool] = lambda paragraph: True,
) -> Iterator[SourceDocument]:
    """Yield each page of an HTML book; paragraphs that are not `wanted` are left out.

    `pre` blocks (four spaces) stay whatever they say, unless next to nothing else stays.
    """
    for path, content in files(archive, pattern):
        kept = _kept(content.decode("utf-8"), wanted)
        prose = sum(len(text) for text in kept if not text.startswith("    "))
        if prose > 800 and prose > 0.5 * sum(len(text) for text in kept):
            yield document(f"{package}/{path.rsplit('/', 1)[-1]}", "\n\n".join(kept))


def handbook(archive: Path, language: str, wanted: Callable[[str], bool]) -> Iterator[SourceDocument]:
    """Yield the pages of the Debian Administrator's Handbook in one language."""
    pages = rf"/html/{language}/(?!index|ix0|preface|pr0|foreword)[^/]*\.html$"
    yield from html_book(archive, "debian-handbook", pages, wanted)


def debian_reference(archive: Path, language: str, wanted: Callable[[str], bool]) -> Iterator[SourceDocument]:
    """Yield the sections of the chapters of the Debian Reference in one language."""
    for path, content in files(archive, rf"debian-reference/ch\d\d\.{language}\.html$"):
        sections = SECTION.split(content.decode("utf-8"))
        for number, html in enumerate(sections[1:], 1):
            kept = _kept(html, wanted)
            if sum(len(text) for text in kept if not text.startswith("    ")) > 800:
                name = f"debian-reference-{language}/{path.rsplit('/', 1)[-1]}/{number}"
                yield document(name, "\n\n".join(kept))


def _kept(html: str, wanted: Callable[[str], bool]) -> list[str]:
    """Return the blocks of a page: `pre` blocks and wanted paragraphs, no captions of tables, no mojibake."""
    return [
        text
        for text in html_paragraphs(html)
        if "\ufffd" not in text and (text.startswith("    ") or (wanted(text) and not CAPTION.match(text)))
    ]
