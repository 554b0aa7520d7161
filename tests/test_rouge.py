"""Rouge-L of held-out responses: the texts, the rows and the responses are the ones that they should be."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ddkmix import rouge as rouge_module
from ddkmix.config import RunConfig, dump_config, parse_config
from ddkmix.errors import ConfigError, DataError, DdkmixError
from ddkmix.generation.sampling import Sampling
from ddkmix.held_out import select_rows
from ddkmix.models import build_student
from ddkmix.preflight import check
from ddkmix.prepare import open_rows
from ddkmix.responders import response_cards
from ddkmix.rouge import ResponseRouge, RougeRows, response_rouge, rouge_l, rouge_of
from ddkmix.rows import RowReader
from ddkmix.setup import train
from tests.conftest import EOS, REPO, ConfigTree, save_tiny_model, write_domain
from tests.generation.models import Prompt, one_by_one
from tests.prompts.cards import prompt_domain, talk
from tests.test_cli import ddkmix, refused

Make = Callable[..., ConfigTree]
END = 301
"""<|im_end|>"""


# --- the measure ------------------------------------------------------------------------------------


def literal_f(reference: Sequence[str], response: Sequence[str]) -> float:
    """Lin (2004), Eq. 2 to 4 with beta = 1: LCS by its recursion, no table."""

    def lcs(a: Sequence[str], b: Sequence[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return lcs(a[:-1], b[:-1]) + 1
        return max(lcs(a[:-1], b), lcs(a, b[:-1]))

    common = lcs(reference, response)
    if not common:
        return 0.0
    recall, precision = common / len(reference), common / len(response)
    return 2 * recall * precision / (recall + precision)


def bag_f(reference: Sequence[str], response: Sequence[str]) -> float:
    """Rouge-1, which does not look at the order."""
    common = sum((Counter(reference) & Counter(response)).values())
    return 2 * common / (len(reference) + len(response))


def differs(measure: Callable[[Sequence[str], Sequence[str]], float]) -> bool:
    """Whether a measure is not ours on some pair of random texts of short words, which have no stems."""
    generator = random.Random(0)
    for _ in range(200):
        one, other = (generator.choices(["a", "b1", "cat"], k=generator.randint(1, 7)) for _ in range(2))
        if abs(measure(one, other) - rouge_l(" ".join(one), ", ".join(other).upper())) > 1e-12:
            return True
    return False


def test_rouge_l_is_that_of_the_paper() -> None:
    """The F-measure of the longest common subsequence of words; the order of words counts."""
    assert not differs(literal_f)
    assert differs(bag_f)


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("The cats were running.", "the cat were run", 1.0),
        ("a b c d", "a c", 2 / 3),
        ("a b", "c d", 0.0),
        ("", "a b", 0.0),
        ("a b", "", 0.0),
        ("", "", 0.0),
        ("鲸鱼", "鲸鱼", 0.0),
        ("鲸鱼 a", "a 鱼", 1.0),
    ],
)
def test_words_are_stems_of_letters_and_digits(reference: str, response: str, expected: float) -> None:
    """Case, punctuation and endings do not count; text in another script is not seen, and nothing is 0."""
    assert expected == pytest.approx(rouge_l(reference, response))


def measured(*scores: float, **changes: Any) -> RougeRows:
    """Rows of these scores."""
    count = len(scores)
    values: dict[str, Any] = {
        "scores": np.array(scores),
        "num_tokens": np.arange(1, count + 1),
        "ended": np.arange(count) % 2 == 0,
        "reference_tokens": np.full(count, 4),
        **changes,
    }
    return RougeRows(**values)


def test_means_have_the_standard_error_of_rows() -> None:
    """sqrt(sum (x - mean)^2 / (n - 1) / n); of one row there is none."""
    rows = measured(0.1, 0.4, 0.7, 0.0)
    mean = (0.1 + 0.4 + 0.7) / 4
    squares = sum((x - mean) ** 2 for x in (0.1, 0.4, 0.7, 0.0))
    assert (mean, sqrt(squares / 3 / 4)) == pytest.approx((rows.mean, rows.error))
    plain = rows.to_json()
    assert (4, 2.5, 0.5, 4.0) == tuple(plain[key] for key in ("rows", "tokens", "ended", "reference_tokens"))
    assert isnan(measured(0.5).error)
    assert measured(0.5).to_json()["error"] is None


def test_the_mean_of_all_is_one_of_rows_and_not_of_domains() -> None:
    """Three rows of one domain count three times as much as one of another."""
    found = ResponseRouge(
        by="student", domains={"a": measured(1.0, 1.0, 1.0), "b": measured(0.0)}, left_out=()
    )
    assert 0.75 == found.together.mean
    assert (0.75, 4) == tuple(found.to_json()["all_rows"][key] for key in ("rouge_l", "rows"))
    assert [1, 2, 3, 1] == found.together.num_tokens.tolist()


# --- of a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain of text, and two of prompts."""
    folder = tmp_path_factory.mktemp("cards")
    write_domain(folder, "code", per_shard=4)
    train_rows, other = ([[talk(f"{i}{end}", "the sea") for i in range(3)]] for end in "?!")
    held_out = [talk(f"held {i}", "the whale said " * i) for i in range(1, 5)]
    prompt_domain(folder, train_rows, held_out)
    prompt_domain(folder, other, [talk("out of", "window"), talk("dark", "night and man")], name="quiz")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_folder: Path) -> Path:
    """A small model with a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("chat-teacher"), chat_tokenizer_folder)


@pytest.fixture
def make(tiny_config: Make, cards: Path, teacher: Path) -> Make:
    """The config tree of a small run over the three domains."""

    def config(**sections: Any) -> ConfigTree:
        return tiny_config(
            **{
                "domains": [str(cards)],
                "cache_dir": str(cards / "cache"),
                "pack": {"seq_len": 48, "processes": 1, "separator": EOS},
                **sections,
                "teacher": {"model": str(teacher), "dtype": "float32", **sections.get("teacher", {})},
                "generate": {"max_new_tokens": 10, "block_rows": 4, **sections.get("generate", {})},
            }
        )

    return config


def parsed(tree: ConfigTree) -> RunConfig:
    """The config of a tree."""
    return parse_config(tree, where="test")


def same(first: ResponseRouge, second: ResponseRouge) -> bool:
    """Equal row by row."""
    return [*first.domains] == [*second.domains] and all(
        np.array_equal(getattr(one, name), getattr(second.domains[domain], name))
        for domain, one in first.domains.items()
        for name in ("scores", "num_tokens", "ended", "reference_tokens")
    )


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_rows_are_scored_as_whole_forward_passes_and_decoded_text_say(
    make: Make, by: str, teacher: Path
) -> None:
    """Held-out prompts, answered one by one by the likeliest token, whatever the temperature of the config
    is; the texts without special tokens."""
    config = parsed(make(generate={"temperature": 1.5}))
    found = response_rouge(config, by=by)  # type: ignore[arg-type]
    assert (["quiz", "talk"], ("code",), by) == (sorted(found.domains), found.left_out, found.by)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model = model.eval() if by == "teacher" else build_student(config.student, config.teacher, seed=0).eval()
    decode = Tokenizer.from_file(str(teacher / "tokenizer.json")).decode
    for name, domain in open_rows(check(config), shown=False).items():
        if name == "code":
            continue
        rows, reader = domain.held_out, RowReader(domain.held_out)
        expected: list[tuple[float, int, bool, int]] = []
        for row in range(rows.num_rows):
            start, end = rows.prompt_tokens_at(0, row), rows.tokens_at(0, row)
            ids = reader.read(0, row)[:end].astype(np.int64)
            response = one_by_one(
                model,
                Prompt(ids=ids[:start], key=(), name=""),
                Sampling(temperature=0.0),
                max_new_tokens=10,
                stop_ids=[END],
                num_classes=302,
            )
            assert END == ids[-1]
            texts = [decode(part, skip_special_tokens=True) for part in (ids[start:].tolist(), response)]
            assert "<|im_end|>" not in texts[0] and texts[0]
            expected.append((rouge_l(*texts), len(response), response[-1] == END, end - start))
        own = found.domains[name]
        actual = zip(own.scores, own.num_tokens, own.ended, own.reference_tokens, strict=True)
        assert [*map(tuple, expected)] == [*map(tuple, actual)]


def test_a_student_that_says_the_reference_scores_one(make: Make, cards: Path, tmp_path: Path) -> None:
    """Trained on the one answer that there is, until it says nothing else."""
    held_out = [talk("held 9", "the sea"), talk("8", "the sea and the old night")]
    folder = tmp_path / "cards"
    folder.mkdir()
    prompt_domain(folder, [[talk(f"{i}?", "the sea") for i in range(12)]], held_out, name="sea")
    tree = make(
        domains=[str(folder)],
        trainer={"steps": 120, "checkpoint_steps": 120},
        optimizer={"lr": 1e-2},
        loss=[{"name": "cross_entropy"}],
        mixture={"interval_steps": 120},
    )
    config = parsed(tree)
    before = response_rouge(config).domains["sea"]
    train(config)
    after = response_rouge(config, student=config.run_dir / "student").domains["sea"]
    assert before.mean < 0.3
    assert [1.0, pytest.approx(2 * 2 / (2 + 6))] == after.scores.tolist()
    assert after.ended.all()
    assert after.reference_tokens[0] == after.num_tokens[0] == after.num_tokens[1] < after.reference_tokens[1]


def test_numbers_do_not_depend_on_batches(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in hand at once change nothing; nor does the order in which they are taken."""
    first = response_rouge(parsed(make()))
    assert same(first, response_rouge(parsed(make(generate={"batch_rows": 1}))))
    config = parsed(make())
    prepared = check(config, only_gaps=True)
    rows = open_rows(prepared, shown=False)["talk"].held_out
    held_out = select_rows(rows, 8)
    turned = replace(held_out, places=held_out.places[::-1])
    greedy = replace(prepared, config=rouge_module._greedy(config, None))
    model = build_student(config.student, config.teacher, seed=0)
    seen: list[int] = []
    own = rouge_of(
        model,
        turned,
        card=response_cards(greedy, "student", {"talk": None})["talk"],
        tokenizer=prepared.tokenizer,
        batch_rows=2,
        on_rows=seen.append,
    )
    assert first.domains["talk"].scores.tolist() == own.scores.tolist()[::-1]
    assert ([2, 3], True) == (seen, model.training)


def test_the_rows_are_those_of_the_gaps(make: Make) -> None:
    """As many as `evaluation.rows` says, the same ones for every student."""
    found = response_rouge(parsed(make(evaluation={"rows": 2})))
    whole = response_rouge(parsed(make()))
    assert {"talk": 2, "quiz": 2} == {name: len(one.scores) for name, one in found.domains.items()}
    config = parsed(make())
    rows = open_rows(check(config), shown=False)["talk"].held_out
    kept = [row for _, row in select_rows(rows, 2).places]
    assert whole.domains["talk"].num_tokens[kept].tolist() == found.domains["talk"].num_tokens.tolist()


def test_a_student_in_a_folder_takes_the_place_of_the_config_s(
    make: Make, tmp_path: Path, teacher: Path
) -> None:
    """As if the config had named it; the teacher stays who it is."""
    other = speaks_of_ends(tmp_path / "other", teacher, "<|im_end|>")
    load = {"init": "load", "model": str(other), "layers": None}
    config = parsed(make())
    assert same(response_rouge(parsed(make(student=load))), response_rouge(config, student=other))
    assert same(response_rouge(config, student=teacher), response_rouge(config, by="teacher"))
    assert not same(response_rouge(config, student=other), response_rouge(config))


def speaks_of_ends(folder: Path, source: Path, eos: str) -> Path:
    """A model that says <|im_end|> or token 5, as its state's first number has it, and a tokenizer that calls
    some token the end of a text."""
    save_tiny_model(folder, source, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    head[END, 0], head[5, 0] = 1.0, -1.0
    weights["lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": eos}))
    return folder


def test_what_ends_a_turn_ends_a_response(make: Make, tmp_path: Path, teacher: Path) -> None:
    """Also where the tokenizer's own end of a text is another token; but not where the config says what ends
    responses."""
    model = speaks_of_ends(tmp_path / "model", teacher, EOS)
    results = [
        response_rouge(parsed(make(teacher={"model": str(model)}, generate={"stop": stop})), by="teacher")
        for stop in ([], [EOS, "<|im_end|>"], [EOS])
    ]
    assert same(*results[:2])
    assert 0 < results[0].together.ended.sum()
    assert not results[2].together.ended.any()
    assert {10} == set(results[2].together.num_tokens.tolist())


# --- what is refused --------------------------------------------------------------------------------


def test_without_prompts_there_is_nothing_to_measure(tiny_config: Make) -> None:
    """One line, with the domains."""
    with pytest.raises(ConfigError, match="none of the domains code, math, prose has prompts"):
        response_rouge(parsed(tiny_config()))


@pytest.mark.parametrize(
    ("sections", "by", "message"),
    [
        (
            {"generate": {"max_new_tokens": 250}},
            "student",
            r"quiz/\S+#\d: a prompt of \d+ tokens and gener",
        ),
        (
            {"generate": {"stop": ["<end>"]}},
            "student",
            r"generate.stop = \['<end>'\]: '<end>' is not a token",
        ),
        (
            {
                "teachers": {
                    "second": {"model": "TEACHER"},
                    "both": {"ensemble": {"teacher": 1, "second": 1}},
                },
                "default_teacher": "both",
            },
            "teacher",
            "the teacher 'both' is an ensemble, which has no responses",
        ),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    make: Make,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    by: str,
    message: str,
) -> None:
    """One line each."""
    monkeypatch.setattr(rouge_module, "load_responder", None)
    tree = json.loads(json.dumps(make(**sections)).replace("TEACHER", str(teacher)))
    with pytest.raises(ConfigError, match=message):
        response_rouge(parsed(tree), by=by)  # type: ignore[arg-type]


def test_a_student_of_another_tokenizer_is_refused(make: Make, other_teacher: Path) -> None:
    """It would read the prompts otherwise."""
    config = parsed(make(pack={"seq_len": 48, "processes": 1, "separator": "</s>"}))
    with pytest.raises(DdkmixError, match="student and teacher have different tokenizers"):
        response_rouge(config, student=other_teacher)


def test_rows_of_text_have_no_prompts_to_answer(make: Make, teacher: Path) -> None:
    """Nor do they get a number."""
    config = parsed(make())
    prepared = check(config)
    held_out = select_rows(open_rows(prepared, shown=False)["code"].held_out, 2)
    card = response_cards(prepared, "teacher", {"code": None})["code"]
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with pytest.raises(DataError, match="the prompt is empty"):
        rouge_of(model, held_out, card=card, tokenizer=prepared.tokenizer)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_takes_a_config_or_a_run(
    make: Make, write_config: Callable[[ConfigTree], Path], capsys: pytest.CaptureFixture[str], teacher: Path
) -> None:
    """With the run's own student; the teacher beside it when asked for; who is left out is on stderr."""
    tree = make(trainer={"steps": 2, "checkpoint_steps": 2})
    config = write_config(tree)
    assert ddkmix("train", config) == 0
    capsys.readouterr()
    run, student = Path(tree["run_dir"]), Path(tree["run_dir"]) / "student"
    assert ddkmix("rouge", run, "--teacher", "--format", "json") == 0
    captured = capsys.readouterr()
    assert "ddkmix: without prompts, left out: code.\n" == captured.err
    report = json.loads(captured.out)
    assert ["student", "teacher"] == list(report)
    expected = response_rouge(parsed(tree), student=student).to_json()
    assert expected == report["student"]
    assert ddkmix("rouge", config, "--student", student, "--format", "json") == 0
    assert {"student": expected} == json.loads(capsys.readouterr().out)
    assert (
        ddkmix("rouge", run, "evaluation.rows=1", "guards=off", "--student", teacher, "--format", "markdown")
        == 0
    )
    header, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert "| domain | rows | reference tokens | student | +- | student tokens | ended |" == header
    assert ["quiz", "talk", "all rows"] == [line.split(" | ")[0].strip("| ") for line in lines]
    assert all(" | - | " in line for line in lines[:2])


def test_a_teacher_that_cannot_answer_is_found_before_the_student_has(
    make: Make,
    write_config: Callable[[ConfigTree], Path],
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is decoded for a report that cannot be printed."""
    monkeypatch.setattr(rouge_module, "load_responder", None)  # whoever calls it fails otherwise
    teachers = {
        "second": {"model": str(teacher)},
        "both": {"ensemble": {"teacher": 1, "second": 1}},
    }
    config = write_config(make(teachers=teachers, default_teacher="both"))
    assert ddkmix("rouge", config, "--teacher") == 2
    assert "the teacher 'both' is an ensemble" in capsys.readouterr().err


def test_of_a_run_another_student_is_an_option(
    make: Make, write_config: Callable[[ConfigTree], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An override would say nothing, because the run's own student answers."""
    tree = make(trainer={"steps": 1, "checkpoint_steps": 1})
    assert ddkmix("train", write_config(tree)) == 0
    capsys.readouterr()
    assert ddkmix("rouge", tree["run_dir"], "student.model=other") == 2
    assert "student.model=other: of a run it is its own student" in capsys.readouterr().err


def test_the_command_refuses_in_one_line(
    make: Make,
    write_config: Callable[[ConfigTree], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No run, a run without a student, a format that there is not."""
    config = write_config(make())
    assert "--format html: must be table, json or markdown" in refused(
        capsys, "rouge", config, "--format", "html"
    )
    folder = tmp_path / "early"
    folder.mkdir()
    assert f"{folder} is not a run directory (no config.yaml)" in refused(capsys, "rouge", folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(dump_config(parsed(make()))))
    message = refused(capsys, "rouge", folder)
    assert f"{folder} has no student yet; let the run end, or name one with --student." in message
    assert "no such folder" in refused(capsys, "rouge", config, "--student", "/nowhere/student")


PROGRAM = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from ddkmix.config import load_config
from ddkmix.rouge import response_rouge
found = response_rouge(load_config(Path(sys.argv[1])))
rank = PartialState().process_index
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(found.to_json()))
"""


def test_two_ranks_find_what_one_does(
    make: Make, write_config: Callable[[ConfigTree], Path], tmp_path: Path
) -> None:
    """Each answers half of the rows, and both have the whole."""
    tree = make(evaluation={"rows": 3})
    config, program = write_config(tree), tmp_path / "program.py"
    expected = response_rouge(parsed(tree)).to_json()
    program.write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    rank_program = str(REPO / "tests" / "rank_program.py")
    done = subprocess.run(
        [sys.executable, *launch, rank_program, str(program), str(config), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    assert [expected] * 2 == [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
