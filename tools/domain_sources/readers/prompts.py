"""Readers of questions with the answers that people gave them: FAQs, a quiz, code with what it is to do."""

import json
import re
from collections.abc import Iterator

import yaml

from domain_sources.clean import rst_text, tidy
from domain_sources.model import Pair
from domain_sources.readers.common import Archives, files

POD_CODES = re.compile(r"[BCFILSXZ]<(?!<)([^<>]*)>|[BCFILSXZ]<<+ (.*?) >>+", re.S)
POD_CHARACTERS = {"E<lt>": "<", "E<gt>": ">", "E<sol>": "/", "E<verbar>": "|", "E<eacute>": "é"}
CONVERSATIONS = (
    "computers", "conversations", "food", "greetings", "health", "history", "literature", "money", "movies",
    "science", "sports", "trivia",
)  # fmt: skip
"""Left out: what a bot says of itself and its feelings, politics, gossip, jokes, and what looks generated."""


def perl_faq(archives: Archives) -> Iterator[Pair]:
    """Yield the questions of perlfaq1 to perlfaq9."""
    for package, archive in archives.items():
        for path, content in sorted(files(archive, r"/perlfaq[1-9]\.pod$")):
            text = content.decode("utf-8", errors="replace")
            for number, part in enumerate(re.split(r"^=head2 ", text, flags=re.M)[1:]):
                question, _, answer = part.partition("\n")
                answer = re.split(r"^=head1 ", answer, flags=re.M)[0]
                name = f"{package}/{path.rsplit('/', 1)[-1]}/{number}"
                yield Pair(name, " ".join(pod_text(question).split()), pod_text(answer))


def pod_text(pod: str) -> str:
    """Return Perl's documentation format as plain text; code stays as it is, indented."""
    paragraphs = []
    for paragraph in re.split(r"\n[ \t]*\n", pod):
        item = re.match(r"=item\s+(.*)", paragraph, re.S)
        if item:
            text = item[1].strip().lstrip("*").strip()
            paragraphs.append(f"- {_plain(text)}" if text else "")
        elif not paragraph.startswith("="):
            code = paragraph.strip("\n").startswith((" ", "\t"))
            paragraphs.append(paragraph.strip("\n") if code else _plain(paragraph))
    return tidy("\n\n".join(one for one in paragraphs if one.strip()))


def _plain(text: str) -> str:
    for code, character in POD_CHARACTERS.items():
        text = text.replace(code, "\0" if character == "<" else "\1" if character == ">" else character)
    while POD_CODES.search(text):  # codes may stand in codes
        text = POD_CODES.sub(_shown, text)
    return text.replace("\0", "<").replace("\1", ">").strip()


def _shown(match: re.Match[str]) -> str:
    inner = match[1] if match[1] is not None else match[2]
    if match[0][0] in "XZ":
        return ""
    if match[0][0] != "L":
        return inner
    shown, bar, _ = inner.partition("|")
    return shown if bar else re.sub(r'/"?([^"]*)"?$', r" (\1)", inner) if ":/" not in inner else inner


def python_faq(archives: Archives) -> Iterator[Pair]:
    """Yield the questions of the Python FAQs: titles that end in a question mark."""
    title = re.compile(r"^(?=\S)([^\n]+)\n([=\-~^\"'*]{4,})\n", re.M)
    for package, archive in archives.items():
        for path, content in sorted(files(archive, r"/_sources/faq/(?!index)[^/]*\.rst\.txt$")):
            parts = title.split(content.decode("utf-8"))
            for number, (question, _, answer) in enumerate(zip(*[iter(parts[1:])] * 3, strict=True)):
                if question.rstrip().endswith("?"):
                    page = path.rsplit("/", 1)[-1].removesuffix(".rst.txt")
                    yield Pair(f"{package}/{page}/{number}", rst_text(question), rst_text(answer))


def snippets(archives: Archives) -> Iterator[Pair]:
    """Yield functions by what they are to do; the description is the authors', the first line is ours."""
    for package, archive in archives.items():
        for _, content in files(archive, r"vscode_snippets/snippets\.json$"):
            for name, snippet in json.loads(content).items():
                code = "\n".join(snippet["body"]).replace("\\$", "$")
                task = f"Write the JavaScript function `{name}`.\n\n{snippet['description'].strip()}"
                yield Pair(f"{package}/{name}", task if task.endswith(".") else f"{task}.", tidy(code))


def conversations(archives: Archives) -> Iterator[Pair]:
    """Yield what is said first in each conversation, with the first answer to it."""
    for package, archive in archives.items():
        for path, content in sorted(files(archive, r"/data/english/[a-z_]+\.yml$")):
            topic = path.rsplit("/", 1)[-1].removesuffix(".yml")
            if topic not in CONVERSATIONS:
                continue
            for number, turns in enumerate(yaml.safe_load(content)["conversations"]):
                if len(turns) > 1:
                    said, answer = (" ".join(str(turn).split()) for turn in turns[:2])
                    yield Pair(f"{package}/{topic}/{number}", said, answer)
