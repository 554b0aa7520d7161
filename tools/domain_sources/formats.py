"""Readers of file formats: dictd, R's lazy-load database, SWORD text, gettext, Linux manual pages."""

import gzip
import re
import struct
import zlib

STRSXP = re.compile(rb"\0\0[\0-\3]\x10(?=.{4})", re.S)
B64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def dictd_entries(index: bytes, dictzip: bytes) -> list[tuple[str, str]]:
    """Return (headword, text) of a dictd dictionary, in the file's order, each text once."""
    text = gzip.decompress(dictzip)
    spans: dict[tuple[int, int], str] = {}
    for line in index.decode("utf-8").splitlines():
        headword, start, length = line.split("\t")[:3]
        if not headword.startswith("00"):
            spans.setdefault((_base64(start), _base64(length)), headword)
    return [
        (spans[start, length], text[start : start + length].decode("utf-8", errors="replace"))
        for start, length in sorted(spans)
    ]


def _base64(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + B64[digit]
    return value


def rdb_strings(rdb: bytes) -> list[list[str]]:
    """Return every character vector of an R lazy-load database (`Rdata.rdb`), without running R."""
    vectors: list[list[str]] = []
    position = 0
    while position + 5 < len(rdb):
        (size,) = struct.unpack_from(">I", rdb, position)
        try:
            data, used = _inflate(rdb[position + 4 :])
        except zlib.error:
            position += 1
            continue
        if len(data) == size:
            vectors += _character_vectors(data)
        position += 4 + used
    return vectors


def _inflate(data: bytes) -> tuple[bytes, int]:
    inflater = zlib.decompressobj()
    out = inflater.decompress(data)
    return out, len(data) - len(inflater.unused_data)


def _character_vectors(data: bytes) -> list[list[str]]:
    """Find STRSXP records (flag word ending in 0x10) in R's XDR serialisation and read them."""
    vectors, position = [], 0
    while match := STRSXP.search(data, position):
        position = match.start()
        (count,) = struct.unpack_from(">i", data, position + 4)
        strings, after = _strings(data, position + 8, count)
        if strings is not None and sum(map(len, strings)) > 50_000:
            vectors.append(strings)
            position = after
        else:
            position += 1
    return vectors


def _strings(data: bytes, position: int, count: int) -> tuple[list[str] | None, int]:
    strings = []
    for _ in range(count):
        if position + 8 > len(data) or data[position + 3] != 9:  # CHARSXP
            return None, position
        (length,) = struct.unpack_from(">i", data, position + 4)
        position += 8
        strings.append(data[position : position + max(length, 0)].decode("utf-8", errors="replace"))
        position += max(length, 0)
    return strings, position


def sword_blocks(index: bytes, text: bytes) -> list[str]:
    """Return the blocks of a SWORD zText module (`.bzs` and `.bzz`): one a book."""
    blocks = []
    for start, size, _ in struct.iter_unpack("<III", index):
        blocks.append(zlib.decompress(text[start : start + size]).decode("utf-8", errors="replace"))
    return blocks


def gettext_catalogue(mo: bytes) -> dict[str, str]:
    """Return a gettext `.mo` file as a dict from message to translation."""
    count, originals, translations = struct.unpack_from("<III", mo, 8)
    messages = {}
    for i in range(count):
        pair = []
        for table in (originals, translations):
            length, start = struct.unpack_from("<II", mo, table + 8 * i)
            pair.append(mo[start : start + length].decode("utf-8").split("\0")[0])
        messages[pair[0].split("\x04")[-1]] = pair[1]
    return messages


MAN_ESCAPES = [
    (r"\\f(?:\([A-Z]{2}|\[[A-Z]*\]|.)", ""),
    (r"\\s[+-]?\d", ""),
    (r"\\\((?:aq|cq|oq)", "'"),
    (r"\\\((?:dq|lq|rq)", '"'),
    (r"\\\((?:bu)", "*"),
    (r"\\\((?:em)", "--"),
    (r"\\\((?:en|mi)", "-"),
    (r"\\\((?:co)", "(c)"),
    (r"\\\((?:ha)", "^"),
    (r"\\\((?:ti)", "~"),
    (r"\\\((?:rs)", r"\\"),
    (r"\\\((?:->)", "->"),
    (r"\\\((?:<=)", "<="),
    (r"\\\((?:>=)", ">="),
    (r"\\\((?:mu)", "x"),
    (r"\\\((?:pl)", "+"),
    (r"\\\((?:12)", "1/2"),
    (r"\\\[u([0-9A-F]{4})\]", None),
    (r"\\\[[^\]]*\]", ""),
    (r"\\(?:&|\||\^|,|/|:|%|c|\))", ""),
    (r"\\[ ~0]", " "),
    (r"\\-", "-"),
    (r"\\\*\(..|\\\*.", ""),
    (r"\\[uhvw]'[^']*'", ""),
    (r"\\e", r"\\"),
    (r"\\'", "'"),
    (r"\\`", "`"),
]


def man_text(troff: str) -> str:
    """Return a manual page written in the man(7) macros as plain text; tables are left out."""
    troff = re.sub(r"^\.TS\b.*?^\.TE\b[^\n]*\n", "", troff, flags=re.M | re.S)
    paragraphs: list[str] = []
    line: list[str] = []
    literal = tag = False

    def end(text: str = "") -> None:
        if line:
            paragraphs.append(("\n" if literal else " ").join(line))
            line.clear()
        if text:
            paragraphs.append(text)

    for raw in troff.replace("\\\n", "").split("\n"):
        if raw.startswith(('.\\"', "'\\\"", ".\\#")) or raw in (".", "'"):
            continue
        name, _, rest = raw[1:].partition(" ") if raw[:1] in (".", "'") else ("", "", raw)
        rest = re.sub(r'\s*\\".*$', "", rest)
        if not name:
            if literal:
                line.append("    " + _unescape(raw))
            elif raw.strip():
                line.append(_unescape(raw.strip()))
            else:
                end()
        elif name in ("EX", "nf"):
            end()
            literal = True
        elif name in ("EE", "fi"):
            end()
            literal = False
        elif name in ("SH", "SS"):
            end()
            literal = False
            end(_unescape(rest.strip('" ')))
        elif name in ("PP", "P", "LP", "TP", "TQ", "IP", "HP", "RS", "RE", "br", "sp"):
            end()
            tag = name in ("TP", "TQ")
            if name == "IP":
                mark = _words(rest)[:1]
                line += [_unescape(word) for word in mark]
        elif name in ("B", "I", "SM", "SB", "R"):
            line.append(_unescape(" ".join(_words(rest))))
        elif name in ("BR", "RB", "IR", "RI", "BI", "IB"):
            line.append(_unescape("".join(_words(rest))))
        if tag and line and not literal:
            line[-1] += "\n   "
            tag = False
    end()
    return "\n\n".join(paragraph.rstrip() for paragraph in paragraphs if paragraph.strip())


def _words(rest: str) -> list[str]:
    found = re.findall(r'"((?:[^"]|"")*)"|((?:\\ |\S)+)', rest)
    return [quoted.replace('""', '"') or plain for quoted, plain in found]


def _unescape(text: str) -> str:
    for pattern, plain in MAN_ESCAPES:
        replacement = (lambda match: chr(int(match[1], 16))) if plain is None else plain
        text = re.sub(pattern, replacement, text)
    return text
