"""Objectives by name: what they are made of, where responses come from, and what a config may not say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from ddkmix.errors import ConfigError
from ddkmix.objectives import (
    GKD,
    OBJECTIVES,
    DistiLLM,
    DistiLLM2,
    MiniLLMObjective,
    Objective,
    Pairs,
    Part,
    build_objective,
)
from ddkmix.preference import PAIR_LOSSES, Dpkd
from ddkmix.preference.contrastive import ContrastiveSkew
from ddkmix.preference.minillm import MiniLLM
from ddkmix.preference.rewards import PAIR_MEASURES
from ddkmix.preference.steps import PairStep, PolicyGradientStep, SkewStep

PAIR_NAMES = sorted({*PAIR_LOSSES} & {*OBJECTIVES})
ABOUT: dict[str, Any] = {"step": 5, "steps": 10, "uniform": 0.4, "stored": 8}


def of(words: str) -> dict[str, str]:
    """A batch that says what it is."""
    return {"of": words}


@dataclass
class Rows:
    """What an objective asks of the rows of a step, as the words that it asked with."""

    source: str = "generate"
    terms: tuple[str, ...] = ("cross_entropy",)
    batch: dict[str, str] = field(default_factory=lambda: of("data"))
    step: int = 5
    steps: int = 10
    asked: list[str] = field(default_factory=list)

    def anchor(self) -> list[Part]:
        """`loss` on the data."""
        return [Part(name="train", batch=self.batch, what=self.terms)] if self.terms else []

    def student_responses(self) -> str:
        """Once a step on every rank: it is collective."""
        self.asked.append("student")
        return "student"

    def teacher_responses(self, answers: str | None = None) -> str:
        """To prompts, or to those of answers."""
        return "teacher" if answers is None else f"teacher to those of {answers}"

    def with_responses(self, answers: str) -> dict[str, str]:
        """Text, and answers."""
        return of(f"text and {answers}")

    def of_responses(self, answers: str) -> dict[str, str]:
        """Answers alone."""
        return of(answers)

    def pairs(self, rejected: str, *, graded: bool = False) -> dict[str, str]:
        """Teacher and student."""
        return of(f"pairs with {rejected}{', graded' if graded else ''}")


def parts(objective: Objective, **changes: Any) -> dict[str, tuple[Any, Any, bool]]:
    """Parts of a step by name: what they are of, what is learnt, and whether in pairs."""
    found = objective.parts(Rows(**changes))
    return {part.name: (part.batch["of"], part.what, part.in_pairs) for part in found}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_built_by_its_name_alone(name: str) -> None:
    """It offers what the trainer asks of it, and needs nothing that there is not."""
    objective = build_objective({"name": name})
    assert isinstance(objective, Objective)
    assert {"teacher_responses", "student_responses"} >= objective.needs
    state = objective.init(2.0)
    assert objective.decide(objective.update(state, 2.0), **ABOUT) in ("dataset", "generate", "replay")
    assert isinstance(objective.windows(), Mapping)
    assert (objective.needs == frozenset()) == (name == "distill")


def test_parameters_reach_the_loss_and_the_pairs() -> None:
    """In one mapping, as a config has them."""
    found = build_objective({"name": "dpkd", "beta": 0.3, "weight": 2.0, "chosen_nll": 0.1, "fresh": 0.5})
    assert isinstance(found, Pairs)
    assert Dpkd(beta=0.3) == found.loss
    assert (2.0, 0.1, 0.5) == (found.settings.weight, found.settings.chosen_nll, found.settings.fresh)
    assert "dpkd" == found.name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "dpdk"}, ["objective.name = 'dpdk' is unknown", "dpkd"]),
        ({}, ["objective.name is missing"]),
        ({"name": "ddkmix.preference.dpkd:Dpkd"}, ["is a Dpkd and has not the methods of an objective"]),
        ({"name": "chosen_nll"}, ["objective.name = 'chosen_nll' is unknown"]),
        ({"name": "dpkd", "fesh": 0.5}, ["objective (dpkd) has no parameter 'fesh'", "fresh"]),
        ({"name": "dpkd", "bta": 0.5}, ["objective (dpkd) has no parameter 'bta'", "beta"]),
        ({"name": "dpkd", "fresh": 0.0}, ["objective.fresh = 0.0"]),
        ({"name": "dpkd", "beta": -1}, ["objective.beta = -1"]),
        ({"name": "dpkd", "weight": 0}, ["objective.weight = 0"]),
        ({"name": "dpkd", "weight": float("nan")}, ["objective.weight = nan"]),
        ({"name": "dpkd", "gamma": 1.0}, ["objective (dpkd) has no parameter 'gamma'"]),
        ({"name": "seqkd", "beta": 0.1}, ["objective (seqkd) has no parameter 'beta'", "it has none"]),
        ({"name": "gkd", "share": 1.5}, ["objective.share = 1.5"]),
        ({"name": "gkd", "share": "half"}, ["objective.share = 'half'"]),
        ({"name": "minillm", "teacher_share": 1.0}, ["objective.teacher_share = 1.0"]),
        ({"name": "minillm", "single_step": False}, ["objective: ", "own_step: true"]),
        ({"name": "distillm", "fresh": 0.5}, ["objective.fresh = 0.5"]),
        ({"name": "distillm2", "skew": 1.0}, ["objective.skew = 1.0"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line(spec: dict[str, Any], words: list[str]) -> None:
    """The key, the value got, and the rule or the nearest name."""
    with pytest.raises(ConfigError) as error:
        build_objective(spec)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# --- where responses come from ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAIR_NAMES, "distillm2"])
def test_pairs_replay_a_share_of_the_steps(name: str) -> None:
    """New responses below `fresh`, and while the buffer has none."""
    objective = build_objective({"name": name, "fresh": 0.5})
    found = [
        objective.decide({}, step=0, steps=9, uniform=uniform, stored=stored)
        for uniform, stored in ((0.49, 8), (0.5, 8), (0.99, 0))
    ]
    assert ["generate", "replay", "generate"] == found
    always = build_objective({"name": name})
    assert "generate" == always.decide({}, step=0, steps=9, uniform=0.999, stored=8)


def test_gkd_takes_the_data_or_the_student_and_never_the_buffer() -> None:
    """By lambda, whatever step it is and whatever is stored; 0 and 1 are always."""
    shares = {0.3: ["generate", "dataset"], 0.0: ["dataset"] * 2, 1.0: ["generate"] * 2}
    for share, expected in shares.items():
        found = [
            GKD(share=share).decide({}, step=3, steps=9, uniform=uniform, stored=8) for uniform in (0.29, 0.3)
        ]
        assert expected == found


def test_distill_seqkd_and_minillm_decide_once_and_for_all() -> None:
    """The data; the data; new samples."""
    found = {
        name: {
            build_objective({"name": name}).decide({}, step=0, steps=1, uniform=uniform, stored=8)
            for uniform in (0.0, 0.99)
        }
        for name in ("distill", "seqkd", "minillm")
    }
    assert {"distill": {"dataset"}, "seqkd": {"dataset"}, "minillm": {"generate"}} == found


def test_distillm_follows_the_validation_loss() -> None:
    """phi rises where the loss did, and late in the run its share comes from a full buffer."""
    objective = DistiLLM(start=0.4, tolerance=0.1, capacity=8)
    state = objective.init(2.0)
    assert state == objective.update(state, 2.05)
    state = objective.update(state, 2.2)
    assert {"threshold": 0.5, "last_loss": 2.2} == pytest.approx(state)
    about = {"steps": 10, "stored": 8}
    assert "dataset" == objective.decide(state, step=2, uniform=0.5, **about)
    assert "generate" == objective.decide(state, step=2, uniform=0.39, **about)
    assert "replay" == objective.decide(state, step=2, uniform=0.41, **about)
    assert "generate" == objective.decide(state, step=9, uniform=0.41, steps=10, stored=7)


# --- parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_pairs_stand_beside_the_anchor(name: str) -> None:
    """One part in pairs, graded where the loss asks; its values have names; without `loss` no anchor."""
    objective = build_objective({"name": name, "chosen_nll": 0.2, "weight": 3.0})
    found = parts(objective)
    assert ["train", "pairs"] == list(found)
    batch, what, in_pairs = found["pairs"]
    assert in_pairs
    assert isinstance(what, PairStep)
    assert f"pairs with student{', graded' if name == 'plad_margin' else ''}" == batch
    (values,) = objective.windows().values()
    assert (name, "chosen_nll", *PAIR_MEASURES) == values
    assert len(values) == len(what.weights)
    assert [3.0, pytest.approx(0.6)] == what.weights[:2]
    assert ["pairs"] == list(parts(objective, terms=()))
    assert objective.stands_alone


def test_minillm_s_samples_stand_beside_the_anchor() -> None:
    """With the objective's own parameters."""
    objective = build_objective({"name": "minillm", "teacher_share": 0.3, "weight": 2.0})
    assert isinstance(objective, MiniLLMObjective)
    found = parts(objective)
    assert ["train", "minillm"] == list(found)
    batch, what, in_pairs = found["minillm"]
    assert isinstance(what, PolicyGradientStep)
    assert ("student", False, 2.0) == (batch, in_pairs, what.weight)
    assert what.minillm.teacher_share == 0.3
    assert isinstance(what.minillm, MiniLLM)
    assert len(objective.windows()["minillm"]) == len(what.weights)


def test_distillm2_s_sides_have_the_same_prompts() -> None:
    """The teacher's responses are to the prompts of the student's, which are asked for once."""
    objective = build_objective({"name": "distillm2", "weight": 0.5})
    assert isinstance(objective, DistiLLM2)
    rows = Rows()
    anchor, *sides = objective.parts(rows)
    found = {part.name: part for part in sides}
    assert ("train", ["student"]) == (anchor.name, rows.asked)
    assert {
        "teacher_responses": "teacher to those of student",
        "student_responses": "student",
    } == {name: part.batch["of"] for name, part in found.items()}
    for name, part in found.items():
        assert isinstance(part.what, SkewStep)
        assert (name == "teacher_responses") == part.what.of_teacher
        assert (5, 10, 0.5) == (part.what.step, part.what.steps, part.what.weight)
        assert isinstance(part.what.contrast, ContrastiveSkew)
        assert len(objective.windows()[name]) == len(part.what.weights)


@pytest.mark.parametrize("name", ["gkd", "distillm"])
def test_the_loss_is_on_the_data_or_on_the_student_s_responses(name: str) -> None:
    """One part, of the metrics that there are anyway."""
    objective = build_objective({"name": name})
    expected = {"dataset": "data", "generate": "text and student", "replay": "text and student"}
    for source, batch in expected.items():
        assert {"train": (batch, ("cross_entropy",), False)} == parts(objective, source=source)
    assert {} == objective.windows()
    assert not objective.stands_alone


def test_seqkd_puts_the_teacher_s_responses_in_the_place_of_the_data_s() -> None:
    """And distillation leaves everything as it is."""
    seqkd, distill = (build_objective({"name": name}) for name in ("seqkd", "distill"))
    assert {"train": ("text and teacher", ("cross_entropy",), False)} == parts(seqkd, source="dataset")
    assert {"train": ("data", ("cross_entropy",), False)} == parts(distill, source="dataset")


def test_an_objective_of_another_package_is_one() -> None:
    """`package.module:Name`, a frozen dataclass."""
    found = build_objective({"name": "ddkmix.objectives.replaced:GKD", "share": 0.25})
    assert GKD(share=0.25) == found
