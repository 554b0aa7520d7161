"""What an objective needs of a config, found before a model is loaded; every refusal is one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddkmix.card import PromptResponse
from ddkmix.config import RunConfig, Teacher, parse_config
from ddkmix.domains import Domain
from ddkmix.errors import ConfigError
from ddkmix.losses import build_terms
from ddkmix.objective_checks import check_objective
from ddkmix.objectives import OBJECTIVES, build_objective
from ddkmix.teachers import Teachers
from tests.objectives.conftest import run_tree

ASKING = sorted({*OBJECTIVES} - {"distill"})
"""Objectives that want responses."""


def config_of(**sections: Any) -> RunConfig:
    """A config whose files nobody looks at, with the paper's loss where it must look at the teacher."""
    loss = {"gkd": [{"name": "jsd"}], "distillm": [{"name": "skew_kl"}]}
    name = sections.get("objective", {}).get("name")
    sections = {**({"loss": loss[name]} if name in loss else {}), **sections}
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


def rest_of(config: RunConfig, own: Teachers, one_tokenizer: bool) -> dict[str, Any]:
    """What else is looked at: terms of the loss, and a domain of prompts."""
    objective = build_objective(config.objective.model_dump())
    prompts = PromptResponse(messages="messages")
    return {
        "terms": build_terms(config.loss, may_be_empty=objective.stands_alone),
        "one_tokenizer": one_tokenizer,
        "teachers": own,
        "domains": [Domain(name="talk", card=Path("talk.yaml"), license="MIT", prompt_response=prompts)],
    }


def refused(message: str, config: RunConfig, *, own: Teachers = ONE, one_tokenizer: bool = True) -> None:
    """One line that holds a message."""
    objective = build_objective(config.objective.model_dump())
    with pytest.raises(ConfigError, match=message) as error:
        check_objective(objective, config, **rest_of(config, own, one_tokenizer))
    assert "\n" not in str(error.value)


def accepted(config: RunConfig, own: Teachers = ONE, *, one_tokenizer: bool = True) -> None:
    """No error."""
    objective = build_objective(config.objective.model_dump())
    check_objective(objective, config, **rest_of(config, own, one_tokenizer))


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


@pytest.mark.parametrize("name", ["gkd", "distillm"])
def test_every_loss_on_the_students_own_responses_looks_at_the_teacher(name: str) -> None:
    """Cross-entropy there would teach what the student says already; elsewhere it is on the data."""
    loss = [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}]
    refused(f"loss cross_entropy with objective {name}: ", config_of(objective={"name": name}, loss=loss))
    accepted(config_of(objective={"name": name}, loss=loss[:1]))
    accepted(config_of(objective={"name": "seqkd"}, loss=loss))
    accepted(config_of(objective={"name": "dpkd"}, loss=loss))


@pytest.mark.parametrize("name", ASKING)
def test_some_domain_has_prompts(name: str) -> None:
    """As far as cards tell: packed rows may have some."""
    config = config_of(objective={"name": name})
    objective = build_objective(config.objective.model_dump())
    rest = rest_of(config, ONE, one_tokenizer=True)
    text = Domain(name="prose", card=Path("prose.yaml"), license="MIT")
    with pytest.raises(ConfigError, match="none of the domains prose, prose has prompts"):
        check_objective(objective, config, **{**rest, "domains": [text, text]})
    check_objective(objective, config, **{**rest, "domains": [text, replace(text, rows="rows")]})


@pytest.mark.parametrize(
    ("name", "option"), [("distillm2", "moving_skew"), ("minillm", "whiten")], ids=lambda value: value
)
def test_a_micro_batch_of_one_row_has_nothing_to_compare(name: str, option: str) -> None:
    """Its mean is its own number."""
    objective = {"name": name, option: True}
    one = config_of(objective=objective, trainer={"microbatch_rows": 1})
    refused(f"objective.{option} compares the rows .*microbatch_rows = 1", one)
    accepted(config_of(objective=objective, trainer={"microbatch_rows": 2}))
    accepted(config_of(objective={"name": name}, trainer={"microbatch_rows": 1}))
