"""The texts of Battle for Wesnoth campaigns, in the order of the story, in any of its languages."""

import re
from collections.abc import Iterator
from html import unescape

from domain_sources.clean import tidy
from domain_sources.formats import gettext_catalogue
from domain_sources.model import SourceDocument
from domain_sources.readers.common import Archives, document, files

STRING = r'_ ?"((?:[^"]|"")*)"'
TOKEN = re.compile(
    rf"^\s*\[(?P<tag>/?\+?\w+)\]|^\s*(?P<key>speaker|id|role)\s*=\s*(?P<plain>[^\n]*)"
    rf"|^\s*(?P<text>message|story|name|title)\s*=\s*(?P<value>{STRING}(?:\s*\+\s*{STRING})*)",
    re.M,
)
NOBODY = frozenset(("narrator", "unit", "second_unit", "", "$unit.id"))


def campaign_documents(archives: Archives, language: str | None) -> Iterator[SourceDocument]:
    """Yield one document a scenario: its title, story and dialogue, translated if `language` is set."""
    for package, archive in archives.items():
        catalogue: dict[str, str] = {}
        scenarios: list[tuple[str, str]] = []
        locale = rf"|locale/{language}/LC_MESSAGES/.*\.mo$" if language else ""
        for path, content in files(archive, rf"/scenarios/.*\.cfg$|/_main\.cfg$|/utils/.*\.cfg${locale}"):
            if path.endswith(".mo"):
                catalogue |= gettext_catalogue(content)
            else:
                scenarios.append((path.rsplit("/", 1)[-1], content.decode("utf-8")))
        for name, wml in scenarios:
            lines = list(story_lines(wml, catalogue if language else None))
            if len(lines) >= 8:
                yield document(f"{package}/{name}", "\n\n".join(lines))


def story_lines(wml: str, catalogue: dict[str, str] | None) -> Iterator[str]:
    """Yield `Speaker: text` for messages and plain paragraphs for the story, in file order.

    With a catalogue, a line that it does not translate is left out.
    """
    wml = re.sub(r"^\s*#(?!textdomain).*$", "", wml, flags=re.M)
    stack: list[str] = []
    speaker = ""
    said: set[str] = set()
    for token in TOKEN.finditer(wml):
        if token["tag"]:
            stack = _moved(stack, token["tag"])
            speaker = "" if token["tag"] == "message" else speaker
        elif token["key"]:
            if stack[-1:] == ["message"]:
                speaker = token["plain"].strip().strip('"').removeprefix("_ ").strip('"')
        elif text := _wanted(stack, token["text"], token["value"], catalogue):
            line = f"{_name(speaker, catalogue)}{text}" if token["text"] == "message" else text
            if line not in said:
                said.add(line)
                yield line


def _moved(stack: list[str], tag: str) -> list[str]:
    if tag.startswith("/"):
        return stack[: -1 - stack[::-1].index(tag[1:])] if tag[1:] in stack else stack
    return [*stack, tag.lstrip("+")]


def _wanted(stack: list[str], key: str, value: str, catalogue: dict[str, str] | None) -> str:
    """Return the text of an attribute that belongs to the story, else nothing."""
    inside = stack[-1] if stack else ""
    if not (
        (key == "message" and inside == "message")
        or (key == "story" and inside == "part")
        or (key == "name" and inside == "scenario")
    ):
        return ""
    strings = [match.replace('""', '"') for match in re.findall(STRING, value)]
    if catalogue is not None:
        strings = [catalogue.get(string, "") for string in strings]
    text = re.sub(r"</?\w[^>\n]*>", "", "".join(strings))
    return " ".join(unescape(tidy(re.sub(r"\$[\w.|\[\]]+", "…", text))).split())


def _name(speaker: str, catalogue: dict[str, str] | None) -> str:
    if speaker in NOBODY or "$" in speaker or "," in speaker or "{" in speaker:
        return "— " if speaker in ("unit", "second_unit") else ""
    plain = speaker.replace("_", " ")
    return f"{(catalogue or {}).get(plain) or plain}: "
