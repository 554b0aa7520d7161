"""The loop: what it optimises, what it writes down, and that batching changes neither."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddkmix.config import RunConfig, parse_config
from ddkmix.errors import ConfigError, ModelError, NumericsError
from ddkmix.models import build_student, load_teacher
from ddkmix.planner import ROW
from ddkmix.policies.ddk import Ddk
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.setup import train
from tests.conftest import ConfigTree, reset_accelerate, write_domain

Make = Callable[..., ConfigTree]


def trained(tree: ConfigTree, run_dir: Path) -> tuple[RunConfig, list[dict[str, Any]], list[dict[str, Any]]]:
    """Train; the config, the lines of metrics and of intervals."""
    config = parse_config({**tree, "run_dir": str(run_dir)}, where="test")
    train(config)
    return config, *(list(read_lines(run_dir / f"{name}.jsonl")) for name in ("metrics", "intervals"))


def test_every_gap_falls_and_the_student_loads(tmp_path: Path, tiny_config: Make) -> None:
    """A short run brings the student closer in every domain, and leaves a folder that transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tree = tiny_config(trainer={"steps": 30}, optimizer={"lr": 3e-3}, mixture={"interval_steps": 10})
    config, metrics, intervals = trained(tree, tmp_path / "run")
    first, last = intervals[0]["losses"], intervals[-1]["losses"]
    assert all(last[domain]["loss_gap"] < first[domain]["loss_gap"] - 0.1 for domain in first)
    assert [0, 10, 20, 30] == [record["step"] for record in intervals]
    assert list(range(1, 31)) == [record["step"] for record in metrics]
    student = AutoModelForCausalLM.from_pretrained(config.run_dir / "student")
    tokenizer = AutoTokenizer.from_pretrained(config.run_dir / "student")
    ids = tokenizer("the old man and the sea", return_tensors="pt").input_ids
    assert student(input_ids=ids).logits.isfinite().all()
    assert 1 == student.config.num_hidden_layers


def test_the_weights_of_each_interval_are_the_policys(tmp_path: Path, tiny_config: Make) -> None:
    """Recorded losses fed to the policy by hand give the recorded weights: natural first, then Eq. 2; and the
    rows that each interval serves stay within one row per weight change of those weights."""
    tree = tiny_config(
        trainer={"steps": 12, "batch_rows": 12},
        policy={"name": "ddk"},
        guards=False,
        mixture={"interval_steps": 4},
    )
    _, metrics, intervals = trained(tree, tmp_path / "run")
    domains = sorted(intervals[0]["losses"])
    policy = Ddk()
    log_factor = None
    for record in intervals[:-1]:
        ratio = np.array([record["losses"][d]["perplexity_ratio"] for d in domains])
        if log_factor is None:
            factor = np.exp(ratio) / np.exp(ratio).sum()  # Eq. 1
        else:
            psi = np.exp(log_factor) * np.exp(ratio)
            factor = 0.5 * psi / psi.sum() + 0.5 / 3  # Eq. 2
            expected = dict(zip(domains, factor, strict=True))
            assert record["weights"] == pytest.approx(expected, abs=1e-8)
        log_factor = np.log(factor)
    assert policy.uniform_mix == 0.5
    owed = dict.fromkeys(domains, 0.0)
    for line in metrics:
        for domain in domains:
            owed[domain] += 12 * line[f"mixture/weight/{domain}"]
    assert intervals[-1]["served"] == pytest.approx(owed, abs=1 + 1 / 2 + 1 / 3)


def test_the_recorded_loss_is_the_objective_of_the_batch(tmp_path: Path, tiny_config: Make) -> None:
    """The first line of the log equals cross-entropy + 0.2 KL(teacher || student), computed here from full
    logits of freshly built models on the rows that the plan names, over valid tokens."""
    tree = tiny_config(trainer={"steps": 1, "batch_rows": 12}, policy={"name": "static"})
    config, metrics, _ = trained(tree, tmp_path / "run")
    mixture = open_mixture(config, open_rows(check(config), shown=False))
    mixture.set_weights(dict.fromkeys(mixture.domains, 1 / 3))
    batch = next(mixture)
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, config.teacher, seed=0).eval()
    with torch.no_grad():
        z = student(input_ids=batch["input_ids"]).logits[:, :-1].double()
        y = teacher(input_ids=batch["input_ids"]).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    valid = labels != -100
    ce = F.cross_entropy(z[valid], labels[valid])
    p, q = F.softmax(y[valid], -1), F.softmax(z[valid], -1)
    kl = (p * (p / q).log()).sum(-1).mean()
    assert metrics[0]["train/cross_entropy"] == pytest.approx(ce.item(), rel=1e-5)
    assert metrics[0]["train/forward_kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert metrics[0]["train/objective"] == pytest.approx((ce + 0.2 * kl).item(), rel=1e-5)
    assert metrics[0]["train/tokens"] == int(valid.sum())


MOVING = [
    {"name": "cross_entropy", "weight": "rest"},
    {"name": "forward_kl", "weight": {"schedule": "wsd", "peak": 0.9}, "temperature": 2.0},
]
"""Pre-training distillation's objective."""


def test_the_weights_in_force_are_logged_and_are_those_of_the_objective(
    tmp_path: Path, tiny_config: Make
) -> None:
    """Every line holds (1 - alpha) x cross-entropy + alpha x KL with the alpha of its step, by hand."""
    schedule = {"name": "wsd", "warmup_steps": 2, "decay_steps": 4, "final_ratio": 0.1}
    tree = tiny_config(trainer={"steps": 8}, loss=MOVING, schedule=schedule)
    _, metrics, _ = trained(tree, tmp_path / "run")
    half = math.sqrt(0.5) / 2
    alphas = [0.45, 0.9, 0.9, 0.9, *(0.9 * x for x in (0.5 + half, 0.5, 0.5 - half, 0.0))]
    assert alphas == pytest.approx([line["loss/weight/forward_kl"] for line in metrics], abs=1e-12)
    for alpha, line in zip(alphas, metrics, strict=True):
        assert 1 - alpha == pytest.approx(line["loss/weight/cross_entropy"])
        expected = (1 - alpha) * line["train/cross_entropy"] + alpha * line["train/forward_kl"]
        assert expected == pytest.approx(line["train/objective"], rel=1e-6)


def test_the_objective_of_a_window_is_the_mean_over_its_tokens(tmp_path: Path, tiny_config: Make) -> None:
    """One line for three steps: the token-weighted mean of the three steps' objectives, although the weights
    moved; with the last weights it would be another number. Micro-batches change nothing."""
    loss = [
        {"name": "cross_entropy", "weight": "rest"},
        {"name": "forward_kl", "weight": {"schedule": "linear", "start": 1, "end": 0}},
    ]
    tree = tiny_config(trainer={"steps": 3}, loss=loss)
    _, each, _ = trained(tree, tmp_path / "each")
    tree["trainer"] |= {"log_steps": 3, "microbatch_rows": 4}
    _, (window,), _ = trained(tree, tmp_path / "window")
    tokens = sum(line["train/tokens"] for line in each)
    expected = sum(line["train/objective"] * line["train/tokens"] for line in each) / tokens
    assert expected == pytest.approx(window["train/objective"], rel=1e-5)
    last = each[-1]
    wrong = sum(last[f"loss/weight/{n}"] * window[f"train/{n}"] for n in ("cross_entropy", "forward_kl"))
    assert wrong != pytest.approx(window["train/objective"], rel=1e-2)


def test_a_step_of_moving_weights_is_the_step_of_those_weights(tmp_path: Path, tiny_config: Make) -> None:
    """The gradient, not only the log: one step at alpha = 0.45 ends at the very parameters of one step with
    the constant weights 0.55 and 0.45."""
    from safetensors.torch import load_file

    sizes = {"steps": 1}
    constant = [{**MOVING[0], "weight": 1 - 0.45}, {**MOVING[1], "weight": 0.45}]
    moving = [MOVING[0], {**MOVING[1], "weight": {"schedule": "linear", "start": 0.45, "end": 0.9}}]
    for name, loss in (("constant", constant), ("moving", moving)):
        trained(tiny_config(trainer=sizes, loss=loss), tmp_path / name)
    first, second = (load_file(tmp_path / n / "student/model.safetensors") for n in ("constant", "moving"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_weights_that_do_not_fit_the_run_are_refused_before_it(tmp_path: Path, tiny_config: Make) -> None:
    """`lint` and `train` say so: an alpha that follows a learning rate which has no decay."""
    config = parse_config(tiny_config(loss=MOVING), where="test")
    with pytest.raises(ConfigError, match=r"schedule.name = 'cosine'; use a 'wsd' learning rate"):
        check(config)


@pytest.fixture
def padded_domains(tmp_path: Path) -> Path:
    """Domains of many shards with one document each, so that every fourth row or so is mostly padding."""
    for name in ("code", "prose"):
        write_domain(tmp_path / "padded", name, shards=12, per_shard=1)
    return tmp_path / "padded"


@pytest.mark.parametrize("microbatch", [1, 2, 5])
def test_micro_batches_change_nothing_but_rounding(
    tmp_path: Path, tiny_config: Make, padded_domains: Path, microbatch: int
) -> None:
    """The same rows in smaller pieces, of unequal size and padding: the loss is normalised by the valid
    tokens of the step, so metrics agree to float32 rounding. (The batches are such that averaging the means
    of the pieces would not: their numbers of valid tokens differ.)"""
    sizes = {"steps": 5, "batch_rows": 6}
    tree = tiny_config(trainer=sizes, domains=[str(padded_domains)], cache_dir=str(tmp_path / "cache"))
    config, whole, _ = trained(tree, tmp_path / "whole")
    _, pieces, _ = trained(
        {**tree, "trainer": {**tree["trainer"], "microbatch_rows": microbatch}}, tmp_path / "pieces"
    )
    for expected, actual in zip(whole, pieces, strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=1e-5)
    mixture = open_mixture(config, open_rows(check(config), shown=False))
    mixture.set_weights({name: whole[0][f"mixture/weight/{name}"] for name in mixture.domains})
    parts = -(-6 // microbatch)
    valid = (next(mixture)["labels"][:, 1:] != -100).sum(dim=1)
    assert len({int(valid[part::parts].sum()) for part in range(parts)}) > 1


def test_gradient_accumulation_equals_the_whole_batch_gradient(tmp_path: Path, tiny_config: Make) -> None:
    """After one step without clipping, parameters agree whether rows came in 1 or 3 pieces."""
    from safetensors.torch import load_file

    sizes = {"steps": 1, "batch_rows": 6}
    options = {"lr": 1e-3, "max_grad_norm": 0}
    for name, micro in (("whole", None), ("pieces", 2)):
        tree = tiny_config(trainer={**sizes, "microbatch_rows": micro}, optimizer=options)
        trained(tree, tmp_path / name)
    whole, pieces = (load_file(tmp_path / n / "student/model.safetensors") for n in ("whole", "pieces"))
    close = [torch.isclose(whole[key], pieces[key], atol=2e-5).float().mean().item() for key in whole]
    assert min(close) > 0.99  # AdamW's first step is a sign: a gradient of 1e-9 may fall on either side


def test_a_domain_at_its_cap_leaves_the_mixture_and_the_run_goes_on(
    tmp_path: Path, tiny_config: Make
) -> None:
    """`renormalize`: no row is served beyond max_epochs, the others share the weight."""
    tree = tiny_config(
        trainer={"steps": 15, "batch_rows": 12},
        mixture={"interval_steps": 50, "max_epochs": 0.5},
        policy={"name": "static", "weights": {"code": 0.8, "math": 0.1, "prose": 0.1}},
    )
    _, metrics, intervals = trained(tree, tmp_path / "run")
    assert 0.5 >= intervals[-1]["epochs"]["code"] > 0.49
    assert metrics[-1]["mixture/weight/code"] == 0
    assert metrics[-1]["mixture/weight/math"] == pytest.approx(0.5, abs=1 / ROW * 4)


def test_a_run_whose_data_are_used_up_ends_early_and_whole(tmp_path: Path, tiny_config: Make) -> None:
    """`stop` at the first cap: the student is saved and the last evaluation is of the step reached."""
    tree = tiny_config(
        trainer={"steps": 500, "batch_rows": 12},
        mixture={"interval_steps": 500, "max_epochs": 0.5, "on_cap": "stop"},
        policy={"name": "static"},
    )
    config, metrics, intervals = trained(tree, tmp_path / "run")
    assert metrics[-1]["step"] == intervals[-1]["step"] < 500
    assert max(intervals[-1]["epochs"].values()) <= 0.5
    assert (config.run_dir / "student" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, tiny_config: Make) -> None:
    """An exploding run ends with one error that names the step; what was checkpointed before is finite."""
    from safetensors.torch import load_file

    tree = tiny_config(
        run_dir=str(tmp_path / "run"),
        trainer={"steps": 200, "checkpoint_steps": 1},
        optimizer={"lr": 1e18, "max_grad_norm": 0},
        mixture={"interval_steps": 500},
    )
    with pytest.raises(NumericsError, match=r"step \d+: the gradient norm is (nan|inf)"):
        train(parse_config(tree, where="test"))
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert not (tmp_path / "run" / "student").exists()


def test_a_student_with_broken_parameters_is_refused(
    tmp_path: Path, tiny_config: Make, tiny_teacher: Path
) -> None:
    """NaN in a parameter is found before the first evaluation."""
    import shutil

    from safetensors.torch import load_file, save_file

    student = tmp_path / "student"
    shutil.copytree(tiny_teacher, student)
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"][:] = math.nan
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    tree = tiny_config(student={"init": "load", "layers": None, "model": str(student)})
    with pytest.raises(ModelError, match="logits that are not finite"):
        train(parse_config(tree, where="test"))


def test_bf16_and_gradient_checkpointing_train_the_same_student(tmp_path: Path, tiny_config: Make) -> None:
    """bfloat16 over float32 parameters follows float32 to its precision; checkpointing changes nothing."""
    sizes = {"steps": 4}
    _, plain, _ = trained(tiny_config(trainer=sizes), tmp_path / "plain")
    _, again, _ = trained(tiny_config(trainer={**sizes, "gradient_checkpointing": True}), tmp_path / "again")
    reset_accelerate()  # it refuses another precision in one process
    _, low, _ = trained(tiny_config(trainer={**sizes, "mixed_precision": "bf16"}), tmp_path / "low")
    assert low[-1]["train/objective"] == pytest.approx(plain[-1]["train/objective"], rel=0.02)
    assert low[-1]["train/objective"] != plain[-1]["train/objective"]
    assert again[-1]["train/objective"] == pytest.approx(plain[-1]["train/objective"], rel=1e-6)
