"""`math`: Metamath statements with their comments, and HOL Light, Agda and Coq developments."""

import re
from collections.abc import Iterator
from html import unescape
from itertools import pairwise

from domain_sources.clean import tidy, without_licence_header
from domain_sources.model import SourceDocument
from domain_sources.readers.common import Archives, document, files

BANNER = re.compile(r"\$\(\s*(?:[#*=.-]{2}){20,}.*?\$\)", re.S)
PARENTHESES = re.compile(
    r"\s*\((?:Contributed|Revised|Proof\s+shortened|Proof\s+modification|New\s+usage|Modified)"
    r"(?:[^()]|\([^()]*\))*\)"
)


def metamath(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the sections of set.mm: comments and statements, their compressed proofs left out."""
    for path, content in files(archives["metamath-databases"], r"/(?:set|iset)\.mm$"):
        database = unescape(content.decode("ascii"))
        stem = path.rsplit("/", 1)[-1]
        starts = [match.start() for match in BANNER.finditer(database)] + [len(database)]
        for number, (start, end) in enumerate(pairwise(starts)):
            section = _statements(database[start:end])
            if number and len(section) > 800:
                yield document(f"metamath-databases/{stem}/{number}", section)


def _statements(section: str) -> str:
    section = re.sub(r"\$=[^$]*\$\.", "$.", section)
    section = PARENTHESES.sub("", section)
    section = re.sub(r"^[ \t]*\$\( (?:End|Begin) \$\[.*?\$\)\n", "", section, flags=re.M)
    section = re.sub(r"^\s*\$d[^$]*\$\.\s*$", "", section, flags=re.M)
    section = re.sub(r"\s+\$d [^$]*\$\.", "", section)
    section = re.sub(r"\s*\$\(\s*\$\)", "", section)
    section = re.sub(r"[#*=.-]{40,}\n?", "", section)
    section = re.sub(r"^[ ]{2}", "", section, flags=re.M)
    section = re.sub(r"\n\n+(?=\s*\$\})", "\n", section)
    section = re.sub(r"(?<=\$\{)\n+", "\n", section)
    return tidy(re.sub(r"\n[ \t]+\n", "\n\n", section))


def proofs(archives: Archives) -> Iterator[SourceDocument]:
    """Yield proof scripts: HOL Light's libraries, Agda's and Coq's standard libraries."""
    wanted = {
        "hol-light": r"hol-light/(?:100|Library|Multivariate|Examples|Complex|Arithmetic|Logic)/[^/]*\.ml$",
        "agda-stdlib": r"agda-stdlib/(?!.*Primitive|.*Everything).*\.agda$",
        "libcoq-stdlib": r"coq/theories/(?!Floats|ssr|Numbers/Cyclic/Int63).*\.v$",
    }
    for package, archive in archives.items():
        for path, content in files(archive, wanted[package]):
            text = tidy(content.decode("utf-8", errors="replace"))
            text = _without_credits(text)
            text = re.sub(r"^-- The Agda standard library\n--\n", "", text, flags=re.M)
            text = re.sub(r"^-{60,}\n", "", text, flags=re.M)
            text = re.sub(r"^\(\*\s*[=*-]{40,}\s*\*\)\n", "", text, flags=re.M)
            text = re.sub(r"^(\(\* .*?)\s{2,}\*\)$", r"\1 *)", text, flags=re.M)
            text = re.sub(r"^\(\*\s+\*\)\n", "", text, flags=re.M)
            if len(text) >= 1500 and max(map(len, text.splitlines())) < 300:
                yield document(f"{package}/{path}", text, r"\n\n+(?=\S)")


def _without_credits(text: str) -> str:
    header = r"\A(?:\(\* -\*-[^\n]*\n)?\(\*{20,}\)\n.*?LICENSE file.*?\n\(\*{20,}\)\n"
    text = re.sub(header, "", text, flags=re.S)
    lines = without_licence_header(text).split("\n")
    credit = re.compile(r"copyright|\(c\)|university of|INRIA|licen[sc]e", re.I)
    head = [line for line in lines[:14] if not credit.search(line)]
    return "\n".join(head + lines[14:]).strip("\n")
