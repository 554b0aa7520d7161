"""Teachers of a config as a run has them: measured once each on their own domains, and asked in training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ddkmix.config import RunConfig, Teacher, parse_config
from ddkmix.errors import RunError
from ddkmix.gaps import measure_gaps
from ddkmix.models import build_student, load_teacher
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.teacher import LiveTeacher
from ddkmix.teaching import held_out_rows, open_evaluator, open_teachers, teacher_nats
from tests.conftest import ConfigTree, reset_accelerate, save_tiny_model, write_domain

Make = Callable[..., ConfigTree]


@pytest.fixture
def expert(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A second teacher."""
    return save_tiny_model(tmp_path / "expert", tokenizer_folder, seed=5)


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """code has the default teacher, math the expert, prose an ensemble of both."""
    for name, teacher in (("code", None), ("math", "expert"), ("prose", "both")):
        write_domain(tmp_path / "cards", name, shards=1, teacher=teacher)
    return tmp_path / "cards"


@pytest.fixture
def tree(tmp_path: Path, tiny_config: Make, cards: Path, expert: Path) -> ConfigTree:
    """A run with all three."""
    teachers = {
        "expert": {"model": str(expert), "dtype": "float32"},
        "both": {"ensemble": {"teacher": 1.0, "expert": 3.0}},
    }
    cache = str(tmp_path / "cache")
    return tiny_config(domains=[str(cards)], teachers=teachers, cache_dir=cache, evaluation={"rows": 4})


def config_of(tree: ConfigTree) -> RunConfig:
    """A checked config."""
    return parse_config(tree, where="test")


def alone(tree: ConfigTree, model: Path) -> ConfigTree:
    """The same run with one teacher for all domains."""
    cards = Path(tree["domains"][0])
    plain = {"model": str(model), "dtype": "float32"}
    return {**tree, "teachers": {"expert": plain, "both": plain}, "teacher": plain, "domains": [str(cards)]}


def test_each_domain_is_measured_with_its_own_teacher(
    tree: ConfigTree, tiny_teacher: Path, expert: Path
) -> None:
    """Losses of code and math are those of runs with only that teacher; that of prose is neither's."""
    mixed, general, special = (
        measure_gaps(config_of(each))[0] for each in (tree, alone(tree, tiny_teacher), alone(tree, expert))
    )
    assert ("code", "math", "prose") == mixed.domains
    code, math, prose = range(3)
    assert general.teacher_loss[code] == mixed.teacher_loss[code] != special.teacher_loss[code]
    assert special.teacher_loss[math] == mixed.teacher_loss[math] != general.teacher_loss[math]
    assert mixed.teacher_loss[prose] not in (general.teacher_loss[prose], special.teacher_loss[prose])


def test_held_out_losses_of_an_ensemble_are_literal(
    tree: ConfigTree, tiny_teacher: Path, expert: Path
) -> None:
    """-log of the normalised product of powers, summed over each row."""
    prepared, accelerator = check(config_of(tree)), Accelerator()
    held_out = held_out_rows(prepared.config, open_rows(prepared, shown=False))
    evaluator = open_evaluator(prepared.config, held_out, accelerator.device)
    nats = teacher_nats(prepared, evaluator, open_teachers(prepared, accelerator.device))
    sums = nats.sums["prose"]
    rows = evaluator.held_out["prose"].open(None)
    ids, labels = rows.read(range(len(sums)))
    rows.close()
    models = [load_teacher(Teacher(model=str(m), dtype="float32")) for m in (tiny_teacher, expert)]
    with torch.no_grad():
        first, second = (model(ids).logits[:, :-1].double().softmax(-1) for model in models)
    p = first**0.25 * second**0.75
    p = p / p.sum(-1, keepdim=True)
    nats = F.nll_loss(p.log().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    assert nats.reshape(len(sums), -1).sum(1).tolist() == pytest.approx(sums.tolist(), rel=1e-5)


def test_a_teacher_is_measured_once_and_found_again(tree: ConfigTree) -> None:
    """Its losses are kept by content: another run with the same teacher in a domain measures nothing."""

    def files() -> set[str]:
        return {path.name for path in (Path(tree["cache_dir"]) / "teacher_nats").iterdir()}

    measure_gaps(config_of(tree))
    before = files()
    reset_accelerate()
    measure_gaps(config_of(tree | {"teachers": {**tree["teachers"], "more": {"model": "unused"}}}))
    assert 3 == len(before)
    assert before == files()


def test_the_recorded_loss_is_that_of_each_rows_teacher(
    tree: ConfigTree, tmp_path: Path, tiny_teacher: Path, expert: Path
) -> None:
    """The first step's forward KL, from full logits: rows of code against the teacher, of math against the
    expert, of prose against the geometric mean of the two."""
    tree = {
        **tree,
        "trainer": {**tree["trainer"], "steps": 1, "batch_rows": 12},
        "policy": {"name": "static"},
    }
    config = config_of({**tree, "run_dir": str(tmp_path / "run")})
    train(config)
    mixture = open_mixture(config, open_rows(check(config), shown=False))
    mixture.set_weights(dict.fromkeys(mixture.domains, 1 / 3))
    batch = next(mixture)
    ids, labels, domain = batch["input_ids"], batch["labels"][:, 1:], batch["domain_ids"]
    assert {0, 1, 2} == set(domain.tolist())
    student = build_student(config.student, config.teacher, seed=0).eval()
    models = [load_teacher(Teacher(model=str(m), dtype="float32")) for m in (tiny_teacher, expert)]
    with torch.no_grad():
        log_q = student(ids).logits[:, :-1].double().log_softmax(-1)
        first, second = (model(ids).logits[:, :-1].double().softmax(-1) for model in models)
    mean = first**0.25 * second**0.75
    p = torch.stack([first, second, mean / mean.sum(-1, keepdim=True)])[domain, torch.arange(len(ids))]
    expected = (p * (p.log() - log_q)).sum(-1)[labels != -100].mean().item()
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert expected == pytest.approx(line["train/forward_kl"], rel=1e-4)


def test_another_teacher_on_resume_is_refused_or_asked_for(tree: ConfigTree, cards: Path) -> None:
    """A card that names another teacher changes nothing in the config; the checkpoint still knows."""
    train(config_of({**tree, "trainer": {**tree["trainer"], "steps": 3}}))
    again = config_of({**tree, "trainer": {**tree["trainer"], "steps": 3}})
    card = cards / "code.yaml"
    card.write_text(card.read_text() + "teacher: expert\n")
    reset_accelerate()
    with pytest.raises(RunError, match=r"the teacher of code is not the one that the run began with"):
        train(again, resume=True)
    reset_accelerate()
    train(again, resume=True, allow_changes=True)
    (line,) = read_lines(again.run_dir / "changes.jsonl")
    assert ["code has another teacher"] == line["changes"]


def test_one_model_in_two_teachers_is_loaded_once(tree: ConfigTree) -> None:
    """A member of an ensemble that also teaches alone is the same object."""
    teachers = open_teachers(check(config_of(tree)), torch.device("cpu"))
    assert {"teacher", "expert", "both"} == set(teachers)
    assert isinstance(teachers["teacher"], LiveTeacher)
    assert teachers["teacher"] is teachers["both"].members[0]
