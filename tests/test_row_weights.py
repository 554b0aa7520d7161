"""Rows weighed in their step: by hand, by full logits, over ranks and micro-batches, and after a resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddkmix import row_weights as module
from ddkmix.batch import CrossSignal, DenseSignal, Head, RoutedSignal, TruncatedSignal
from ddkmix.config import parse_config
from ddkmix.errors import ConfigError, NumericsError, RunError
from ddkmix.models import build_student, load_teacher
from ddkmix.predicted_tokens import signal_nats
from ddkmix.preflight import check
from ddkmix.prepare import open_mixture, open_rows
from ddkmix.records import read_lines
from ddkmix.row_weights import RowWeights, row_weights_of, token_weights
from ddkmix.selection import ConfidenceSelection, DifferenceSelection
from ddkmix.setup import train
from tests.conftest import ConfigTree
from tests.test_resume import assert_same_outcome, rewound

Make = Callable[..., ConfigTree]
CONFIDENCE = {"name": "confidence", "decay": 0.5}


class Student(torch.nn.Module):
    """Says of every predicted token what its input id tells: id / 10 nats."""

    def nats(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """As `trainer.token_nats` of a model; only in evaluation mode."""
        assert not self.training
        return input_ids[:, :-1][labels[:, 1:] != -100] / 10


class Teacher:
    """A store that says id / 20 nats."""

    def signal(self, batch: Any) -> TruncatedSignal:
        """Of all positions."""
        ids = batch["input_ids"]
        nothing = torch.zeros((*ids.shape, 1))
        return TruncatedSignal(
            ids=nothing.long(), log_probs=nothing, entropy=nothing[..., 0], teacher_nats=ids / 20
        )


def weighing(selection: ConfidenceSelection | None = None, **options: Any) -> RowWeights:
    """Of two domains, with a student and a teacher whose losses are known."""
    student = Student().train()
    return RowWeights(
        selection or ConfidenceSelection(),
        ["code", "math"],
        student=student,
        nats=student.nats,
        teacher=Teacher(),
        **options,
    )


def batch_of(rows: list[tuple[int, int, int]], length: int = 6) -> dict[str, torch.Tensor]:
    """(domain, token that fills the row, tokens of it that are text) of each row."""
    ids = torch.tensor([[token] * length for _, token, _ in rows])
    labels = ids.clone()
    for i, (_, _, size) in enumerate(rows):
        labels[i, size:] = -100
    return {"input_ids": ids, "labels": labels, "domain_ids": torch.tensor([d for d, _, _ in rows])}


def test_weights_are_the_rules_scaled_to_a_mean_of_one_over_tokens() -> None:
    """First batch: all kept, each weighs c u over its mean; then scaled by predicted tokens, of which a row
    of one token has none: it is not offered. The student's mode is restored."""
    weights = weighing()
    batch = batch_of([(0, 10, 6), (0, 20, 3), (1, 30, 6), (1, 5, 1)])
    weights.weigh(batch)
    c, u = np.exp(-np.array([0.5, 1.0, 1.5])), 1 - np.exp(-np.array([1.0, 2.0, 3.0]))
    tokens = np.array([5, 2, 5])
    expected = c * u / (c * u * tokens).sum() * tokens.sum()
    assert batch["row_weights"].tolist() == pytest.approx([*expected, 0.0], rel=1e-6)
    assert ([2, 1], [2, 1]) == (weights.state["offered"], weights.state["kept"])
    assert weights._student.training
    assert {"selection/kept/code": 1.0, "selection/kept/math": 1.0} == weights.metrics()


def test_dropped_rows_weigh_nothing_and_the_rest_of_the_scale_is_theirs() -> None:
    """Whatever is dropped, the token weights of a batch sum to its tokens; nothing at all is nothing."""
    weights = weighing(ConfidenceSelection(decay=0.0, confidence_quantile=0.5, uncertainty_quantile=0.0))
    weights.weigh(batch_of([(0, 10, 6), (0, 12, 6), (0, 14, 6)]))  # threshold: exp(-0.6)
    batch = batch_of([(0, 11, 6), (0, 13, 6), (0, 12, 4)])
    weights.weigh(batch)
    kept = batch["row_weights"] > 0
    assert [True, False, True] == kept.tolist()
    assert (batch["row_weights"] * torch.tensor([5, 5, 3])).sum().item() == pytest.approx(13)
    assert {"selection/kept/code": 5 / 6} == weights.metrics()
    none = batch_of([(0, 90, 6), (0, 80, 6)])
    weights.weigh(none)
    assert [0.0, 0.0] == none["row_weights"].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_change_no_weight(size: int) -> None:
    """Rows go through the models in parts as in training; the weights are those of the whole."""
    rows = [(0, 10, 6), (1, 20, 3), (0, 30, 6), (1, 5, 2), (0, 7, 6)]
    whole, parts = weighing(), weighing(microbatch_rows=size)
    expected, batch = batch_of(rows), batch_of(rows)
    whole.weigh(expected)
    parts.weigh(batch)
    assert expected["row_weights"].tolist() == batch["row_weights"].tolist()
    assert whole.state == parts.state


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with two rows each have the weights and the state of one with four, to the last bit; the sum
    over ranks is made here, of what both put in."""
    rows = [(0, 10, 6), (1, 20, 3), (0, 30, 6), (1, 5, 2)]
    alone = weighing()
    expected = batch_of(rows)
    alone.weigh(expected)
    tables: list[torch.Tensor] = []

    def on_rank(rank: int, total: torch.Tensor | None) -> tuple[RowWeights, dict[str, torch.Tensor]]:
        def reduce(table: torch.Tensor) -> torch.Tensor:
            tables.append(table)
            return table if total is None else total

        monkeypatch.setattr(module, "current_rank", lambda: (rank, 2))
        monkeypatch.setattr(module, "sum_over_ranks", reduce)
        weights, batch = weighing(), batch_of(rows[rank::2])
        weights.weigh(batch)
        return weights, batch

    for rank in range(2):
        on_rank(rank, None)
    total = tables[0] + tables[1]
    found = [on_rank(rank, total) for rank in range(2)]
    for rank, (weights, batch) in enumerate(found):
        assert alone.state == weights.state
        assert expected["row_weights"][rank::2].tolist() == batch["row_weights"].tolist()


def test_a_loss_that_is_no_number_is_refused() -> None:
    """With the state as it was."""
    weights = weighing()
    before = json.dumps(weights.state)
    weights._nats = lambda ids, labels: torch.full((int((labels[:, 1:] != -100).sum()),), float("nan"))
    with pytest.raises(NumericsError, match="student_loss is not finite at rows"):
        weights.weigh(batch_of([(0, 10, 6)]))
    assert before == json.dumps(weights.state)


def test_tokens_weigh_as_their_rows() -> None:
    """In row order; without weights all alike."""
    batch = batch_of([(0, 10, 3), (0, 10, 1), (1, 10, 4)])
    assert 0.25 == token_weights(batch, 0.25)
    batch["row_weights"] = torch.tensor([2.0, 9.0, 0.5])
    tokens = token_weights(batch, 0.25)
    assert isinstance(tokens, torch.Tensor)
    assert [0.5, 0.5, 0.125, 0.125, 0.125] == tokens.tolist()


def test_only_a_selection_step_by_step_weighs() -> None:
    """The other one has done its work before."""
    assert row_weights_of(None, ["code"]) is None
    assert row_weights_of(DifferenceSelection(), ["code"]) is None


# --- what the teacher says --------------------------------------------------------------------------


def dense(hidden: torch.Tensor) -> DenseSignal:
    """A teacher with three classes."""
    return DenseSignal(hidden=hidden, head=Head(weight=torch.eye(3)))


def test_losses_of_live_and_routed_teachers() -> None:
    """-log softmax of the next token, row after row, whichever teacher says it."""
    hidden = torch.randn((3, 4, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, 0], [1, 1, -100, -100], [2, 0, 1, 2]])
    log_probs = F.log_softmax(hidden.double(), -1)
    rows, places = (labels[:, 1:] != -100).nonzero().unbind(1)
    expected = -log_probs[rows, places, labels[rows, places + 1]]
    assert torch.allclose(signal_nats(dense(hidden), labels, chunk_tokens=2).double(), expected, atol=1e-6)
    rows_of = (torch.tensor([0, 2]), torch.tensor([1]))
    routed = RoutedSignal(rows=rows_of, signals=tuple(dense(hidden[own]) for own in rows_of))
    assert torch.allclose(signal_nats(routed, labels, chunk_tokens=2).double(), expected, atol=1e-6)


def test_other_tokens_are_refused() -> None:
    """One line; a config is refused before."""
    said = CrossSignal(
        teacher=dense(torch.zeros((1, 3))),
        labels=torch.zeros(1, dtype=torch.int64),
        spans=torch.zeros((1, 4), dtype=torch.int64),
        pairs=torch.zeros((1, 2), dtype=torch.int64),
    )
    with pytest.raises(ConfigError, match="another tokenizer; leave the selection out"):
        signal_nats(said, torch.zeros((1, 4), dtype=torch.int64), chunk_tokens=2)


# --- runs -------------------------------------------------------------------------------------------


def run(tree: ConfigTree, run_dir: Path, **options: Any) -> Path:
    """Train in this process."""
    train(parse_config({**tree, "run_dir": str(run_dir)}, where="test"), **options)
    return run_dir


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    """The student at the end."""
    from safetensors.torch import load_file

    return load_file(run_dir / "student/model.safetensors")


def test_the_step_is_that_of_the_weighed_objective(tmp_path: Path, tiny_config: Make) -> None:
    """The norm of the first gradient is that of sum_i w_i sum_t loss / tokens, from full logits and the rule
    applied here; with rows that weigh alike it is another."""
    tree = tiny_config(
        trainer={"steps": 1, "batch_rows": 12}, policy={"name": "static"}, selection=CONFIDENCE
    )
    tree["loss"] = [{"name": "cross_entropy", "weight": 1.0}]
    tree["optimizer"] = {"lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1e9}
    config = parse_config({**tree, "run_dir": str(tmp_path / "run")}, where="test")
    run(tree, tmp_path / "run")
    mixture = open_mixture(config, open_rows(check(config), shown=False))
    mixture.set_weights(dict.fromkeys(mixture.domains, 1 / 3))
    batch = next(mixture)
    teacher, student = load_teacher(config.teacher), build_student(config.student, config.teacher, seed=0)
    labels = batch["labels"][:, 1:]
    valid = labels != -100

    def row_nats(model: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)

    counts = valid.sum(1)
    with torch.no_grad():
        theirs, own = ((row_nats(model).sum(1) / counts).double().numpy() for model in (teacher, student))
    score = np.exp(-theirs) * (1 - np.exp(-own))
    weights = torch.tensor(score / (score * counts.numpy()).sum() * counts.sum().item()).float()
    assert weights.std() > 0.001

    def gradient_norm(row_weights: torch.Tensor) -> float:
        student.zero_grad()
        (row_nats(student) * row_weights[:, None]).sum().div(counts.sum()).backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        return torch.stack([gradient.norm() for gradient in gradients]).norm().item()

    expected, alike = gradient_norm(weights), gradient_norm(torch.ones(len(weights)))
    assert abs(expected / alike - 1) > 1e-3
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["train/grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_rows_of_weight_zero_teach_nothing(tmp_path: Path, tiny_config: Make) -> None:
    """A run goes on with shares kept below 1 in its metrics, other parameters than without a selection, and
    the very batches of that."""
    tree = tiny_config(trainer={"steps": 6}, policy={"name": "static"})
    runs = {
        name: run({**tree, "selection": spec}, tmp_path / name)
        for name, spec in (("all", None), ("some", CONFIDENCE), ("some again", CONFIDENCE))
    }
    lines = {name: list(read_lines(path / "metrics.jsonl")) for name, path in runs.items()}
    shares = {key: value for key, value in lines["some"][-1].items() if key.startswith("selection/kept/")}
    assert {"selection/kept/code", "selection/kept/math", "selection/kept/prose"} == set(shares)
    assert all(0 < share < 1 for share in shares.values())
    assert not any(key.startswith("selection") for key in lines["all"][-1])
    for name in ("train/tokens", "mixture/epochs/code", "mixture/epochs/math"):
        assert [line[name] for line in lines["all"]] == [line[name] for line in lines["some"]]
    assert any(not tensor.equal(final(runs["all"])[key]) for key, tensor in final(runs["some"]).items())
    assert_same_outcome(runs["some"], runs["some again"])


def test_quantiles_of_zero_without_weighing_change_nothing(tmp_path: Path, tiny_config: Make) -> None:
    """Nothing dropped and all alike is the run without a selection, to the last bit of its parameters."""
    nothing = {"name": "confidence", "confidence_quantile": 0, "uncertainty_quantile": 0, "weigh": False}
    tree = tiny_config(trainer={"steps": 4})
    expected, actual = (
        final(run({**tree, "selection": spec}, tmp_path / str(i))) for i, spec in enumerate((None, nothing))
    )
    assert all(tensor.equal(actual[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("microbatch_rows", [None, 2])
def test_resume_is_exact(tmp_path: Path, tiny_config: Make, microbatch_rows: int | None) -> None:
    """Thresholds and counts are a part of the checkpoint: the same bits at the end."""
    sizes = {"steps": 8, "keep_checkpoints": 99, "microbatch_rows": microbatch_rows}
    tree = tiny_config(trainer=sizes, selection=CONFIDENCE)
    full = run(tree, tmp_path / "full")
    part = run(tree, rewound(full, tmp_path / "part", 3), resume=True)
    assert_same_outcome(full, part)
    state = json.loads((part / "checkpoints/step-000008/state.json").read_text())["selection"]
    assert 8 * 6 == sum(state["offered"])
    forgetful = rewound(full, tmp_path / "forgetful", 3)
    path = forgetful / "checkpoints/step-000003/state.json"
    saved = json.loads(path.read_text())
    del saved["selection"]
    path.write_text(json.dumps(saved))
    with pytest.raises(AssertionError):  # a saboteur: a checkpoint without the thresholds
        assert_same_outcome(full, run(tree, forgetful, resume=True))


def test_another_selection_begins_anew(tmp_path: Path, tiny_config: Make) -> None:
    """Refused without --allow-changes; with it the counts start again."""
    tree = tiny_config(trainer={"steps": 6}, selection=CONFIDENCE)
    part = rewound(run(tree, tmp_path / "full"), tmp_path / "part", 3)
    shutil.copy(tmp_path / "full" / "data.json", part)
    other = {**tree, "selection": {**CONFIDENCE, "decay": 0.8}}
    with pytest.raises(RunError, match=r"selection\.decay was 0\.5 and is now 0\.8"):
        run(other, part, resume=True)
    run(other, part, resume=True, allow_changes=True)
    state = json.loads((part / "checkpoints/step-000006/state.json").read_text())["selection"]
    assert 3 * 6 == sum(state["offered"])


def test_a_store_gives_the_teachers_losses(tmp_path: Path, tiny_config: Make) -> None:
    """Weighed from what was captured, the run is close to the one with the live teacher; the first loss is
    the same, and the weights of the second step depend on what was read."""
    from ddkmix.capture import capture

    tree = tiny_config(trainer={"steps": 4}, selection=CONFIDENCE)
    tree["loss"] = [{"name": "cross_entropy", "weight": 1.0}]
    live = run(tree, tmp_path / "live")
    tree |= {"signal": {"source": "store"}, "capture": {"folder": str(tmp_path / "logits")}}
    capture(parse_config({**tree, "run_dir": str(tmp_path / "x")}, where="test"))
    stored = run(tree, tmp_path / "stored")
    pairs = zip(*(read_lines(path / "metrics.jsonl") for path in (live, stored)), strict=True)
    for one, other in pairs:
        assert one["train/objective"] == pytest.approx(other["train/objective"], rel=1e-3)
        assert one["selection/kept/math"] == other["selection/kept/math"]


def test_another_tokenizer_is_refused_before_any_model_is_loaded(
    tiny_config: Make, tiny_teacher: Path, other_teacher: Path
) -> None:
    """One line that names the way out."""
    tree = tiny_config(
        teacher={"model": str(other_teacher)},
        student={"init": "load", "model": str(tiny_teacher)},
        selection=CONFIDENCE,
        loss=[{"name": "cross_entropy", "weight": 1.0}, {"name": "uld", "weight": 0.5}],
    )
    with pytest.raises(ConfigError, match="has another tokenizer; use 'difference'"):
        check(parse_config(tree, where="test"))
