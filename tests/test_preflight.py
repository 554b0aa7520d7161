"""What is checked before a model is loaded; the messages themselves are in test_cli."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ddkmix.config import Guards, parse_config
from ddkmix.errors import ConfigError, ModelError
from ddkmix.policies import Ddk, Guarded
from ddkmix.policies.guards import describe
from ddkmix.preflight import check, dummy_losses
from tests.conftest import ConfigTree, save_tiny_model

Make = Callable[..., ConfigTree]


def test_a_sound_config_gives_its_parts(tiny_config: Make) -> None:
    """Domains in order, the tokenizer, policy and losses by name, and no cut of equal vocabularies."""
    prepared = check(parse_config(tiny_config(), where="test"))
    assert ["code", "math", "prose"] == [domain.name for domain in prepared.domains]
    assert ["cross_entropy", "forward_kl"] == [term.name for term in prepared.terms]
    assert [1.0, 0.2] == [term.weight for term in prepared.terms]
    assert prepared.vocab_size is None
    assert 300 == prepared.tokenizer.vocab_size


def test_vocabularies_padded_to_different_lengths_are_cut_to_the_shorter(
    tmp_path: Path, tiny_config: Make, tokenizer_folder: Path
) -> None:
    """320 classes against 352: both heads keep 320."""
    student = save_tiny_model(tmp_path / "student", tokenizer_folder, vocab_size=352)
    tree = tiny_config(student={"init": "load", "layers": None, "model": str(student)})
    assert 320 == check(parse_config(tree, where="test")).vocab_size


def test_a_model_from_a_config_is_checked_with_its_overrides(tiny_config: Make) -> None:
    """A from-scratch student with fewer positions than a row, or fewer classes than tokens, is refused."""
    scratch = {"init": "config", "layers": None}
    tree = tiny_config(student={**scratch, "overrides": {"max_position_embeddings": 16}})
    with pytest.raises(ConfigError, match=r"seq_len = 32; the student has 16 positions"):
        check(parse_config(tree, where="test"))
    tree = tiny_config(student={**scratch, "overrides": {"vocab_size": 100}})
    with pytest.raises(ModelError, match="the student has 100 output classes"):
        check(parse_config(tree, where="test"))


def test_the_world_size_of_a_launcher_is_respected(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WORLD_SIZE is known before Accelerate starts, and so is a batch that it does not divide."""
    config = parse_config(tiny_config(), where="test")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="batch_rows = 6 cannot be dealt evenly to 4 processes"):
        check(config)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"floor": 0.4}, "guards.floor = 0.4 for each of 3 domains is 1.2, more than the whole mixture"),
        ({"cap": 0.3}, "guards.cap = 0.3 for each of 3 domains is 0.9, less than the whole mixture"),
    ],
)
def test_guards_that_no_mixture_keeps_are_refused_before_a_model_is_loaded(
    tiny_config: Make, guards: object, message: str
) -> None:
    """The number of domains is known from the cards."""
    with pytest.raises(ConfigError, match=message):
        check(parse_config(tiny_config(guards=guards), where="test"))


def test_evidence_wants_more_than_one_held_out_row(tiny_config: Make) -> None:
    """One row has no standard error. Without evidence, and for a mixture that never moves, one is enough."""
    single = {"evaluation": {"rows": 1}}
    with pytest.raises(ConfigError, match=r"evaluation.rows = 1 gives no standard error of a gap") as error:
        check(parse_config(tiny_config(**single), where="test"))
    assert "\n" not in str(error.value)
    check(parse_config(tiny_config(**single, guards={"evidence": 0}), where="test"))
    check(parse_config(tiny_config(**single, policy={"name": "static"}), where="test"))


def test_the_policy_of_a_run_is_inside_its_guards(tiny_config: Make) -> None:
    """By default; `guards: off` is the policy itself."""
    by_default, off = (
        check(parse_config(tiny_config(**more), where="test")).policy for more in ({}, {"guards": False})
    )
    assert Guarded(policy=Ddk(), guards=Guards()) == by_default
    assert Ddk() == off
    assert "floor 0.03333, cap 0.6667, evidence 1 standard errors" == describe(by_default, 3)
    assert "off" == describe(off, 3)


def test_dummy_losses_have_equal_gaps() -> None:
    """A policy tried on them sees no reason to prefer a domain."""
    losses = dummy_losses(("a", "b", "c"), gap=0.5)
    assert losses.excess_loss is not None and losses.forward_kl is not None
    assert [[0.5] * 3] * 2 == [losses.excess_loss.tolist(), losses.forward_kl.tolist()]
    assert [0.5, 0.5, 0.5] == losses.loss_gap.tolist()
