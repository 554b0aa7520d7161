"""`dialogue`: conversations of two free games, Battle for Wesnoth and Endless Sky."""

import re
from collections import Counter
from collections.abc import Iterator

from domain_sources.model import SourceDocument
from domain_sources.readers.common import Archives, document, files
from domain_sources.readers.wml import campaign_documents

MOST_REPEATS = 2
CAPTAIN = re.compile(r"(?:Captain )?(?:<first> )?<last>")


def wesnoth(archives: Archives) -> Iterator[SourceDocument]:
    """Yield Wesnoth's campaign scenarios in English."""
    yield from campaign_documents(archives, None)


def endless_sky(archives: Archives) -> Iterator[SourceDocument]:
    """Yield Endless Sky's missions; the missions of one numbered series are one source document."""
    stories: dict[str, list[list[str]]] = {}
    for path, content in files(archives["endless-sky-data"], r"data/.*\.txt$"):
        stem = path.rsplit("/", 1)[-1].removesuffix(".txt")
        for mission in re.split(r"^(?=mission )", content.decode("utf-8"), flags=re.M):
            if match := re.match(r'mission ["`]([^"`]+)["`]', mission):
                series = re.sub(r"[ -]*(?:\d+\w?|[A-D])$", "", match[1]).split(":")[0]
                stories.setdefault(f"{stem}/{series}", []).append(_conversation(mission))
    heard = Counter(line for missions in stories.values() for lines in missions for line in set(lines))
    for name, missions in stories.items():
        told = [[line for line in lines if heard[line] <= MOST_REPEATS] for lines in missions]
        text = "\n\n".join(line for lines in told if sum(map(len, lines)) > 500 for line in lines)
        if len(text) > 900:
            yield document(f"endless-sky-data/{name}", text)


def _conversation(mission: str) -> list[str]:
    """Return what is told and said in a mission; choices start with `>`.

    Lines that still have blanks to fill (`<planet>`) after the captain's name are left out.
    """
    lines: list[str] = []
    choice_depth = -1
    for raw in mission.split("\n"):
        depth = len(raw) - len(raw.lstrip("\t"))
        text = raw.strip()
        if text.startswith("#") or not text:
            continue
        if depth <= choice_depth:
            choice_depth = -1
        if text == "choice":
            choice_depth = depth
        elif match := re.match(r"`(.*)`$|dialog [`\"](.*)[`\"]$", text):
            said = CAPTAIN.sub("Captain", (match[1] or match[2] or "").strip())
            if said and not re.search(r"<\w", said):
                lines.append(f"> {said}" if choice_depth >= 0 else said)
    return list(dict.fromkeys(lines))
