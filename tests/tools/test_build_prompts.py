"""The prompt builder's readers and split, and the examples in `domains/prompts/`."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_prompts  # noqa: E402
from domain_sources.model import Pair  # noqa: E402
from domain_sources.readers.prompts import pod_text  # noqa: E402

from ddkmix.documents import PromptFields, read_documents  # noqa: E402
from ddkmix.domains import load_domains  # noqa: E402

PROMPTS = ROOT / "domains" / "prompts"
NAMES = ["chat_code", "chat_faq", "chat_quiz"]


def read_side(name: str, side: str) -> list[tuple[str, str]]:
    """Prompt and response of each committed example."""
    path = PROMPTS / name / f"{side}-000000.jsonl"
    documents = [json.loads(one) for one in read_documents(path, PromptFields(messages="messages"))]
    assert all([m["role"] for m in one["messages"]] == ["user", "assistant"] for one in documents)
    return [(one["messages"][0]["content"], one["messages"][1]["content"]) for one in documents]


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        ("A C<printf> of\nB<two>.", "A printf of\ntwo."),
        ('See L<perlop/"Numbers"> and L<the page|perl>.', "See perlop (Numbers) and the page."),
        ("L<http://www.perl.org/>", "http://www.perl.org/"),
        ("C<< a <=> b >> and C<E<lt>x E<gt>>", "a <=> b and <x >"),
        ("I<C<both>>X<index>", "both"),
        ("Text:\n\n    my $x = L<1>;\n\nMore.", "Text:\n\n    my $x = L<1>;\n\nMore."),
        ("=over 4\n\n=item * One\n\n=item Two\n\nText\n\n=back", "- One\n\n- Two\n\nText"),
    ],
)
def test_perls_documentation_becomes_plain(pod: str, expected: str) -> None:
    """Codes, links and lists; code stays as it is."""
    assert expected == pod_text(pod)


def pairs(count: int) -> list[Pair]:
    """Questions with an answer of their own each."""
    return [
        Pair(f"p/{i}", f"Question {i}?", f"Answer {i}, which is a long one: {'x' * 40}") for i in range(count)
    ]


def test_no_prompt_comes_twice() -> None:
    """Nor one that is too long or has no answer; case and white space are not looked at."""
    odd = [Pair("a", "question  3?", "again"), Pair("b", "Long?", "x" * 200), Pair("c", "Empty?", " ")]
    sides = build_prompts.split([*pairs(70), *odd], "d", 200)
    assert 64 == len(sides["held_out"])
    assert {f"p/{i}" for i in range(70)} == {pair.name for side in sides.values() for pair in side}


def test_no_held_out_response_is_trained_on() -> None:
    """But a word that answers many questions is."""
    found = build_prompts.split(pairs(80), "d", 200)
    answer = found["held_out"][0].response
    first, second = found["train"][:2]
    again = Pair(first.name, first.prompt, answer.upper())
    short = [Pair(p.name, p.prompt, "1963") for p in (found["held_out"][1], second)]
    changed = {pair.name: pair for pair in [*pairs(80), again, *short]}
    sides = build_prompts.split(list(changed.values()), "d", 200)
    assert {first.name} == {p.name for p in found["train"]} - {p.name for p in sides["train"]}
    assert found["held_out"][0] in sides["held_out"]


def test_the_committed_cards() -> None:
    """Three domains of chat messages, with the licences of their sources; none is in `domains: [domains]`."""
    domains = load_domains([str(PROMPTS)])
    assert NAMES == [domain.name for domain in domains]
    assert not set(NAMES) & {domain.name for domain in load_domains([str(ROOT / "domains")])}
    for domain in domains:
        assert domain.prompt_response is not None
        assert "messages" == domain.prompt_response.messages
        for source in domain.sources:
            assert source.license in domain.license
            assert (PROMPTS / "licenses" / f"{source.package}.txt").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_examples(name: str) -> None:
    """64 are held out and a few hundred trained on; none on both sides, none twice, none empty or long."""
    sides = {side: read_side(name, side) for side in ("held_out", "train")}
    assert 64 == len(sides["held_out"])
    assert 250 < len(sides["train"]) < 400
    asked = [prompt.lower() for side in sides.values() for prompt, _ in side]
    assert len(asked) == len(set(asked))
    for prompt, response in sides["held_out"] + sides["train"]:
        assert prompt.strip()
        assert response.strip()
        assert len((prompt + response).encode()) <= 1200
    counts = f"| `{name}` | {len(sides['train'])} | {len(sides['held_out'])} |"
    assert counts in (PROMPTS / "README.md").read_text()
