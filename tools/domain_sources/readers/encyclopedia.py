"""`encyclopedia`: entries of English dictionaries and encyclopaedias in dictd format."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

from domain_sources.clean import tidy
from domain_sources.formats import dictd_entries
from domain_sources.model import SourceDocument
from domain_sources.readers.common import Archives, document, files

GCIDE_SOURCE = re.compile(
    r"\s*\[(?:1913 Webster(?: \+PJC)?|\+?PJC|WordNet 1\.5|Webster (?:\d+ )?Suppl\."
    r"|Century Dict\. 1906|RP|AS|GG|CoE)\]"
)
GCIDE_LETTERS = dict(
    zip(
        "[aum] [oum] [uum] [eum] [ium] [amac] [emac] [imac] [omac] [umac] [ae] [deg] [root]".split(),  # noqa: SIM905
        "äöüëïāēīōūæ°√",
        strict=True,
    )
)


def _gcide(text: str) -> str:
    text = GCIDE_SOURCE.sub("", text)
    text = re.sub(r" ?\\[^\\\n]*(?:\n[^\\\n]*)?\\", "", text)
    for mark, letter in GCIDE_LETTERS.items():
        text = text.replace(mark, letter)
    return _plain(text)


def _foldoc(text: str) -> str:
    text = re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*(?=\n|$)", "\n", text)
    text = re.sub(r"\s*\[?\{\((?:http|ftp|news|mailto)[^)]*\)\}\.?\]?", "", text)
    return text.replace("{", "").replace("}", "")


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "")


def _wordnet(text: str) -> str:
    text = re.sub(r"\s*\[(?:syn|ant|also):[^\]]*\]", "", text)
    return _plain(text)


# dictionary: (cleaner, letters of the headword that name a source document, shortest entry)
DICTIONARIES: dict[str, tuple[Callable[[str], str], int, int]] = {
    "gcide": (_gcide, 3, 160),
    "foldoc": (_foldoc, 2, 220),
    "jargon": (_plain, 2, 120),
    "wn": (_wordnet, 4, 100),
    "elements": (_plain, 2, 200),
    "devil": (_plain, 2, 100),
}


def dictionaries(archives: Archives) -> Iterator[SourceDocument]:
    """Yield ranges of entries; all entries whose headword starts alike are one source document."""
    for package, archive in archives.items():
        name = package.removeprefix("dict-")
        clean, letters, shortest = DICTIONARIES[name]
        parts = dict(files(archive, rf"dictd/{name}\.(?:index|dict\.dz)$"))
        index = next(content for path, content in parts.items() if path.endswith("index"))
        dictzip = next(content for path, content in parts.items() if path.endswith("dz"))
        for start, entries in groupby(dictd_entries(index, dictzip), partial(_stem, letters)):
            texts = [tidy(clean(text)) for headword, text in entries if headword[:1].isalpha()]
            texts = [text for text in texts if len(text) >= shortest and "\ufffd" not in text]
            if start and sum(map(len, texts)) > 700:
                entry_start = r"\n\n+(?=\S)" if name != "devil" else r"\n\n+"
                yield document(f"{package}/{start}", "\n\n".join(texts), entry_start, most=6000)


def _stem(letters: int, entry: tuple[str, str]) -> str:
    headword = entry[0]
    return re.sub(r"[^a-z]", "", headword.lower())[:letters]
