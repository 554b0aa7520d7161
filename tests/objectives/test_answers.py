"""Who answers in a run: the same response in any company, a buffer that all ranks share, and silence."""

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddkmix.answers import ROLLOUT_VALUES, Answer, Answers, Place, uniform_of
from ddkmix.config import parse_config
from ddkmix.errors import ModelError, RunError
from ddkmix.generation.replay_buffer import ReplayBuffer
from ddkmix.rows import RowReader
from ddkmix.run import Run
from tests.conftest import reset_accelerate
from tests.objectives.conftest import run_tree
from tests.objectives.opened import as_lists, open_run

TALK = 1
"""Number of the domain of prompts."""
PLACES = [Place(domain=TALK, shard=i // 9, row=i % 9, slot=2 * i) for i in range(18)]
"""All prompts, in every second row of a batch."""


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, answered: Path, prompt_cards: Path, chat_teacher: Path
) -> Iterator[Run]:
    """A run over pairs that takes no step."""
    folder = tmp_path_factory.mktemp("run")
    sections: dict[str, Any] = {"objective": {"name": "plad_margin"}, "loss": []}
    tree = run_tree(answered, prompt_cards, chat_teacher, folder / "run", **sections)
    yield open_run(parse_config(tree, where="test"))
    reset_accelerate()


@pytest.fixture
def answers(run: Run) -> Answers:
    """Those of the run, who have not said anything yet."""
    return afresh(run)


def afresh(run: Run, **changes: Any) -> Answers:
    """The answers of a run with an empty buffer of 8, and changes."""
    assert run.answers is not None
    new: dict[str, Any] = {
        "buffer": ReplayBuffer(8, seed=0),
        "recent": deque(maxlen=64),
        "precision": nullcontext,  # Accelerate's own does not outlive a test
    }
    return replace(run.answers, **{**new, **changes})


def said(answers: list[Answer]) -> dict[Place, list[int]]:
    """Responses by place."""
    return {answer.place: answer.ids.tolist() for answer in answers}


# --- the student -----------------------------------------------------------------------------------


def test_a_response_is_the_same_in_any_company(run: Run) -> None:
    """All prompts at once, in two halves as two ranks have them, the other way round, and one alone."""
    whole = said(afresh(run).of_student(PLACES, 3))
    assert len(PLACES) == len(whole)
    assert len({tuple(ids) for ids in whole.values()}) > 9
    halves = {}
    for rank in (0, 1):
        halves |= said(afresh(run).of_student(PLACES[rank::2], 3))
    assert whole == halves
    assert whole == said(afresh(run).of_student(PLACES[::-1], 3))
    assert whole[PLACES[4]] == said(afresh(run).of_student(PLACES[4:5], 3))[PLACES[4]]


def test_step_seed_and_slot_draw_other_responses(run: Run) -> None:
    """The same step gives the same, whatever has been said before; a row that stands in a batch twice has
    two responses."""
    answers = afresh(run)
    first, other = said(answers.of_student(PLACES[:6], 3)), said(answers.of_student(PLACES[:6], 4))
    assert first == said(answers.of_student(PLACES[:6], 3)) != other
    assert first != said(afresh(run, seed=9).of_student(PLACES[:6], 3))
    twice = [replace(place, slot=place.slot + 1) for place in PLACES[:6]]
    assert list(first.values()) != list(said(answers.of_student(twice, 3)).values())


def test_what_is_said_enters_the_buffer_in_the_order_of_the_batch(run: Run) -> None:
    """Oldest first, with its step, however the prompts were handed over."""
    one, two = afresh(run), afresh(run)
    one.of_student(PLACES[:5], 2)
    two.of_student(PLACES[:5][::-1], 2)
    state = as_lists(one.state())
    assert state == as_lists(two.state())
    assert [0, 1, 2, 3, 4] == state["rollouts/row"]
    assert {2} == set(state["rollouts/step"])
    assert {TALK} == set(state["rollouts/domain"])


def test_nobody_asked_nobody_answers(answers: Answers) -> None:
    """A rank whose rows are all text takes part without a prompt."""
    assert [] == answers.of_student([], 0)
    assert 0 == len(answers.buffer)


def test_what_is_recorded_of_a_response(run: Run) -> None:
    """Its tokens, whether it ended, whether it says nothing, and its age."""
    answers = afresh(run)
    (stop,) = answers.stop_ids
    about = {
        (5, 6, stop): [3.0, 1.0, 0.0, 4.0],
        (5, 6, 7): [3.0, 0.0, 0.0, 4.0],
        (stop,): [1.0, 1.0, 1.0, 4.0],
        (answers.padding_id,) * 2: [2.0, float(answers.padding_id == stop), 1.0, 4.0],
    }
    for ids, values in about.items():
        answer = Answer(place=PLACES[0], prompt=np.array([1]), ids=np.array(ids), step=3)
        assert values == answers.values(answer, 7)
        assert len(values) == len(ROLLOUT_VALUES)


def test_a_row_at_hand_is_not_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt and the data's response are those on disk."""
    rows = afresh(run).prompts["talk"].rows
    reader = RowReader(rows)
    at_hand = [
        replace(place, tokens=reader.read(place.shard, place.row).astype(np.int64)) for place in PLACES
    ]
    assert at_hand == PLACES
    assert rows.num_rows == len(PLACES)
    answers = afresh(run)
    read = [(answers.prompt(place).tolist(), answers.of_data(place).tolist()) for place in PLACES]
    assert all(prompt and response for prompt, response in read)
    monkeypatch.setattr(RowReader, "read", None)  # whoever calls it fails
    monkeypatch.setattr(RowReader, "read_into", None)
    assert read == [(answers.prompt(place).tolist(), answers.of_data(place).tolist()) for place in at_hand]


# --- old responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_out_what_one_would_replay(run: Run, ranks: int) -> None:
    """The prompts of a step, numbered over all ranks, take different rollouts of the buffer; with fewer
    rollouts than prompts the last prompts get none. Each comes with its own prompt and age."""
    answers = afresh(run)
    new = {answer.place.row: answer for answer in answers.of_student(PLACES[:5], 1)}
    alone = answers.replayed(range(7), 7, 6)
    assert 5 == len(alone) == len({answer.place.row for answer in alone})
    shared = [answers.replayed(range(rank, 7, ranks), 7, 6) for rank in range(ranks)]
    assert {a.place: a.ids.tolist() for a in alone} == {
        a.place: a.ids.tolist() for own in shared for a in own
    }
    for answer in alone:
        assert new[answer.place.row].ids.tolist() == answer.ids.tolist()
        assert new[answer.place.row].prompt.tolist() == answer.prompt.tolist()
        assert [1, 5.0] == [answer.step, answers.values(answer, 6)[3]]


def test_a_step_replays_by_its_number(run: Run) -> None:
    """The same step the same rollouts, another step others."""
    answers = afresh(run)
    answers.of_student(PLACES[:8], 1)
    taken = [[a.place.row for a in answers.replayed(range(3), 3, step)] for step in (2, 2, 3, 4, 5)]
    assert taken[0] == taken[1]
    assert len({tuple(rows) for rows in taken}) > 1


# --- silence ---------------------------------------------------------------------------------------


def test_sixty_four_empty_responses_end_a_run(run: Run) -> None:
    """In one line, at the step at which the 64th came; 54 are borne."""
    everything = {"talk": frozenset(range(400))}
    answers = afresh(run, silent=everything)
    for step in range(3):
        answers.of_student(PLACES, step)
    with pytest.raises(ModelError, match=r"step 4: the student's last 64 responses are nothing but") as error:
        answers.of_student(PLACES, 3)
    assert "\n" not in str(error.value)


def test_a_single_word_breaks_the_silence(run: Run) -> None:
    """54 empty responses, one that says something, 18 empty ones: the run goes on."""
    answers = afresh(run, silent={"talk": frozenset(range(400))})
    for step in range(3):
        answers.of_student(PLACES, step)
    speaking = replace(answers, silent={"talk": frozenset()})
    speaking.of_student(PLACES[:1], 3)
    answers.of_student(PLACES, 4)
    assert not all(answers.recent)


# --- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_brings_back_buffer_and_silence(run: Run) -> None:
    """The same rollouts are replayed, and as many empty responses are needed as without the break."""
    answers = afresh(run, silent={"talk": frozenset(range(400))})
    for step in range(3):
        answers.of_student(PLACES, step)
    other = afresh(run, silent=answers.silent)
    other.load_state(answers.state())
    assert as_lists(answers.state()) == as_lists(other.state())
    old, new = (said(one.replayed(range(5), 5, 7)) for one in (answers, other))
    assert old == new
    with pytest.raises(ModelError):
        other.of_student(PLACES[:10], 3)


def test_a_smaller_buffer_takes_the_newest(run: Run) -> None:
    """`rollouts.buffer_rows` may be another one."""
    answers, other = afresh(run), afresh(run, buffer=ReplayBuffer(2, seed=0))
    answers.of_student(PLACES[:5], 1)
    other.load_state(answers.state())
    assert [3, 4] == other.state()["rollouts/row"].tolist()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("rollouts/recent"), "the checkpoint has no replay buffer"),
        (lambda state: state.pop("rollouts/row"), "the replay buffer of the checkpoint is damaged"),
        (lambda state: state.update({"rollouts/ids": np.zeros(1)}), "the replay buffer of the checkpoint is"),
    ],
    ids=["none", "a column less", "ids cut"],
)
def test_a_damaged_checkpoint_is_one_line(run: Run, damage: Any, message: str) -> None:
    """What is there stays as it was."""
    answers = afresh(run)
    answers.of_student(PLACES[:3], 1)
    before, state = as_lists(answers.state()), dict(answers.state())
    damage(state)
    with pytest.raises(RunError, match=message) as error:
        answers.load_state(state)
    assert "\n" not in str(error.value)
    assert before == as_lists(answers.state())


# --- the teacher, and the data ---------------------------------------------------------------------


def test_the_teacher_s_responses_come_from_the_store(answers: Answers) -> None:
    """With the prompts they were given to."""
    assert answers.store is not None
    for answer in answers.of_teacher(PLACES):
        place = ("talk", answer.place.shard, answer.place.row)
        assert answers.store.read(place).ids.tolist() == answer.ids.tolist()
        assert answers.prompt(answer.place).tolist() == answer.prompt.tolist()
        assert 0 == answer.step


def test_a_teacher_s_empty_responses_are_left_out(run: Run) -> None:
    """Those whose every token ends or pads a text."""
    every = afresh(run).of_teacher(PLACES)
    words = frozenset(every[2].ids.tolist())
    kept = afresh(run, silent={"talk": words}).of_teacher(PLACES)
    expected = [a.place for a in every if not set(a.ids.tolist()) <= words]
    assert expected == [answer.place for answer in kept]
    assert len(kept) < len(every)


def test_the_data_s_own_response_is_what_follows_the_prompt(answers: Answers) -> None:
    """Prompt and response are the row, without its padding."""
    rows = answers.prompts["talk"].rows
    for place in PLACES:
        whole = RowReader(rows).read(place.shard, place.row)[: rows.tokens_at(place.shard, place.row)]
        response = answers.of_data(place)
        assert len(response) > 0
        assert whole.tolist() == [*answers.prompt(place).tolist(), *response.tolist()]


# --- the number of a step --------------------------------------------------------------------------


def test_the_number_of_a_step_is_uniform_and_its_own() -> None:
    """A function of seed and step, in [0, 1); of 2000 steps half are below one half."""
    numbers = [uniform_of(0, step) for step in range(2000)]
    assert 0 <= min(numbers) < max(numbers) < 1
    assert 0.46 < np.mean(np.array(numbers) < 0.5) < 0.54
    assert numbers[:9] == [uniform_of(0, step) for step in range(9)]
    assert numbers[:9] != [uniform_of(1, step) for step in range(9)]
