"""`ddkmix generate` as a user types it, on domains whose rows are prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ddkmix import generate as generate_module
from ddkmix.config import parse_config
from ddkmix.generate import generate, open_generating
from ddkmix.report.generated import render_exchanges
from ddkmix.response_store.reader import ResponseStore
from tests.conftest import EOS, ConfigTree, save_tiny_model, write_domain
from tests.prompts.cards import prompt_domain, talk
from tests.test_cli import ddkmix, refused

Make = Callable[..., ConfigTree]
Write = Callable[[ConfigTree], Path]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def make(tmp_path: Path, tiny_config: Make, chat_tokenizer_folder: Path) -> Make:
    """The config tree of a domain of text, which nobody answers, and one of prompts in two shards."""
    folder = tmp_path / "cards"
    write_domain(folder, "code", shards=1, per_shard=3)
    shards = [[talk(f"{shard}{i}\x1b[2J?", "the sea") for i in range(3)] for shard in range(2)]
    prompt_domain(folder, shards, [talk("held", "the whale")])
    teacher = save_tiny_model(tmp_path / "teacher", chat_tokenizer_folder)

    def config(**sections: Any) -> ConfigTree:
        return tiny_config(
            domains=[str(folder)],
            cache_dir=str(tmp_path / "cache"),
            teacher={"model": str(teacher), "dtype": "float32"},
            pack={"seq_len": 48, "processes": 1, "separator": EOS},
            generate={"max_new_tokens": 6, "block_rows": 4},
            **sections,
        )

    return config


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_responses_are_made_stored_and_reported(
    make: Make, write_config: Write, capsys: Captured, by: str
) -> None:
    """To the prompts that rows were packed with; the domain without prompts is named on stderr."""
    tree = make()
    assert ddkmix("generate", write_config(tree), "--by", by, "--format", "json") == 0
    captured = capsys.readouterr()
    assert "ddkmix: without prompts, left out: code.\n" == captured.err
    report = json.loads(captured.out)
    assert ["talk", "total"] == list(report)
    config = parse_config(tree, where="test")
    job = open_generating(config, by)  # type: ignore[arg-type]
    store = ResponseStore({"talk": Path(report["talk"]["store"])}, job.prompts)
    found = [store.read(("talk", shard, row)) for shard in range(2) for row in range(3)]
    assert (6, sum(len(one.ids) for one in found), sum(one.ended for one in found)) == tuple(
        report["talk"][key] for key in ("rows", "tokens", "ended")
    )
    again = generate(config, by)  # type: ignore[arg-type]
    assert again is not None
    assert report["total"]["tokens"] == again["talk"].tokens


def test_every_domain_ends_its_responses_with_its_own_token(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One teacher of two domains whose turns end otherwise is loaded once, and stops where each card says."""
    prompt_domain(
        tmp_path / "cards",
        [[talk("what?", "the sea")]],
        [talk("held back", "the whale")],
        name="verse",
        card={"prompt_response": {"messages": "messages", "end_of_turn": "<|im_start|>"}},
    )
    load, whole, loaded, stops = generate_module.load_responder, generate_module.generate_shard, [], {}

    def noting(job: Any, one: Any, decoder: Any, **options: Any) -> None:
        stops[one.domain] = (job.cards[one.domain].stop_ids, tuple(sorted(decoder._stop)))
        whole(job, one, decoder, **options)

    monkeypatch.setattr(generate_module, "generate_shard", noting)
    monkeypatch.setattr(generate_module, "load_responder", lambda *a: loaded.append(a[2]) or load(*a))
    generate(parse_config(make(), where="test"), "teacher")
    assert ["teacher"] == loaded
    assert {"talk", "verse"} == set(stops)
    assert stops["talk"][0] != stops["verse"][0]
    for wanted, had in stops.values():
        assert wanted == had


def test_overrides_and_parts(make: Make, write_config: Write, capsys: Captured) -> None:
    """A part answers its shards; settings of the command line name another store."""
    config = write_config(make())
    arguments = ("generate", config, "--by", "teacher", "--format", "json")
    reports = []
    for extra in (["--part", "2/2"], [], ["generate.seed=5"]):
        assert ddkmix(*arguments, *extra) == 0
        reports.append(json.loads(capsys.readouterr().out)["talk"])
    assert [3, 6, 6] == [report["rows"] for report in reports]
    assert reports[0]["store"] == reports[1]["store"] != reports[2]["store"]


def test_show_prints_prompts_and_responses(make: Make, write_config: Write, capsys: Captured) -> None:
    """Behind the report, as many of each domain as asked for; what steers a terminal is shown by number."""
    tree = make()
    config = write_config(tree)
    assert ddkmix("generate", config, "--by", "student", "--show", 2, "--format", "markdown") == 0
    table, *blocks = capsys.readouterr().out.split("=== talk/")
    assert "| total | 6 |" in table
    assert ["train-0.tar#0", "train-0.tar#1"] == [block.splitlines()[0] for block in blocks]
    job = open_generating(parse_config(tree, where="test"), "student")
    response = ResponseStore({"talk": job.folder("talk")}, job.prompts).read(("talk", 0, 0))
    text = Tokenizer.from_file(tree["teacher"]["model"] + "/tokenizer.json").decode(
        response.ids.tolist(), skip_special_tokens=False
    )
    prompt = "<|im_start|>user\n00\\u001b[2J?<|im_end|>\n<|im_start|>assistant\n"
    how = "ended" if response.ended else "was cut"
    expected = f"train-0.tar#0\n{prompt}\n--- student, {len(response.ids)} tokens, {how}\n"
    assert blocks[0].startswith(expected)
    if text.isprintable():
        assert text == blocks[0][len(expected) :].rstrip("\n")
    whole = render_exchanges(job, 100)
    assert 6 == whole.count("--- student, ")
    assert "\x1b" not in whole


def test_show_takes_shards_that_are_answered(make: Make, write_config: Write, capsys: Captured) -> None:
    """After one part of two, those of that part."""
    config = write_config(make())
    assert ddkmix("generate", config, "--by", "teacher", "--part", "2/2", "--show", 1) == 0
    assert "=== talk/train-1.tar#0\n" in capsys.readouterr().out


def test_show_of_a_part_without_a_shard_shows_nothing(
    make: Make, write_config: Write, capsys: Captured
) -> None:
    """A job of an array need not have one."""
    assert ddkmix("generate", write_config(make()), "--by", "teacher", "--part", "9/9", "--show", 1) == 0
    assert "===" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "pupil"], "--by pupil: must be teacher or student."),
        (["--by", "teacher", "--format", "html"], "--format html: must be table, json or markdown."),
        (["--by", "teacher", "--part", "3/2"], "--part 3/2: must be"),
        (["--by", "teacher", "--show", "1", "--format", "json"], "--show 1: text cannot follow JSON"),
        (["--by", "teacher", "generate.top_p=2"], "generate.top_p = 2"),
        (["--by", "teacher", "generate.stop=[<end>]"], "'<end>' is not a token"),
        (
            ["--by", "teacher", "generate.max_new_tokens=250"],
            "are more than the 256 positions of the teacher",
        ),
    ],
)
def test_mistakes_are_one_line(
    make: Make, write_config: Write, capsys: Captured, arguments: list[str], message: str
) -> None:
    """With exit code 2, and before anything is stored."""
    tree = make()
    assert message in refused(capsys, "generate", write_config(tree), *arguments)
    assert not (Path(tree["cache_dir"]) / "responses").exists()


def test_who_answers_must_be_said(make: Make, write_config: Write, capsys: Captured) -> None:
    """There is no default: teacher and student are different stages."""
    assert ddkmix("generate", write_config(make())) == 2
    assert "--by" in capsys.readouterr().err


def test_a_run_without_prompts_is_refused(tiny_config: Make, write_config: Write, capsys: Captured) -> None:
    """All domains are text."""
    message = refused(capsys, "generate", write_config(tiny_config()), "--by", "teacher")
    assert "none of the domains code, math, prose has prompts; add one whose documents do." in message
