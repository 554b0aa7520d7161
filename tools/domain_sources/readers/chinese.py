"""`chinese`: classical prose and verse, game stories and Debian's books in Chinese."""

import json
import re
from collections.abc import Iterator

from domain_sources.clean import is_mostly_chinese
from domain_sources.model import SourceDocument
from domain_sources.readers.common import (
    Archives,
    debian_reference,
    document,
    files,
    handbook,
)
from domain_sources.readers.wml import campaign_documents

NOTE = re.compile(r"[（(][^()（）]{1,20}(?:一作|通|同)[:： ][^()（）]{1,12}[)）]")
CLASSICS = (
    r"dist/(?:mengxue/(?:guwenguanzhi|youxueqionglin|zengguangxianwen|zhuzijiaxun|tangshisanbaishou)"
    r"|sishuwujing/\w+|lunyu/lunyu|youmengying/youmengying|chuci/chuci|shijing/shijing)\.json$"
)


def classics(archives: Archives) -> Iterator[SourceDocument]:
    """Yield chapters of classical works; short poems and sayings are grouped ten to a document."""
    for path, content in files(archives["chinese-poetry"], CLASSICS):
        book = path.rsplit("/", 1)[-1].removesuffix(".json")
        short: list[str] = []
        for number, (title, text) in enumerate(_chapters(json.loads(content))):
            if len(text) > 600:
                yield document(f"chinese-poetry/{book}/{number}-{title}", f"{title}\n\n{text}", most=6000)
            else:
                short.append(f"{title}\n\n{text}".strip())
        for start in range(0, len(short), 10):
            yield document(f"chinese-poetry/{book}/short-{start}", "\n\n".join(short[start : start + 10]))


def _chapters(tree: object) -> Iterator[tuple[str, str]]:
    """Walk a work's JSON and yield (title, text) of every node that holds text."""
    if isinstance(tree, list):
        for node in tree:
            yield from _chapters(node)
    elif isinstance(tree, dict):
        title = str(tree.get("title") or tree.get("chapter") or "")
        body = tree.get("paragraphs") or tree.get("content")
        if isinstance(body, list) and all(isinstance(line, str) for line in body):
            between = "\n\n" if max(map(len, body), default=0) > 40 else "\n"
            author = str(tree.get("author") or "").strip()
            yield title, (f"{author}\n\n" if author else "") + NOTE.sub("", between.join(body))
        elif isinstance(body, str):
            yield title, "\n".join([body, *tree.get("comment", [])])
        elif body:
            yield from _chapters(body)


def wesnoth(archives: Archives) -> Iterator[SourceDocument]:
    """Yield Wesnoth's campaign scenarios in Chinese."""
    for source in campaign_documents(archives, "zh_CN"):
        if is_mostly_chinese("".join(source.pieces)):
            yield source


def debian_books(archives: Archives) -> Iterator[SourceDocument]:
    """Yield the translated pages of Debian's handbook and reference."""
    yield from handbook(archives["debian-handbook"], "zh-CN", _is_chinese)
    yield from debian_reference(archives["debian-reference-zh-cn"], "zh-cn", _is_chinese)


def _is_chinese(paragraph: str) -> bool:
    return is_mostly_chinese(re.sub(r"[A-Za-z./_-]{3,}", "x", paragraph))
