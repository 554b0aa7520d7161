"""The rows of a step: prompts with other responses, pairs, and Rouge-L against the textbook."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddkmix.answers import Answer
from ddkmix.config import parse_config
from ddkmix.generation.replay_buffer import ReplayBuffer
from ddkmix.losses import CrossEntropy, LossTerm
from ddkmix.predicted_tokens import predicted
from ddkmix.run import Run
from ddkmix.sources import IGNORE
from ddkmix.step_rows import StepRows, rouge_l
from ddkmix.train_step import _step_rows
from tests.conftest import reset_accelerate
from tests.objectives.conftest import run_tree
from tests.objectives.opened import open_run

NLL = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory, answered: Path, prompt_cards: Path, chat_teacher: Path
) -> Iterator[tuple[Run, dict[str, Tensor]]]:
    """A run over text and prompts, and its first batch."""
    folder = tmp_path_factory.mktemp("run")
    tree = run_tree(
        answered,
        prompt_cards,
        chat_teacher,
        folder / "run",
        objective={"name": "dpkd"},
        trainer={"batch_rows": 10},
    )
    run = open_run(parse_config(tree, where="test"))
    yield run, next(run.mixture)
    run.mixture.close()
    reset_accelerate()


@pytest.fixture
def rows(opened: tuple[Run, dict[str, Tensor]]) -> StepRows:
    """Of the batch; the student has not answered yet."""
    run, batch = opened
    found = _step_rows(run, batch, 0, NLL)
    new: dict[str, Any] = {
        "buffer": ReplayBuffer(50, seed=0),
        "recent": deque(maxlen=64),
        "precision": nullcontext,  # Accelerate's own does not outlive a test
    }
    return replace(found, answers=replace(found.answers, **new))


def check_rows(batch: dict[str, Tensor], answers: list[Answer], padding: int) -> None:
    """Prompt, response, padding; labels are the response; the width is that of the longest."""
    assert len(answers) == len(batch["input_ids"])
    longest = max(len(answer.prompt) + len(answer.ids) for answer in answers)
    assert longest == batch["input_ids"].shape[1]
    for ids, labels, domain, answer in zip(
        batch["input_ids"], batch["labels"], batch["domain_ids"], answers, strict=True
    ):
        start, end = len(answer.prompt), len(answer.prompt) + len(answer.ids)
        assert [*answer.prompt, *answer.ids] == ids[:end].tolist()
        assert {padding} >= set(ids[end:].tolist())
        assert answer.ids.tolist() == labels[start:end].tolist()
        assert {IGNORE} >= {*labels[:start].tolist(), *labels[end:].tolist()}
        assert answer.place.domain == int(domain)


def test_the_rows_of_a_step_know_their_places(opened: tuple[Run, dict[str, Tensor]], rows: StepRows) -> None:
    """Each row of a prompt begins with the prompt that its place names; prompts are numbered in order."""
    _, batch = opened
    prompts = [i for i, place in enumerate(rows.places) if rows.answers.has_prompts(place.domain)]
    assert 0 < len(prompts) < len(rows.places)
    assert len(prompts) == rows.num_prompts
    assert list(range(len(prompts))) == list(rows.prompt_numbers)
    assert list(range(10)) == sorted(place.slot for place in rows.places)
    for i in prompts:
        prompt = rows.answers.prompt(rows.places[i]).tolist()
        assert prompt == batch["input_ids"][i, : len(prompt)].tolist()
        response = rows.answers.of_data(rows.places[i]).tolist()
        assert response == batch["labels"][i][batch["labels"][i] != IGNORE].tolist()


def test_new_responses_stand_behind_their_prompts(rows: StepRows) -> None:
    """Every token of a response is predicted, also the first one, and nothing else is."""
    answers = rows.student_responses()
    batch = rows.of_responses(answers)
    check_rows(batch, answers, rows.padding_id)
    assert sum(len(answer.ids) for answer in answers) == int(predicted(batch["labels"]).sum())
    assert [place for place in rows.places if rows.answers.has_prompts(place.domain)] == [
        answer.place for answer in answers
    ]
    assert answers == rows.said


def test_no_answers_make_a_batch_without_rows(rows: StepRows) -> None:
    """Of the types that others have."""
    none, some = rows.of_responses([]), rows.of_responses(rows.teacher_responses())
    assert 0 == len(none["input_ids"]) == len(none["labels"]) == len(none["domain_ids"])
    assert {name: tensor.dtype for name, tensor in some.items()} == {
        name: tensor.dtype for name, tensor in none.items()
    }


def test_text_stays_as_it_is_beside_responses(rows: StepRows) -> None:
    """Rows of text first, widened where responses are longer, then prompts with responses; without
    responses the text alone."""
    answers = rows.student_responses()
    text = [i for i, place in enumerate(rows.places) if not rows.answers.has_prompts(place.domain)]
    mixed, alone = rows.with_responses(answers), rows.with_responses([])
    width = rows.batch["input_ids"].shape[1]
    assert len(text) + len(answers) == len(mixed["input_ids"])
    for found in (mixed, alone):
        for name in ("input_ids", "labels"):
            assert torch.equal(rows.batch[name][text], found[name][: len(text), :width])
        assert rows.batch["domain_ids"][text].tolist() == found["domain_ids"][: len(text)].tolist()
    other = {name: tensor[len(text) :] for name, tensor in mixed.items()}
    for ids, labels, answer in zip(other["input_ids"], other["labels"], answers, strict=True):
        end = len(answer.prompt) + len(answer.ids)
        assert [*answer.prompt, *answer.ids] == ids[:end].tolist()
        assert answer.ids.tolist() == labels[labels != IGNORE].tolist()


def test_responses_that_are_longer_than_the_text_widen_it(rows: StepRows) -> None:
    """With padding that is not predicted."""
    answer = rows.teacher_responses()[0]
    long = replace(answer, ids=np.arange(1, 80))
    found = rows.with_responses([long])
    width = len(answer.prompt) + 79
    assert found["input_ids"].shape[1] == width > rows.batch["input_ids"].shape[1]
    assert {IGNORE} == set(found["labels"][:-1, rows.batch["labels"].shape[1] :].flatten().tolist())
    assert 79 == int(predicted(found["labels"][-1:]).sum())


def test_pairs_are_the_teacher_s_response_and_the_student_s(rows: StepRows) -> None:
    """Rows 2 i and 2 i + 1 have one prompt; grades are Rouge-L against the data's response."""
    rejected = rows.student_responses()
    chosen = {answer.place: answer for answer in rows.teacher_responses()}
    batch = rows.pairs(rejected, graded=True)
    in_order = [answer for bad in rejected for answer in (chosen[bad.place], bad)]
    quality = batch.pop("quality")
    check_rows(batch, in_order, rows.padding_id)
    grades = [textbook_rouge(a.ids.tolist(), rows.answers.of_data(a.place).tolist()) for a in in_order]
    assert grades == pytest.approx(quality.tolist())
    assert max(grades) > 0
    assert "quality" not in rows.pairs(rejected)


def test_a_pair_whose_teacher_is_silent_is_left_out(rows: StepRows) -> None:
    """And with it the student's response; where all are, nothing is left."""
    rejected = rows.student_responses()
    words = frozenset(rows.teacher_responses(rejected[:1])[0].ids.tolist())
    rows.answers = replace(rows.answers, silent={"talk": words})
    left = [answer.place for answer in rows.teacher_responses(rejected)]
    assert len(left) < len(rejected)
    assert 2 * len(left) == len(rows.pairs(rejected)["labels"])
    rows.answers = replace(rows.answers, silent={"talk": frozenset(range(400))})
    assert 0 == len(rows.pairs(rejected, graded=True)["labels"])


def test_old_responses_have_the_teacher_s_beside_them(rows: StepRows) -> None:
    """A step that replays takes prompts of earlier steps; the teacher's responses are to these."""
    said = {answer.place.row: answer for answer in rows.student_responses()}
    rows.source, rows.step = "replay", 3
    old = rows.student_responses()
    assert {answer.place.row for answer in old} == set(said)
    assert [answer.place.row for answer in old] != list(said)
    for answer, theirs in zip(old, rows.teacher_responses(old), strict=True):
        assert said[answer.place.row].ids.tolist() == answer.ids.tolist()
        assert answer.prompt.tolist() == theirs.prompt.tolist()


def test_the_anchor_is_the_data(rows: StepRows) -> None:
    """One part where `loss` has a term."""
    (part,) = rows.anchor()
    assert part.batch is rows.batch
    assert [] == replace(rows, terms=()).anchor()


# --- Rouge-L ---------------------------------------------------------------------------------------


def textbook_lcs(a: list[int], b: list[int]) -> int:
    """Longest common subsequence by the table of a textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def textbook_rouge(a: list[int], b: list[int]) -> float:
    """The harmonic mean of precision and recall."""
    lcs = textbook_lcs(a, b)
    if lcs == 0:
        return 0.0
    precision, recall = lcs / len(a), lcs / len(b)
    return 2 * precision * recall / (precision + recall)


TOKENS = st.lists(st.integers(0, 4), max_size=12)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(TOKENS, TOKENS)
def test_rouge_l_is_the_textbook_s(a: list[int], b: list[int]) -> None:
    """In either order, from 0 to 1, and 1 for the text itself."""
    one, other = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
    assert textbook_rouge(a, b) == pytest.approx(rouge_l(one, other)) == rouge_l(other, one)
    assert rouge_l(one, one) == (1.0 if a else 0.0)


def test_common_tokens_without_order_would_be_noticed() -> None:
    """A bag of tokens gives 1 to a text that is turned round; Rouge-L 2 x 1 / 6."""
    assert pytest.approx(1 / 3) == rouge_l(np.array([1, 2, 3]), np.array([3, 2, 1]))
