"""A teacher's modules trained beside the student: what they learn, who sees it, exact resume."""

import shutil
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddkmix.checkpoint import load_arrays
from ddkmix.config import RunConfig, parse_config
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError, NumericsError, RunError
from ddkmix.losses import build_terms
from ddkmix.models import build_student, load_teacher
from ddkmix.objective_checks import check_processes
from ddkmix.objectives import Distill
from ddkmix.online_step import NoModules, OnlineStep, open_online
from ddkmix.online_teacher import OnlineTeacher, load_modules
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.teacher import LiveTeacher
from tests.conftest import ConfigTree
from tests.test_processes import launch
from tests.test_resume import assert_same_outcome, command, kill_when, outcome, rewound, run

Make = Callable[..., ConfigTree]
ONLINE = {"rank": 2, "alpha": 4.0, "lr": 3e-3}
MODULES = "teacher_modules.safetensors"


def online_tree(tiny_config: Make, online: dict[str, Any] | None = None, **sections: Any) -> ConfigTree:
    """A tiny run whose teacher has modules."""
    tree = tiny_config(**sections)
    tree["teacher"]["online"] = {**ONLINE, **(online or {})}
    return tree


def lines(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of a log."""
    return list(read_lines(run_dir / f"{name}.jsonl"))


def without_teacher(record: dict[str, Any]) -> dict[str, Any]:
    """What the log of a run with a frozen teacher holds."""
    return {key: value for key, value in record.items() if not key.startswith("teacher/")}


def student_of(run_dir: Path) -> bytes:
    """The file of the trained student."""
    return (run_dir / "student" / "model.safetensors").read_bytes()


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


# --- what is learned --------------------------------------------------------------------------------


def test_modules_move_and_the_student_learns_from_what_they_say(tmp_path: Path, tiny_config: Make) -> None:
    """Nearer to the student after 24 steps at a student that hardly moves, in every log line a finite number
    for each loss and domain; the run leaves a student and the modules."""
    tree = online_tree(
        tiny_config,
        {"ce_weight": 0.0, "lr": 0.05, "rank": 8},
        trainer={"steps": 24},
        schedule={"name": "constant"},
        optimizer={"lr": 1e-6},
    )
    run_dir = run(tree, tmp_path / "run")
    metrics = lines(run_dir)
    told = [line["teacher/forward_kl"] for line in metrics]
    assert np.mean(told[-3:]) < 0.8 * np.mean(told[:3])
    assert metrics[-1]["train/forward_kl"] < 0.8 * metrics[0]["train/forward_kl"]
    names = {"cross_entropy", "forward_kl", "objective", "grad_norm", "lr"}
    assert {f"teacher/{name}" for name in names} <= metrics[0].keys()
    assert {"teacher/forward_kl/code", "teacher/cross_entropy/prose"} <= metrics[0].keys()
    assert "teacher/tokens" not in metrics[0] and np.isfinite(list(metrics[-1].values())).all()
    modules = load_file(run_dir / MODULES)
    assert 8 == len(modules) and all(value.any() for value in modules.values())
    assert (run_dir / "student" / "model.safetensors").exists()


def test_without_a_learning_rate_the_run_is_that_of_a_frozen_teacher(
    tmp_path: Path, tiny_config: Make
) -> None:
    """Bit for bit in the student, its losses and intervals; and with one it is another student."""
    frozen = run(tiny_config(trainer={"steps": 6}), tmp_path / "frozen")
    still = run(online_tree(tiny_config, {"lr": 0.0}, trainer={"steps": 6}), tmp_path / "still")
    moving = run(online_tree(tiny_config, trainer={"steps": 6}), tmp_path / "moving")
    assert lines(frozen) == [without_teacher(line) for line in lines(still)]
    assert lines(frozen, "intervals") == lines(still, "intervals")
    assert student_of(frozen) == student_of(still) != student_of(moving)
    assert not (frozen / MODULES).exists()
    assert lines(still)[0]["teacher/grad_norm"] > 0.0 == lines(still)[0]["teacher/lr"]


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"document_boundaries": True, "gradient_checkpointing": True}},
        {"trainer": {"mixed_precision": "bf16"}, "teacher": {"dtype": "bfloat16"}},
        {"loss": [{"name": "hidden_match", "pairs": [[0, 1]]}, "jsd"]},
        {"loss": [{"name": "hidden_consistency"}, {"name": "reverse_kl"}], "trainer": {"microbatch_rows": 2}},
    ],
    ids=["boundaries", "bf16", "match", "consistency"],
)
def test_all_that_a_run_can_have_besides(tmp_path: Path, tiny_config: Make, changes: dict[str, Any]) -> None:
    """A control is still the frozen teacher's run, and modules that learn change the student."""
    sections = {**changes, "trainer": {"steps": 3, **changes.get("trainer", {})}}
    if "loss" in sections:
        sections["loss"] = [{"name": term} if isinstance(term, str) else term for term in sections["loss"]]
    frozen = run(tiny_config(**sections), tmp_path / "frozen")
    still = run(online_tree(tiny_config, {"lr": 0.0}, **sections), tmp_path / "still")
    moving = run(online_tree(tiny_config, {"lr": 0.1}, **sections), tmp_path / "moving")
    assert student_of(frozen) == student_of(still) != student_of(moving)
    assert lines(moving)[0]["teacher/forward_kl"] != lines(moving)[1]["teacher/forward_kl"]


def literal_losses(
    adapted: nn.Module, student: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student), KL(student || teacher), the teacher's CE: means in nats, from whole logits."""
    where = batch["labels"][:, 1:] != -100
    log_t = adapted(input_ids=batch["input_ids"]).logits[:, :-1][where].double().log_softmax(-1)
    log_s = student(input_ids=batch["input_ids"]).logits[:, :-1][where].double().log_softmax(-1).detach()
    cross_entropy = -log_t.gather(1, batch["labels"][:, 1:][where][:, None]).mean()
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return kl, (log_s.exp() * (log_s - log_t)).sum(-1).mean(), cross_entropy


def at_step(config: RunConfig, step: int) -> tuple[OnlineTeacher, nn.Module]:
    """Teacher and student as the checkpoint of a step has them."""
    assert config.teacher.online is not None
    told = config.teacher.online
    teacher = OnlineTeacher(load_teacher(config.teacher), rank=told.rank, alpha=told.alpha, seed=config.seed)
    student = build_student(config.student, config.teacher, seed=config.seed)
    if step:
        folder = checkpoint_of(config.run_dir, step)
        modules = {k.removeprefix("teacher/modules/"): v for k, v in load_arrays(folder).items()}
        teacher.load_state({name: torch.from_numpy(modules[name]) for name in teacher.state()})
        saved = load_file(folder / "model.safetensors")
        student.load_state_dict(
            {k.removeprefix("student."): v for k, v in saved.items() if k.startswith("student.")},
            strict=False,
        )
    return teacher, student.eval()


def test_the_log_is_that_of_the_adapted_teacher_by_hand(tmp_path: Path, tiny_config: Make) -> None:
    """The third step's lines, from whole logits of the models in the checkpoint of the second; and the next
    modules are AdamW's with the literal gradient. The frozen teacher gives other numbers."""
    tree = online_tree(
        tiny_config,
        {"lr": 0.02, "kl_weight": 0.7, "ce_weight": 0.4, "weight_decay": 0.1, "max_grad_norm": 0.0},
        trainer={"steps": 3, "batch_rows": 12, "checkpoint_steps": 1, "keep_checkpoints": 9},
        schedule={"name": "constant"},
        policy={"name": "static"},
    )
    config = parse_config({**tree, "run_dir": str(tmp_path / "run")}, where="test")
    train(config)
    mixture = open_mixture(config, open_rows(check(config), shown=False))
    mixture.set_weights(dict.fromkeys(mixture.domains, 1 / 3))
    batches = [next(mixture) for _ in range(3)]
    third = lines(config.run_dir)[2]
    teacher, student = at_step(config, 2)
    kl, to_teacher, cross_entropy = literal_losses(teacher.model, student, batches[2])
    assert kl.item() == pytest.approx(third["train/forward_kl"], rel=1e-4)
    assert to_teacher.item() == pytest.approx(third["teacher/forward_kl"], rel=1e-4)
    assert cross_entropy.item() == pytest.approx(third["teacher/cross_entropy"], rel=1e-4)
    objective = 0.7 * to_teacher + 0.4 * cross_entropy
    assert objective.item() == pytest.approx(third["teacher/objective"], rel=1e-4)
    frozen = literal_losses(load_teacher(config.teacher), student, batches[2])[0]
    assert frozen.item() != pytest.approx(third["train/forward_kl"], rel=1e-2)

    teacher, student = at_step(config, 0)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    _, to_teacher, cross_entropy = literal_losses(teacher.model, student, batches[0])
    (0.7 * to_teacher + 0.4 * cross_entropy).backward()
    norm = torch.stack([part.grad.norm() for part in teacher.parameters() if part.grad is not None]).norm()
    assert norm.item() == pytest.approx(lines(config.run_dir)[0]["teacher/grad_norm"], rel=1e-3)
    optimizer.step()
    first = load_arrays(checkpoint_of(config.run_dir, 1))
    for name, value in teacher.state().items():
        # Adam's first step is the sign of the gradient: where that is nearly 0, rounding decides
        near = np.isclose(value.numpy(), first[f"teacher/modules/{name}"], rtol=1e-3, atol=1e-4)
        assert near.mean() > 0.98, name


def test_its_learning_rate_follows_the_schedule_and_its_gradients_are_clipped(
    tmp_path: Path, tiny_config: Make
) -> None:
    """Warm-up and cosine of its own peak; AdamW forgets a gradient's size, so its moments show the clip."""
    sections = {"trainer": {"steps": 4}, "schedule": {"warmup_steps": 2}}
    run_dir = run(online_tree(tiny_config, {"max_grad_norm": 1e-3}, **sections), tmp_path / "run")
    for line in lines(run_dir):
        assert line["teacher/lr"] == pytest.approx(3.0 * line["train/lr"])
    assert 1.5e-3 == pytest.approx(lines(run_dir)[0]["teacher/lr"])
    assert all(line["teacher/grad_norm"] > 1e-2 for line in lines(run_dir))
    arrays = load_arrays(checkpoint_of(run_dir, 4))
    moments = [value for name, value in arrays.items() if name.startswith("teacher/exp_avg/")]
    assert 0 < np.sqrt(sum((value**2).sum() for value in moments)) <= 1e-3


def test_gaps_and_divergences_are_to_the_teacher_as_it_was_loaded(tmp_path: Path, tiny_config: Make) -> None:
    """A student that does not move is measured the same at every interval, to the bit, whatever the modules
    have learned; the signal of the steps does move."""
    tree = online_tree(
        tiny_config,
        {"lr": 0.05},
        trainer={"steps": 8},
        optimizer={"lr": 1e-30},
        evaluation={"measures": ["forward_kl", "excess_loss"]},
    )
    run_dir = run(tree, tmp_path / "run")
    first, *others = [record["losses"] for record in lines(run_dir, "intervals")]
    assert "forward_kl" in first["code"] and "excess_loss" in first["code"]
    assert [first] * 2 == others
    frozen = tiny_config(trainer={"steps": 1}, evaluation={"measures": ["forward_kl", "excess_loss"]})
    assert first == lines(run(frozen, tmp_path / "frozen"), "intervals")[0]["losses"]
    teacher = load_modules(load_teacher(parse_config(tree, where="test").teacher), run_dir / MODULES)
    batch = {"input_ids": torch.arange(30)[None]}
    with teacher.modules_off():
        loaded = LiveTeacher.signal(teacher, batch).hidden
    assert not torch.equal(loaded, teacher.signal(batch).hidden)


# --- parts ------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tiny_config: Make) -> tuple[OnlineStep, OnlineTeacher, DistillationModel]:
    """An OnlineStep with its models, outside of any run."""
    config = parse_config(online_tree(tiny_config), where="test")
    teacher = OnlineTeacher(load_teacher(config.teacher), rank=2)
    student = DistillationModel(build_student(config.student, config.teacher, seed=0))
    online = open_online(config, teacher, student, ["a", "b"])
    assert isinstance(online, OnlineStep)
    return online, teacher, student


TERMS = build_terms([{"name": "forward_kl"}])


def batch_of(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of two domains with padding at the end of some."""
    ids = torch.randint(1, 300, (rows, 10), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[::3, 6:] = -100
    return {"input_ids": ids, "labels": labels, "domain_ids": torch.arange(rows) % 2}


def learn(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel], batch: dict[str, Tensor], share: float
) -> None:
    """A micro-batch as the trainer takes it."""
    online, teacher, student = parts
    objective, _ = student(batch["input_ids"], batch["labels"], share, TERMS, teacher.signal(batch))
    objective.backward()
    online.learn(batch, share)


def same(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor.clone()


def test_only_modules_have_gradients_and_move(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel],
) -> None:
    """The teacher's other parameters are the same to the bit; the student has the gradient of its loss."""
    online, teacher, student = parts
    batch = batch_of(4)

    def digest() -> str:
        kept = [p for n, p in sorted(teacher.model.named_parameters()) if not n.endswith(("down", "up"))]
        return sha256(b"".join(p.detach().numpy().tobytes() for p in kept)).hexdigest()

    objective, _ = student(batch["input_ids"], batch["labels"], 0.1, TERMS, teacher.signal(batch))
    alone = torch.autograd.grad(objective, list(student.parameters()))
    before, modules = digest(), teacher.state()
    learn(parts, batch, 0.1)
    for parameter, gradient in zip(student.parameters(), alone, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    online.step(1.0, same)
    assert before == digest()
    assert all(part.grad is None for part in teacher.model.parameters())
    moved = teacher.state()
    assert any(not torch.equal(moved[name], modules[name]) for name in modules)


def test_a_step_that_is_split_is_the_step(parts: tuple[OnlineStep, OnlineTeacher, DistillationModel]) -> None:
    """Gradients are summed over micro-batches, and over ranks by `reduce`, with shares of all tokens."""
    online, teacher, _ = parts
    batch = batch_of(6)
    learn(parts, batch, 1 / 40)
    whole = [part.grad.clone() for part in teacher.parameters() if part.grad is not None]
    for part in teacher.parameters():
        part.grad = None
    for start in range(3):
        learn(parts, {name: value[start::3] for name, value in batch.items()}, 1 / 40)
    for part, expected in zip(teacher.parameters(), whole, strict=True):
        torch.testing.assert_close(part.grad, expected, rtol=1e-4, atol=1e-7)
    sent: list[int] = []

    def two_ranks(tensor: Tensor) -> Tensor:
        sent.append(tensor.numel())
        return 2 * tensor

    norm = torch.cat([gradient.flatten() for gradient in whole]).norm().item()
    online.step(1.0, two_ranks)
    assert [sum(part.numel() for part in teacher.parameters())] == sent  # one message
    assert online.metrics(same)["teacher/grad_norm"] == pytest.approx(2 * norm, rel=1e-4)


def test_a_rank_without_a_gradient_takes_part(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel],
) -> None:
    """Nothing of its own to add: what the others have counts."""
    online, teacher, _ = parts
    before = teacher.state()
    online.step(1.0, lambda tensor: tensor + 1.0)
    assert all(not torch.equal(before[name], value) for name, value in teacher.state().items())


def test_a_gradient_that_is_no_number_stops_before_anything_moves(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel],
) -> None:
    """One line; modules as before."""
    online, teacher, _ = parts
    learn(parts, batch_of(2), 0.1)
    before = teacher.state()
    with pytest.raises(NumericsError, match=r"modules is nan; neither teacher nor student took the"):
        online.step(1.0, lambda tensor: tensor * float("nan"))
    assert all(torch.equal(before[name], value) for name, value in teacher.state().items())


def test_metrics_are_means_over_the_tokens_of_the_window(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel],
) -> None:
    """Two batches of one window, and nothing of it in the next."""
    online, *_ = parts
    batches = [batch_of(2, seed=1), batch_of(5, seed=2)]
    single: list[float] = []
    counts: list[int] = []
    for batch in batches:
        learn(parts, batch, 0.1)
        single.append(online.metrics(same)["teacher/forward_kl"])
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
    for batch in batches:
        learn(parts, batch, 0.1)
    both = online.metrics(same)
    expected = np.average(single, weights=counts)
    assert both["teacher/forward_kl"] == pytest.approx(expected, rel=1e-6)
    assert both["teacher/objective"] == pytest.approx(
        both["teacher/forward_kl"] + both["teacher/cross_entropy"]
    )
    assert "teacher/forward_kl/a" in both and 0.0 == online.metrics(same)["teacher/objective"]


def test_the_students_states_are_kept_for_a_teacher_that_learns_alone(
    parts: tuple[OnlineStep, OnlineTeacher, DistillationModel],
) -> None:
    """Once for each training pass, without a graph; not in a measurement, and not where nobody asks."""
    _, _, student = parts
    batch, terms = batch_of(2), build_terms(["cross_entropy"])
    with torch.no_grad():
        student(batch["input_ids"], batch["labels"], 1.0, terms)
    with pytest.raises(AssertionError, match="set keeps_states"):
        student.said()
    student(batch["input_ids"], batch["labels"], 1.0, terms)
    said = student.said()
    assert not said.hidden.requires_grad and not said.head.weight.requires_grad
    logits = student.student(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(said.hidden @ said.head.weight.T, logits.detach())
    with pytest.raises(AssertionError, match="set keeps_states"):
        student.said()
    student.keeps_states = False
    student(batch["input_ids"], batch["labels"], 1.0, terms)
    with pytest.raises(AssertionError, match="set keeps_states"):
        student.said()


def test_a_frozen_teacher_has_nothing_to_do(tiny_config: Make) -> None:
    """No metrics, no arrays, and the teacher that is measured is the teacher."""
    config = parse_config(tiny_config(), where="test")
    teacher = LiveTeacher(load_teacher(config.teacher))
    student = DistillationModel(build_student(config.student, config.teacher, seed=0))
    online = open_online(config, teacher, student, ["a"])
    assert isinstance(online, NoModules) and not student.keeps_states
    assert {} == online.metrics(same) == online.arrays(same)
    assert teacher is online.unadapted(teacher)


# --- micro-batches, ranks ---------------------------------------------------------------------------


def assert_close_runs(expected: Path, actual: Path) -> None:
    """The same to float32 rounding, modules included."""
    for ours, theirs in zip(lines(expected), lines(actual), strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs == pytest.approx(ours, rel=5e-4, abs=1e-5)
    found = load_file(actual / MODULES)
    for name, value in load_file(expected / MODULES).items():
        assert (value - found[name]).abs().mean() < 0.02 * value.abs().mean(), name


def test_micro_batches_change_nothing(tmp_path: Path, tiny_config: Make) -> None:
    """To rounding, in every line of the log and in the modules at the end."""
    whole = run(online_tree(tiny_config, trainer={"steps": 5}), tmp_path / "whole")
    split = run(online_tree(tiny_config, trainer={"steps": 5, "microbatch_rows": 2}), tmp_path / "split")
    assert_close_runs(whole, split)
    assert lines(whole)[4]["teacher/forward_kl"] != pytest.approx(lines(whole)[0]["teacher/forward_kl"])


def test_two_ranks_train_the_modules_as_one(tmp_path: Path, tiny_config: Make) -> None:
    """With micro-batches on either; and what two have saved, one takes up."""
    tree = online_tree(tiny_config, trainer={"steps": 5, "microbatch_rows": 2, "checkpoint_steps": 2})
    one, two = run(tree, tmp_path / "one"), tmp_path / "two"
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(two)}))
    launch(config)
    assert_close_runs(one, two)
    half = rewound(two, tmp_path / "half", 4)
    assert_close_runs(one, run(tree, half, resume=True))


# --- resume -----------------------------------------------------------------------------------------

SAVED = {"steps": 7, "checkpoint_steps": 1, "keep_checkpoints": 99, "log_steps": 3}


def assert_same_modules(expected: Path, actual: Path) -> None:
    """The student's outcome, the modules, and the optimizer's state of both in the last checkpoint."""
    assert_same_outcome(expected, actual)
    assert (expected / MODULES).read_bytes() == (actual / MODULES).read_bytes()
    ours, theirs = (load_arrays(checkpoint_of(path, 7)) for path in (expected, actual))
    assert ours.keys() == theirs.keys() and {"teacher/step", "teacher/window"} < ours.keys()
    assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, tiny_config: Make) -> None:
    """After any step, within a window of the log too: modules, moments and log to the bit."""
    tree = online_tree(tiny_config, {"weight_decay": 0.1}, trainer=SAVED)
    full = run(tree, tmp_path / "full")
    for step in (1, 2, 3, 5, 6):
        assert_same_modules(full, run(tree, rewound(full, tmp_path / f"part{step}", step), resume=True))
    before = outcome(full), (full / MODULES).read_bytes()
    run(tree, full, resume=True)  # nothing is left to do
    assert before == (outcome(full), (full / MODULES).read_bytes())


@pytest.mark.parametrize("lost", ["modules", "exp_avg", "exp_avg_sq", "step", "window"])
def test_a_state_that_is_lost_would_be_noticed(tmp_path: Path, tiny_config: Make, lost: str) -> None:
    """The comparison above can fail: each part of the arrays is needed."""
    tree = online_tree(tiny_config, trainer=SAVED)
    full = run(tree, tmp_path / "full")
    part = rewound(full, tmp_path / "part", 5)
    path, other = (checkpoint_of(full, step) / "arrays.safetensors" for step in (5, 2))
    arrays, older = load_file(path), load_file(other)
    changed = {name: older[name] if name.split("/")[1] == lost else v for name, v in arrays.items()}
    save_file(changed, checkpoint_of(part, 5) / "arrays.safetensors")
    run(tree, part, resume=True)
    with pytest.raises(AssertionError):
        assert_same_modules(full, part)


def test_kill_9_then_resume_gives_the_same_bits(tmp_path: Path, tiny_config: Make) -> None:
    """The real thing, in a process of its own."""
    tree = online_tree(
        tiny_config, trainer={"steps": 30, "checkpoint_steps": 4}, mixture={"interval_steps": 9}
    )
    full = run(tree, tmp_path / "full")
    killed, config = tmp_path / "killed", tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(killed)}))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when(process, killed / "metrics.jsonl", 10, 9)
    assert process.wait() == -9
    assert not (killed / MODULES).exists()
    subprocess.run(command(config, "--resume"), check=True, capture_output=True)
    assert_same_outcome(full, killed)
    assert (full / MODULES).read_bytes() == (killed / MODULES).read_bytes()


def test_a_run_goes_on_with_other_domains(tmp_path: Path, tiny_config: Make, tiny_domains: Path) -> None:
    """The modules go on; losses of the open window are dropped, as the student's are."""
    tree = online_tree(tiny_config, trainer={**SAVED, "log_steps": 7})
    run(tree, tmp_path / "full")
    part = rewound(tmp_path / "full", tmp_path / "part", 5)
    changed = {
        **tree,
        "run_dir": str(part),
        "domains": [str(tiny_domains / n) for n in ("code.yaml", "math.yaml")],
    }
    train(parse_config(changed, where="test"), resume=True, allow_changes=True)
    assert 7 == load_arrays(checkpoint_of(part, 7))["teacher/step"][0]
    last = lines(part)[-1]
    assert "teacher/forward_kl/code" in last and "teacher/forward_kl/prose" not in last


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "missing",
            r"step-000003 has no array 'teacher/modules/model.layers.0.self_attn.q_proj.down' of",
        ),
        ("moment", r"has no array 'teacher/exp_avg_sq/model.layers.1.self_attn.v_proj.up' of the teacher's"),
        ("torn", r"step-000003 cannot be read .*; delete that folder and resume from an older one"),
    ],
)
def test_damaged_arrays_are_one_line(tmp_path: Path, tiny_config: Make, damage: str, message: str) -> None:
    """The checkpoint, the array and the way out."""
    tree = online_tree(tiny_config, trainer={"steps": 3})
    full = run(tree, tmp_path / "full")
    path = checkpoint_of(full, 3) / "arrays.safetensors"
    arrays = load_file(path)
    if damage == "missing":
        path.unlink()
    elif damage == "moment":
        del arrays["teacher/exp_avg_sq/model.layers.1.self_attn.v_proj.up"]
        save_file(arrays, path)
    else:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RunError, match=message) as info:
        run(tree, full, resume=True)
    assert "\n" not in str(info.value)


def test_other_modules_are_another_run(tmp_path: Path, tiny_config: Make) -> None:
    """Their size, or that there are some, cannot change on the way, even on request."""
    full = run(online_tree(tiny_config, trainer={"steps": 2}), tmp_path / "full")
    for tree in (
        online_tree(tiny_config, {"rank": 3}, trainer={"steps": 2}),
        tiny_config(trainer={"steps": 2}),
    ):
        with pytest.raises(
            RunError, match=r"holds another run: teacher\.online.* was .*; |Resume with the old"
        ):
            train(parse_config({**tree, "run_dir": str(full)}, where="test"), resume=True, allow_changes=True)


# --- bad input --------------------------------------------------------------------------------------


def refusal(tree: ConfigTree) -> str:
    """What preflight says."""
    with pytest.raises(ConfigError) as info:
        check(parse_config(tree, where="test"))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_what_cannot_have_modules_is_refused_before_a_model_is_loaded(
    tiny_config: Make, tiny_teacher: Path, other_teacher: Path, tmp_path: Path
) -> None:
    """A store, several teachers, an ensemble, another tokenizer, no loss that asks the teacher."""
    start = "teacher.online trains one live teacher beside the student, and "
    message = refusal(online_tree(tiny_config, signal={"source": "store"}))
    assert message.startswith(f"{start}signal.source = 'store' holds what the teacher said before")
    teachers = {"math": {"model": str(tiny_teacher)}, "both": {"ensemble": {"teacher": 1, "math": 1}}}
    for default in ("math", "both"):
        tree = online_tree(tiny_config, teachers=teachers, default_teacher=default)
        assert refusal(tree).startswith(f"{start}the domains are taught by {default}; let the one `teacher`")
    check(parse_config(online_tree(tiny_config, teachers=teachers), where="test"))  # named, but not in use
    message = refusal(online_tree(tiny_config, loss=[{"name": "cross_entropy"}]))
    assert message.startswith(f"{start}no loss of cross_entropy looks at the teacher")
    tree = online_tree(
        tiny_config,
        teacher={"model": str(other_teacher)},
        student={"init": "load", "layers": None, "model": str(tiny_teacher)},
        loss=[{"name": "uld"}],
    )
    assert f"{start}the teacher {other_teacher} has other tokens than the student" in refusal(tree)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_sharded_student_is_refused(tiny_config: Make, kind: DistributedType) -> None:
    """One line with Accelerate's name of it; without modules, and under DDP, it is nobody's business."""
    config = parse_config(online_tree(tiny_config), where="test")
    with pytest.raises(
        ConfigError, match=rf"teacher.online .* under {kind.value} each has a part .* with DDP"
    ):
        check_processes(Distill(), config, kind)
    check_processes(Distill(), parse_config(tiny_config(), where="test"), kind)
    check_processes(Distill(), config, DistributedType.MULTI_GPU)
    check_processes(Distill(), config, DistributedType.NO)


def test_a_target_that_the_teacher_lacks_ends_the_run_with_a_line(tiny_config: Make) -> None:
    """Once the model is loaded; nothing was written."""
    tree = online_tree(tiny_config, {"targets": ["query"]})
    config = parse_config(tree, where="test")
    with pytest.raises(ConfigError, match=r"targets has 'query', which is no linear layer of Llama"):
        train(config)
    assert not config.run_dir.exists()


def test_steps_that_explode_end_with_a_line(tmp_path: Path, tiny_config: Make) -> None:
    """A learning rate far too high: NumericsError, and checkpoints of before are there."""
    tree = online_tree(
        tiny_config, {"lr": 3e38}, trainer={"steps": 6, "checkpoint_steps": 1}, schedule={"name": "constant"}
    )
    with pytest.raises(NumericsError) as info:
        run(tree, tmp_path / "run")
    assert "\n" not in str(info.value)
    shutil.rmtree(tmp_path / "run")
