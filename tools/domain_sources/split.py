"""Cut source documents, choose their side, drop duplicates and sample to a size.

The side is a hash of the source document's name, so every piece of it lands on the same side. Held-out
is chosen first; a train document that shares more than `OVERLAP_LIMIT` of its shingles with the whole
held-out text is dropped. Order and sample come from blake2b: the same packages give the same shards.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from domain_sources.model import Document, SourceDocument, slug

HELD_OUT_PER_MILLE = 235
OVERLAP_LIMIT = 0.2
SAME_SIDE_LIMIT = 0.5
WORDS_IN_SHINGLE = 13
CHARACTERS_IN_SHINGLE = 20
FEWEST_BYTES = 500


def digest(*parts: str) -> int:
    """Return a 64-bit hash of strings that is the same on every machine and in every run."""
    joined = "\0".join(parts).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def side_of(domain: str, source: str) -> str:
    """Return `held_out` for about 23.5 % of the source documents' names, else `train`."""
    return "held_out" if digest("side", domain, source) % 1000 < HELD_OUT_PER_MILLE else "train"


def cut(text: str, most: int, boundary: str = r"\n\n+") -> list[str]:
    """Return `text` in pieces of at most about `most` bytes, cut where `boundary` matches.

    A piece over twice that long is cut at any blank line. A last piece under a quarter of `most` joins
    the one before.
    """
    pieces = []
    for piece in _packed(_spans(text, boundary), most):
        too_long = len(piece.encode()) > 2 * most
        pieces += _packed(_spans(piece, r"\n\n+"), most) if too_long else [piece]
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _spans(text: str, boundary: str) -> list[str]:
    ends = [0, *(match.end() for match in re.finditer(boundary, text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _packed(spans: list[str], most: int) -> list[str]:
    pieces: list[str] = []
    for span in spans:
        if pieces and len((pieces[-1] + span).encode()) <= most:
            pieces[-1] += span
        else:
            pieces.append(span)
    if len(pieces) > 1 and len(pieces[-1].encode()) < most // 4:
        last = pieces.pop()
        pieces[-1] += last
    return pieces


def shingles(text: str, unit: str) -> set[int]:
    """Return hashes of all runs of 13 words (`words`) or 20 characters (`characters`)."""
    if unit == "words":
        items: list[str] | str = re.findall(r"\w+", text.lower())
        size, glue = WORDS_IN_SHINGLE, " "
    else:
        items, size, glue = re.sub(r"[\W_]+", "", text), CHARACTERS_IN_SHINGLE, ""
    return {digest(glue.join(items[i : i + size])) for i in range(len(items) - size + 1)}


def fingerprint(text: str) -> int:
    """Return a hash that ignores white space: equal for exact duplicates."""
    return digest("".join(text.split()))


def tar_bytes(text: str) -> int:
    """Return how many bytes a document takes in a tar: one header and padding to 512."""
    return 512 + -(-len(text.encode("utf-8")) // 512) * 512


def documents_of(domain: str, source: SourceDocument, most_bytes: int) -> list[Document]:
    """Return consecutive pieces of a source document, up to `most_bytes` from a hashed start."""
    stem = slug(source.name) or f"{digest(source.name):016x}"
    pieces = [(i, text) for i, text in enumerate(source.pieces) if len(text.encode()) >= FEWEST_BYTES]
    total = sum(len(text.encode()) for _, text in pieces)
    if total > most_bytes:
        start = digest("start", domain, source.name) % len(pieces)
        pieces = pieces[start:] + pieces[:start]
    taken, size = [], 0
    for i, text in pieces:
        if taken and size + len(text.encode()) > most_bytes:
            break
        taken.append(Document(f"{stem}-{i:03d}", source.name, text))
        size += len(text.encode())
    return taken


class Sampler:
    """Fills both sides of one domain, part by part, without duplicates."""

    def __init__(self, domain: str, shingle: str) -> None:
        """Start empty; `shingle` is the unit of the near-duplicate test."""
        self.domain, self.shingle = domain, shingle
        self.sides: dict[str, list[Document]] = {"train": [], "held_out": []}
        self.dropped: dict[str, int] = defaultdict(int)
        self._exact: set[int] = set()
        self._keys: set[str] = set()
        self._shingles: dict[str, set[int]] = {"train": set(), "held_out": set()}

    def fill(self, side: str, sources: Iterable[SourceDocument], most: int, budget: int) -> int:
        """Add documents of one part to one side up to `budget` tar bytes; return the bytes added."""
        mine = [source for source in sources if side_of(self.domain, source.name) == side]
        mine.sort(key=lambda source: digest("order", self.domain, source.name))
        used = 0
        for document in self._fresh(side, mine, most):
            if used + tar_bytes(document.text) > budget:
                if budget - used < budget // 50:
                    break
                continue
            self._accept(side, document)
            used += tar_bytes(document.text)
        return used

    def _fresh(self, side: str, sources: list[SourceDocument], most: int) -> Iterator[Document]:
        for source in sources:
            for document in documents_of(self.domain, source, most):
                reason = self._reason_to_drop(side, document)
                if reason:
                    self.dropped[reason] += 1
                else:
                    yield document

    def _reason_to_drop(self, side: str, document: Document) -> str:
        if fingerprint(document.text) in self._exact:
            return "exact duplicate"
        own = shingles(document.text, self.shingle)
        if side == "train" and own and len(own & self._shingles["held_out"]) > OVERLAP_LIMIT * len(own):
            return "near duplicate of held-out"
        if own and len(own & self._shingles[side]) > SAME_SIDE_LIMIT * len(own):
            return "near duplicate"
        return ""

    def _accept(self, side: str, document: Document) -> None:
        key = document.key
        if key in self._keys:
            key = f"{key}-{digest(document.source) % 16**6:06x}"
        number = 2
        while key in self._keys:  # one key in a shard is one sample
            key, number = f"{document.key}-{digest(document.source) % 16**6:06x}-{number}", number + 1
        self._keys.add(key)
        self._exact.add(fingerprint(document.text))
        self._shingles[side] |= shingles(document.text, self.shingle)
        self.sides[side].append(Document(key, document.source, document.text))

    def shuffled(self, side: str) -> list[Document]:
        """Return one side in the order in which it is written: by hash of the keys."""
        return sorted(self.sides[side], key=lambda document: digest("shuffle", document.key))
