"""Excess loss and KL in a run: asked for by policy or config, the right numbers, exact after a resume."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ddkmix.config import parse_config
from ddkmix.errors import ConfigError
from ddkmix.gaps import measure_gaps
from ddkmix.held_out import select_rows
from ddkmix.measures import MEASURES, check_measures, needs_of
from ddkmix.models import build_student, load_teacher
from ddkmix.policies import policy_of
from ddkmix.predicted_tokens import predicted
from ddkmix.preflight import check
from ddkmix.prepare import open_rows
from ddkmix.records import read_lines
from ddkmix.reweighting import Reweighter
from ddkmix.setup import train
from ddkmix.types import DomainLosses
from tests.conftest import ConfigTree

Make = Callable[..., ConfigTree]
BOTH = ["excess_loss", "forward_kl"]


@dataclass(frozen=True)
class Needy:
    """Weights in proportion to excess x KL."""

    needs: ClassVar[frozenset[str]] = frozenset(BOTH)

    def init(self, losses: DomainLosses, natural_weights: Any) -> dict[str, Any]:
        """As `update`."""
        return self.update({}, losses)

    def update(self, state: dict[str, Any], losses: DomainLosses) -> dict[str, Any]:
        """From the losses alone."""
        assert losses.excess_loss is not None
        assert losses.forward_kl is not None
        product = losses.excess_loss * losses.forward_kl
        return {"mixture_weights": (product / product.sum()).tolist()}


class Wrapping:
    """What guards do: the needs of the policy inside, as an attribute."""

    def __init__(self, inner: object) -> None:
        self.needs = needs_of(inner)


def test_a_policy_says_what_it_needs() -> None:
    """Nothing where it does not say; through a wrapper too; what nobody measures is refused."""
    assert set(BOTH) == set(MEASURES) == needs_of(Needy())
    assert frozenset() == needs_of(policy_of("ddk"))
    assert needs_of(Needy()) == needs_of(Wrapping(Needy()))
    for wrong in ({"entropy"}, "excess_loss"):
        inner = type("Wrong", (), {"needs": wrong})()
        with pytest.raises(ConfigError, match=r"policy Wrong needs .* give a set of excess_loss, forward_kl"):
            needs_of(inner)


@pytest.mark.parametrize(
    ("expected", "measures", "options"),
    [
        ("evaluation.reference = 'cards' gives one number for a domain", BOTH[:1], {"reference": "cards"}),
        ("and the teacher models/t has other tokens", BOTH[1:], {"one_tokenizer": False}),
        ("forward_kl needs the teacher at every evaluation", BOTH, {"live": False}),
        (None, BOTH[:1], {"live": False}),
        (None, [], {"live": False, "one_tokenizer": False, "reference": "cards"}),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tiny_config: Make, expected: str | None, measures: list[str], options: dict[str, Any]
) -> None:
    """A store serves the excess, whose teacher is read once, but no KL; other tokens and cards neither."""
    reference = options.pop("reference", "teacher")
    tree = tiny_config(teacher={"model": "models/t"}, evaluation={"reference": reference})
    config = parse_config(tree, where="test")
    options = {"live": True, "one_tokenizer": True, **options}
    if expected is None:
        check_measures(frozenset(measures), config, **options)
        return
    with pytest.raises(ConfigError, match=expected) as error:
        check_measures(frozenset(measures), config, **options)
    assert "\n" not in str(error.value)


def test_a_run_that_could_not_measure_is_refused_at_once(tiny_config: Make) -> None:
    """By lint, before a model is loaded; a policy's need counts like the config's."""
    tree = tiny_config(policy={"name": "tests.test_measures:Needy"}, signal={"source": "store"})
    with pytest.raises(ConfigError, match="forward_kl needs the teacher at every evaluation"):
        check(parse_config(tree, where="test"))
    tree = tiny_config(evaluation={"measures": ["excess"]})
    with pytest.raises(ConfigError, match=r"evaluation\.measures"):
        parse_config(tree, where="test")


def test_both_are_those_of_whole_logits_in_float64(tiny_config: Make) -> None:
    """Of every predicted token of every held-out row, from the models' own logits; DoReMi's excess, and
    sum p log(p / q) over all classes."""
    config = parse_config(tiny_config(evaluation={"measures": BOTH}), where="test")
    losses, _ = measure_gaps(config)
    packed = open_rows(check(config), shown=False)
    models = [load_teacher(config.teacher), build_student(config.student, config.teacher, seed=0).eval()]
    for i, name in enumerate(losses.domains):
        held_out = select_rows(packed[name].held_out, config.evaluation.rows)
        rows = held_out.open(None)
        ids, labels = rows.read(range(len(held_out.num_tokens)))
        rows.close()
        where = predicted(labels)
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[:, :-1][where].double().log_softmax(-1) for m in models)
        targets = labels[:, 1:][where][:, None]
        excess = (log_p - log_q).gather(1, targets).clamp(min=0).mean().item()
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
        assert losses.excess_loss is not None
        assert losses.forward_kl is not None
        assert excess == pytest.approx(losses.excess_loss[i], rel=1e-5)
        assert kl == pytest.approx(losses.forward_kl[i], rel=1e-5)
        assert losses.excess_loss[i] > max(0.0, losses.loss_gap[i])
        assert kl > 0


def test_gaps_measure_only_what_they_are_asked(tiny_config: Make) -> None:
    """The policy of a config is nobody's business there: nothing is trained."""
    tree = tiny_config(policy={"name": "tests.test_measures:Needy"}, signal={"source": "store"})
    losses, _ = measure_gaps(parse_config(tree, where="test"))
    assert (None, None) == (losses.excess_loss, losses.forward_kl)


def test_a_run_records_what_its_policy_saw_and_resumes_exactly(tmp_path: Path, tiny_config: Make) -> None:
    """Recorded columns give the recorded weights; a run that stopped, and lost the cache, has the same
    records."""
    tree = tiny_config(
        policy={"name": "tests.test_measures:Needy"},
        guards="off",  # they would shorten its moves
        mixture={"interval_steps": 2},
        trainer={"steps": 5, "checkpoint_steps": 3, "keep_checkpoints": 9},
        cache_dir=str(tmp_path / "cache"),
    )
    runs = []
    for name in ("whole", "stopped"):
        config = parse_config({**tree, "run_dir": str(tmp_path / name)}, where="test")
        train(config)
        if name == "stopped":
            (tmp_path / name / "checkpoints" / "step-000005").rename(tmp_path / "gone")
            for path in (tmp_path / "cache" / "teacher_nats").iterdir():
                path.unlink()
            train(config, resume=True)
        runs.append((tmp_path / name / "intervals.jsonl").read_bytes())
    assert runs[0] == runs[1]
    for record in list(read_lines(tmp_path / "whole" / "intervals.jsonl"))[:-1]:
        product = {d: row["excess_loss"] * row["forward_kl"] for d, row in record["losses"].items()}
        expected = {name: value / sum(product.values()) for name, value in product.items()}
        assert expected == pytest.approx(record["weights"], abs=1e-6)


def test_each_domain_is_compared_with_its_own_teacher(tiny_config: Make, tmp_path: Path) -> None:
    """KL of a student to itself is 0 where it is the teacher, and not where another one teaches."""
    from tests.conftest import save_tiny_model, write_domain

    base = tiny_config()
    other = save_tiny_model(tmp_path / "other", Path(base["teacher"]["model"]), seed=3)
    for name in ("code", "math"):
        write_domain(tmp_path, name, teacher="other" if name == "math" else None)
    tree = tiny_config(
        domains=[str(tmp_path)],
        cache_dir=str(tmp_path / "cache"),
        teachers={"other": {"model": str(other), "dtype": "float32"}},
        student={"init": "load", "layers": None, "model": base["teacher"]["model"]},
        evaluation={"measures": BOTH},
    )
    losses, _ = measure_gaps(parse_config(tree, where="test"))
    assert losses.forward_kl is not None
    assert losses.excess_loss is not None
    assert [0.0, 0.0] == pytest.approx([losses.forward_kl[0], losses.excess_loss[0]], abs=1e-6)
    assert losses.forward_kl[1] > 0.1 < losses.excess_loss[1]


class Measuring:
    """An evaluator that says what it measures."""

    def __init__(self, measures: frozenset[str]) -> None:
        self.measures = measures

    def measure(self, model: Any, /) -> DomainLosses:
        """Never asked."""
        raise AssertionError


def test_a_reweighter_wants_an_evaluator_that_measures_what_its_policy_needs() -> None:
    """At once, not at the first interval; one that does not say is believed."""
    from ddkmix import MixtureBatchSampler

    indices = {"a": np.arange(5), "b": np.arange(5, 9)}
    mixture = MixtureBatchSampler(indices, batch_rows=2)
    with pytest.raises(ConfigError, match=r"policy Needy needs forward_kl, .* measures=\['forward_kl'\]\)"):
        Reweighter(mixture, Measuring(frozenset({"excess_loss"})), Needy())
    Reweighter(mixture, Measuring(frozenset(BOTH)), Needy())
    Reweighter(mixture, None, Needy())
