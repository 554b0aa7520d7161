"""`docs`: English technical documentation: manual pages, Debian's manuals, CMake and SQLAlchemy."""

import gzip
import re
from collections.abc import Iterator

from domain_sources.clean import rst_text
from domain_sources.formats import man_text
from domain_sources.model import SourceDocument
from domain_sources.readers.common import (
    Archives,
    debian_reference,
    document,
    files,
    handbook,
)

SECTION = r"\n\n+(?=[^\n]+\n[=\-~*^\"]{4,}\n)|\n\n+"
DROPPED_SECTIONS = re.compile(
    r"^(?:SEE ALSO|COLOPHON|LIBRARY|AUTHORS?|REPORTING BUGS|ATTRIBUTES)\n\n.*?(?=^[A-Z][A-Z ]+\n\n|\Z)",
    re.M | re.S,
)


def manual_pages(archives: Archives) -> Iterator[SourceDocument]:
    """Yield Linux manual pages whose header names the Linux-man-pages-copyleft licence."""
    for package, archive in archives.items():
        for path, content in files(archive, r"/man/man[2-57]/[^/]*\.gz$"):
            troff = gzip.decompress(content).decode("utf-8")
            if "SPDX-License-Identifier: Linux-man-pages-copyleft" not in troff[:3000]:
                continue
            title = path.rsplit("/", 1)[-1].removesuffix(".gz")
            text = DROPPED_SECTIONS.sub("", man_text(troff))
            if len(text) > 2500:
                yield document(f"{package}/{title}", f"{title}\n\n{text}")


def restructured_text(archives: Archives) -> Iterator[SourceDocument]:
    """Yield pages of manuals kept as reStructuredText."""
    wanted = {
        "cmake-data": r"Help/(?:command|manual|policy|guide|prop_tgt)/[^/]*\.rst$",
        "python-sqlalchemy-doc": r"rst/(?:core|dialects|faq|orm|tutorial)/.*\.rst$",
        "developers-reference": r"_sources/(?!index|scope)[^/]*\.rst\.txt$",
        "debian-policy": r"policy\.html/_sources/(?:ch|ap-pkg)[^/]*\.rst\.txt$",
    }
    for package, archive in archives.items():
        for path, content in files(archive, wanted[package]):
            text = rst_text(content.decode("utf-8"))
            for number, part in enumerate(_chapters(text, package)):
                if len(part) > 1500:
                    yield document(f"{package}/{path}/{number}", part, SECTION)


def _chapters(text: str, package: str) -> list[str]:
    """Cut the two Debian manuals, few long files, into their sections."""
    if not package.startswith("de"):
        return [text]
    return re.split(r"\n\n(?=[^\n]+\n(?:=|-){4,}\n)", text)


def debian_books(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the Debian Administrator's Handbook and the Debian Reference in English."""
    yield from handbook(archives["debian-handbook"], "en-US", lambda paragraph: True)
    yield from debian_reference(archives["debian-reference-en"], "en", lambda paragraph: True)
