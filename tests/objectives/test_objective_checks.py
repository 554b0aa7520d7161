"""What an objective needs of a config, found before a model is loaded; every refusal is one line."""

from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import RunConfig, Teacher, parse_config
from ddkmix.errors import ConfigError
from ddkmix.objective_checks import check_objective
from ddkmix.objectives import OBJECTIVES, build_objective
from ddkmix.teachers import Teachers
from tests.objectives.conftest import run_tree

ASKING = sorted({*OBJECTIVES} - {"distill"})
"""Objectives that want responses."""


def config_of(**sections: Any) -> RunConfig:
    """A config whose files nobody looks at."""
    folders = [Path(name) for name in ("cache", "cards", "teacher", "run")]
    return parse_config(run_tree(*folders, **sections), where="test")


def teachers(members: dict[str, dict[str, float]], domains: dict[str, str]) -> Teachers:
    """Teachers by name, and of domains."""
    names = {name for shares in members.values() for name in shares}
    models = {name: Teacher(model=name) for name in names}
    return Teachers(of_domain=domains, members=members, models=models)


ONE = teachers({"teacher": {"teacher": 1.0}}, {"code": "teacher", "talk": "teacher"})
TWO = teachers({"a": {"a": 1.0}, "b": {"b": 1.0}}, {"code": "a", "talk": "b"})
ENSEMBLE = teachers({"both": {"a": 0.5, "b": 0.5}}, {"code": "both", "talk": "both"})


def refused(message: str, config: RunConfig, *, own: Teachers = ONE, one_tokenizer: bool = True) -> None:
    """One line that holds a message."""
    objective = build_objective(config.objective.model_dump())
    with pytest.raises(ConfigError, match=message) as error:
        check_objective(objective, config, one_tokenizer=one_tokenizer, teachers=own)
    assert "\n" not in str(error.value)


def accepted(config: RunConfig, own: Teachers = ONE, *, one_tokenizer: bool = True) -> None:
    """No error."""
    objective = build_objective(config.objective.model_dump())
    check_objective(objective, config, one_tokenizer=one_tokenizer, teachers=own)


@pytest.mark.parametrize("name", ASKING)
def test_a_sound_config_is_accepted(name: str) -> None:
    """With the defaults of every section."""
    accepted(config_of(objective={"name": name}))


@pytest.mark.parametrize("name", ASKING)
def test_responses_need_one_tokenizer_a_live_teacher_and_whole_rows(name: str) -> None:
    """Whatever is learnt from them."""
    objective = {"name": name}
    refused("one tokenizer", config_of(objective=objective), one_tokenizer=False)
    refused("set signal.source to live", config_of(objective=objective, signal={"source": "store"}))
    refused(
        "trainer.document_boundaries = true",
        config_of(objective=objective, trainer={"document_boundaries": True}),
    )


def test_distillation_on_data_may_do_all_of_that() -> None:
    """It asks nobody for responses."""
    trainer = {"document_boundaries": True, "batch_rows": 2000}
    accepted(config_of(signal={"source": "store"}, trainer=trainer), TWO, one_tokenizer=False)


@pytest.mark.parametrize("name", sorted({*ASKING} - {"seqkd"}))
def test_a_buffer_holds_the_responses_of_a_step(name: str) -> None:
    """As many as rows; one that asks for no response of the student needs none."""
    sections = {"rollouts": {"buffer_rows": 5}, "trainer": {"batch_rows": 6}}
    objective: dict[str, Any] = {"name": name, **({"capacity": 5} if name == "distillm" else {})}
    refused("rollouts.buffer_rows = 5 holds less than the 6", config_of(objective=objective, **sections))
    accepted(config_of(objective=objective, rollouts={"buffer_rows": 6}, trainer={"batch_rows": 6}))
    accepted(config_of(objective={"name": "seqkd"}, **sections))


def test_a_buffer_can_be_full() -> None:
    """DistiLLM waits for that; both numbers are named."""
    objective = {"name": "distillm", "capacity": 9}
    refused("capacity = 9, .*buffer_rows = 8", config_of(objective=objective, rollouts={"buffer_rows": 8}))
    accepted(config_of(objective=objective, rollouts={"buffer_rows": 9}))


@pytest.mark.parametrize("rollouts", [{"temperature": 0.9}, {"top_k": 40}, {"top_p": 0.95}])
def test_policy_gradients_know_what_was_drawn(rollouts: dict[str, Any]) -> None:
    """The plain distribution alone; others may draw as they like."""
    refused("weighs responses by", config_of(objective={"name": "minillm"}, rollouts=rollouts))
    accepted(config_of(objective={"name": "gkd"}, rollouts=rollouts))


@pytest.mark.parametrize("own", [TWO, ENSEMBLE], ids=["by domain", "ensemble"])
def test_one_teacher_draws_with_the_student(own: Teachers) -> None:
    """Several can only comment: share 0. Pairs may have as many as there are."""
    refused(r"teacher_share = 0.2: one teacher", config_of(objective={"name": "minillm"}), own=own)
    accepted(config_of(objective={"name": "minillm", "teacher_share": 0.0}), own)
    accepted(config_of(objective={"name": "gkd"}), own)
