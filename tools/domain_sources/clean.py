"""Turn markup into running text: white space, HTML, reStructuredText, licence headers."""

import re
import unicodedata
from html.parser import HTMLParser

CJK = re.compile(r"[\u4e00-\u9fff]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\u00ad]")
BLOCKS = frozenset(
    [
        "p",
        "div",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "dt",
        "dd",
        "pre",
        "blockquote",
        "section",
        "article",
        "title",
        "ul",
        "ol",
        "dl",
        "tr",
        "br",
    ]
)
SKIPPED = frozenset(["table", "script", "style", "head", "nav", "footer", "svg", "button", "form"])
SKIPPED_CLASSES = frozenset(
    [
        "toc",
        "navheader",
        "navfooter",
        "docnav",
        "titlepage-nav",
        "footnotes",
        "list-of-tables",
        "indexterm",
        "mediaobject",
        "legalnotice",
        "authorgroup",
        "copyright",
        "footnote",
    ]
)
VOID = frozenset(["br", "img", "hr", "meta", "link", "input", "col", "area", "base", "wbr"])


def tidy(text: str, blank_lines: int = 1) -> str:
    """Return NFC text with Unix line ends, no control characters, at most `blank_lines` in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = CONTROL.sub("", text.replace("\f", "\n").replace("\u00a0", " "))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(rf"\n{{{blank_lines + 2},}}", "\n" * (blank_lines + 1), text).strip("\n")


class _TextOfHtml(HTMLParser):
    """Collects text: blocks end a paragraph, `pre` keeps its lines, tables and navigation go."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool]] = []
        self._line: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end_block()
        if tag in VOID:
            return
        classes = set((dict(attrs).get("class") or "").split())
        identity = dict(attrs).get("id")
        skip = tag in SKIPPED or bool(classes & SKIPPED_CLASSES) or identity in ("banner", "title")
        self._open.append((tag, skip))
        if tag == "li" and not any(hidden for _, hidden in self._open):
            self._line.append("- ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end_block()

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._end_block()
        while any(name == tag for name, _ in self._open):
            if self._open.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        if not any(skip for _, skip in self._open):
            self._line.append(data)

    def _end_block(self) -> None:
        text = "".join(self._line)
        if any(name == "pre" for name, _ in self._open):
            text = "\n".join("    " + line for line in text.strip("\n").split("\n"))
        else:
            text = " ".join(text.split())
        if text.strip() and text.strip() != "-":
            self.paragraphs.append(text)
        self._line = ["- "] if text == "-" and any(name == "li" for name, _ in self._open) else []


def html_paragraphs(html: str) -> list[str]:
    """Return the text of an HTML page, one string a block; tables, heads and navigation are left out."""
    parser = _TextOfHtml()
    parser.feed(html)
    parser.close()
    parser._end_block()
    return parser.paragraphs


def rst_text(rst: str) -> str:
    """Return reStructuredText with its prose and code kept, roles, labels and directives plain."""
    rst = re.sub(r"^\.\. (?:\||cmake-manual-description)[^\n]*\n", "", rst, flags=re.M)
    rst = re.sub(r"^[ ]*\.\. _[^\n]*:[^\n]*\n", "", rst, flags=re.M)
    options = r"(?:[ ]+:[\w-]+:[^\n]*\n)*"
    dropped = r"index|contents|toctree|include|image|figure|only|raw|meta"
    rst = re.sub(rf"^([ ]*)\.\. (?:{dropped})::[^\n]*\n(?:\1[ ]+[^\n]*\n|[ ]*\n)*", "\n", rst, flags=re.M)
    rst = re.sub(
        rf"^[ ]*\.\. (?:currentmodule|module|highlight|role|default-role)::.*\n{options}",
        "",
        rst,
        flags=re.M,
    )
    rst = re.sub(r"^[ ]*\.\. auto\w+::.*\n(?:[ ]+.*\n|[ ]*\n)*", "\n", rst, flags=re.M)
    rst = re.sub(
        rf"^([ ]*)\.\. (?:code-block|sourcecode|code|parsed-literal)::.*\n{options}",
        r"\1\n",
        rst,
        flags=re.M,
    )
    rst = re.sub(
        r"^([ ]*)\.\. (note|warning|tip|seealso|caution|versionadded|versionchanged|deprecated)::[ ]*",
        lambda m: f"{m[1]}{m[2].capitalize()}: ",
        rst,
        flags=re.M,
    )
    rst = re.sub(r":[\w:.+-]+:`!?~?([^`<]+?)\s*<[^`>]+>`", r"\1", rst)
    rst = re.sub(r":[\w:.+-]+:`[~!.]*(?:_\w+\.)?([^`]+)`", r"``\1``", rst)
    rst = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", rst)
    rst = re.sub(r"\\ ", "", rst)
    return tidy(rst)


def without_licence_header(code: str) -> str:
    """Return code without its leading comment blocks that speak of copyright or a licence."""
    block = re.compile(r"\s*(/\*.*?\*/|(?:(?://|#(?!!|\[|include|if|define))[^\n]*\n)+|\(\*.*?\*\))", re.S)
    while (match := block.match(code)) and re.search(r"copyright|licen[sc]e|SPDX", match[1], re.I):
        code = code[match.end() :]
    return code.lstrip("\n")


def is_mostly_chinese(text: str) -> bool:
    """Return whether at least a quarter of the letters are Chinese characters."""
    letters = sum(character.isalpha() for character in text)
    return letters > 0 and len(CJK.findall(text)) >= letters / 4


FRENCH = frozenset(
    [
        "le",
        "la",
        "les",
        "des",
        "du",
        "un",
        "une",
        "et",
        "est",
        "que",
        "qui",
        "dans",
        "pour",
        "par",
        "sur",
        "avec",
        "pas",
        "ce",
        "cette",
        "ou",
        "au",
        "aux",
        "il",
    ]
)
ENGLISH = frozenset(
    [
        "the",
        "of",
        "and",
        "to",
        "is",
        "that",
        "in",
        "for",
        "it",
        "this",
        "with",
        "are",
        "be",
        "as",
        "by",
        "on",
        "an",
        "or",
        "from",
        "you",
        "not",
    ]
)


def is_french(text: str) -> bool:
    """Return whether a paragraph has at least as many common French words as English ones."""
    words = re.findall(r"[a-zà-ÿ]+", text.lower())
    return sum(word in FRENCH for word in words) >= sum(word in ENGLISH for word in words)
