"""The Trainer with a distillation loss, against DistillationModel, the plain Trainer and two processes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from ddkmix.batch import DenseSignal
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError, DataError
from ddkmix.integrations.trainer_loss import DistillationTrainer, DistillationTrainerMixin
from ddkmix.integrations.transformers import MixtureTrainer
from ddkmix.losses import build_terms, terms_at
from ddkmix.predicted_tokens import predicted
from ddkmix.sections import Schedule
from ddkmix.stored_teacher import StoredTeacher
from ddkmix.teacher import LiveTeacher
from tests.conftest import REPO
from tests.integrations.trainers import BATCH_ROWS, FIRST, LENGTH, Constant, arguments, packed, student
from tests.test_elastic import torchrun

STEPS, LR = 3, 0.5
MOVING = [
    {"name": "cross_entropy", "weight": "rest"},
    {"name": "forward_kl", "weight": {"schedule": "linear", "start": 0.9, "end": 0.1}},
]
IGNORE = -100


def rows(count: int = STEPS * BATCH_ROWS) -> list[dict[str, list[int]]]:
    """Rows whose numbers of predicted tokens differ, so that a mean of means is not the mean."""
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(320, (LENGTH,), generator=generator).tolist()
        length = (LENGTH, 4)[i // 4 % 2] - i % 2
        labels = ids[:length] + [IGNORE] * (LENGTH - length)
        if i % 4 == 0:  # no token predicts the first one anyway
            labels[0] = IGNORE
        mask = [1] * length + [0] * (LENGTH - length)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def settings(folder: Path, accumulation: int = 1, **changes: Any) -> TrainingArguments:
    """Plain gradient descent over the rows in their order."""
    options = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**arguments(folder, accumulation=accumulation, **{**options, **changes}))


def trained(cls: type, folder: Path, accumulation: int = 1, *, changes: Any = None, **options: Any) -> Any:
    """A trainer that has trained a small student on the rows."""
    run = cls(student(), settings(folder, accumulation, **(changes or {})), train_dataset=rows(), **options)
    run.train()
    return run


def teacher() -> nn.Module:
    """A random model that is wider than the student."""
    model: nn.Module = student(7, hidden_size=32)
    return model


def literal(loss: Sequence[Any]) -> tuple[nn.Module, list[float], list[list[float]]]:
    """A loop of ours: whole steps of 12 rows, the mean over their tokens; objectives and means of terms."""
    model, wise, data = student(), LiveTeacher(teacher().eval()), rows()
    wrapped, terms = DistillationModel(model), build_terms(loss)
    objectives, means = [], []
    for step in range(STEPS):
        part = data[step * BATCH_ROWS :][:BATCH_ROWS]
        ids, labels = (torch.tensor([row[name] for row in part]) for name in ("input_ids", "labels"))
        now = terms_at(terms, step, STEPS, Schedule())
        count = int(predicted(labels).sum())
        objective, values = wrapped(ids, labels, 1 / count, now, wise.signal({"input_ids": ids}))
        objective.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
                parameter.grad = None
        objectives.append(objective.item())
        means.append(values.mean(dim=1).tolist())
    return model, objectives, means


def assert_same(expected: nn.Module, actual: nn.Module, atol: float = 2e-6) -> None:
    """Every parameter, under the same name."""
    theirs = actual.state_dict()
    assert list(expected.state_dict()) == list(theirs)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: n + m)


def logged(run: Trainer, key: str) -> list[float]:
    """What the lines of the log have under a key."""
    return [line[key] for line in run.state.log_history if key in line]


# --- the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_trains_as_our_own_loop_does(tmp_path: Path, accumulation: int) -> None:
    """Parameters after three steps, the loss and the terms of each, with weights that move."""
    expected, objectives, means = literal(MOVING)
    run = trained(DistillationTrainer, tmp_path, accumulation, loss=MOVING, teacher=teacher())
    assert_same(expected, run.model)
    assert objectives == pytest.approx(logged(run, "loss"), rel=1e-4)
    found = zip(logged(run, "loss/cross_entropy"), logged(run, "loss/forward_kl"), strict=True)
    for step, values in zip(means, found, strict=True):
        assert step == pytest.approx(values, rel=1e-4)


def test_the_micro_batches_would_show_a_mean_of_means() -> None:
    """The rows above have as many predicted tokens as make the test above worth something."""
    counts = [int(predicted(torch.tensor([row["labels"]])).sum()) for row in rows()]
    parts = [sum(counts[i : i + 4]) for i in range(0, len(counts), 4)]
    assert all(max(of_step) > 1.2 * min(of_step) for of_step in (parts[:3], parts[3:6], parts[6:]))


def test_terms_of_a_whole_window_are_means_over_its_tokens(tmp_path: Path) -> None:
    """A line for two steps: sums over tokens, not the mean of two means; the next one starts anew."""
    changes = {"logging_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    run = trained(DistillationTrainer, tmp_path, 3, changes=changes, loss=["cross_entropy"])
    ids, labels = (torch.tensor([row[name] for row in rows()[:24]]) for name in ("input_ids", "labels"))
    model = DistillationModel(student())
    nats = model(ids, labels, 1.0, build_terms(["cross_entropy"]))[1][0]
    assert nats.mean().item() == pytest.approx(logged(run, "loss/cross_entropy")[0], rel=1e-6)


@pytest.mark.parametrize(("bf16", "atol"), [(False, 2e-6), (True, 2e-2)])
def test_cross_entropy_alone_is_the_plain_trainer(tmp_path: Path, bf16: bool, atol: float) -> None:
    """Without a teacher nothing changes, with and without Accelerate's autocast."""
    changes = {"bf16": bf16}
    expected = trained(Trainer, tmp_path, 3, changes=changes)
    run = trained(DistillationTrainer, tmp_path, 3, changes=changes, loss=["cross_entropy"])
    assert_same(expected.model, run.model, atol)
    assert logged(expected, "loss") == pytest.approx(logged(run, "loss"), rel=1e-5 if not bf16 else 1e-2)


def test_a_regulariser_of_hidden_states_is_served(tmp_path: Path) -> None:
    """hidden_consistency records layers in the student's forward pass."""
    loss = ["cross_entropy", {"name": "hidden_consistency", "weight": 0.1}]
    run = trained(DistillationTrainer, tmp_path, 1, loss=loss)
    assert all(value > 0 for value in logged(run, "loss/hidden_consistency"))


def test_a_model_without_loss_arguments_is_served(tmp_path: Path) -> None:
    """The tokens of a step are counted although the student itself asks for no count; so is evaluation."""

    class Plain(LlamaForCausalLM):
        accepts_loss_kwargs = False

        def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None):  # type: ignore[no-untyped-def]
            return super().forward(input_ids, attention_mask, labels=labels, use_cache=use_cache)

    model = Plain(student().config)
    model.load_state_dict(student().state_dict())
    run = DistillationTrainer(
        model, settings(tmp_path, 3), train_dataset=rows(), loss=MOVING, teacher=teacher()
    )
    run.train()
    assert_same(literal(MOVING)[0], run.model)
    assert run.evaluate(rows(4))["eval_loss"] > 0


# --- what the student stays -------------------------------------------------------------------------


def test_evaluation_generation_and_files_are_those_of_the_plain_student(tmp_path: Path) -> None:
    """A trained student evaluates, generates, saves and loads as if nobody had touched it."""
    run = trained(DistillationTrainer, tmp_path, 1, loss=MOVING, teacher=teacher())
    plain = student()
    plain.load_state_dict(run.model.state_dict())
    theirs = Trainer(plain, settings(tmp_path), eval_dataset=rows(10))
    assert theirs.evaluate()["eval_loss"] == pytest.approx(run.evaluate(rows(10))["eval_loss"], rel=1e-6)
    start = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(start)}
    assert plain.generate(start, **options).tolist() == run.model.generate(start, **options).tolist()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(plain, loaded, 0.0)
    assert type(plain) is type(loaded)


def test_a_run_is_resumed(tmp_path: Path) -> None:
    """Weights of terms are those of the step, so a resumed run ends where the whole one does."""
    changes = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(DistillationTrainer, tmp_path, 1, changes=changes, loss=MOVING, teacher=teacher())
    run = DistillationTrainer(
        student(), settings(tmp_path, **changes), train_dataset=rows(), loss=MOVING, teacher=teacher()
    )
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert_same(whole.model, run.model)


# --- over a mixture ---------------------------------------------------------------------------------


class Said(StoredTeacher):
    """Stands for a logits store: notes which rows it is asked for, and lets a model answer."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self._live = LiveTeacher(teacher().eval())

    def signal(self, batch: Any) -> DenseSignal:
        """Notes (domain, shard, row, first token) of each row."""
        columns = (batch["domain_ids"][:, None], batch["row_places"], batch["input_ids"][:, :1])
        self.asked += torch.cat(columns, dim=1).tolist()
        return self._live.signal(batch)


class Mine(DistillationTrainerMixin, MixtureTrainer):
    """Both at once."""


@pytest.mark.parametrize("accumulation", [1, 3])
def test_over_a_mixture_a_store_is_told_the_places_of_rows(tmp_path: Path, accumulation: int) -> None:
    """Every row comes with its domain and its place, whatever the micro-batches; evaluation goes on."""
    said = Said()
    mixture = packed(tmp_path)
    options = {"evaluator": Constant(), "interval_steps": 2, "loss": MOVING, "teacher": said}
    args = settings(tmp_path, accumulation, train_sampling_strategy="random")
    run = Mine(student(), args, train_dataset=mixture, **options)
    run.train()
    assert STEPS * BATCH_ROWS == len(said.asked)
    for domain, shard, row, token in said.asked:  # a shard has four rows
        assert FIRST[mixture.domains[domain]] + 4 * shard + row == token
    assert STEPS == len(logged(run, "loss/forward_kl"))


def test_without_a_mixture_a_store_knows_no_row(tmp_path: Path) -> None:
    """The batches of a plain Trainer do not say where their rows lie."""
    with pytest.raises(ConfigError, match="lacks domain_ids, row_places"):
        trained(DistillationTrainer, tmp_path, loss=MOVING, teacher=Said())


# --- two processes ----------------------------------------------------------------------------------


def main(folder: str) -> None:
    """Three steps on every process of torchrun: 2 processes x 2 micro-batches x 3 rows."""
    from torch.distributed import barrier, get_rank

    changes = {"per_device_train_batch_size": 3}
    run = trained(DistillationTrainer, Path(folder), 2, changes=changes, loss=MOVING, teacher=teacher())
    if get_rank() == 0:
        run.model.save_pretrained(f"{folder}/student")
        Path(folder, "log.json").write_text(json.dumps(run.state.log_history))
    barrier()  # the group goes with the process (rank_program): taken down beside a DDP model it may hang


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Real gloo processes under DDP, whose hooks must see the objective: the same parameters and terms."""
    program = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); "
        "from tests.integrations.test_trainer_loss import main; main(sys.argv[1])"
    )
    (tmp_path / "program.py").write_text(program)
    torchrun(2, str(tmp_path / "program.py"), str(tmp_path))
    expected, objectives, means = literal(MOVING)
    assert_same(expected, AutoModelForCausalLM.from_pretrained(tmp_path / "student"))
    log = json.loads((tmp_path / "log.json").read_text())
    assert objectives == pytest.approx([line["loss"] for line in log if "loss" in line], rel=1e-4)
    found = [line["loss/forward_kl"] for line in log if "loss" in line]
    assert [mean for _, mean in means] == pytest.approx(found, rel=1e-4)


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": ["forward_kl"]}, "loss forward_kl needs a teacher, and teacher is None; give one."),
        (
            {"loss": ["cross_entropy", "hidden_match"], "teacher": object()},
            "loss hidden_match compares layers by projections, which a Trainer would neither train nor "
            "save; use `ddkmix train`, or leave it out.",
        ),
        (
            {"loss": ["forward_kl"], "teacher": "models/big"},
            "teacher is a str; give a model, or what has signal(batch).",
        ),
        ({"loss": "cross_entropy"}, "loss = 'cross_entropy'; give a list of terms, if only of one."),
        ({"loss": [3]}, "loss.0 = 3; give a name, or a mapping with `name` and parameters."),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    """One line, before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        DistillationTrainer(student(), settings(tmp_path), train_dataset=rows(), **options)
    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("options", "changes", "name"),
    [
        ({"compute_loss_func": lambda *_: None}, {}, "compute_loss_func"),
        ({"model_init": lambda: student(), "model": None}, {}, "model_init"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_another_loss_is_refused(tmp_path: Path, options: Any, changes: Any, name: str) -> None:
    """What the Trainer would do with it would be lost."""
    options = {"model": student(), **options}
    with pytest.raises(ConfigError, match=f"^DistillationTrainer does not support {name}"):
        DistillationTrainer(args=settings(tmp_path, **changes), loss=["cross_entropy"], **options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"labels": None}, ConfigError, "lacks labels"),
        ({"position_ids": [*range(LENGTH)]}, ConfigError, "has position_ids, which this loss does not look"),
        ({"attention_mask": [0] + [1] * (LENGTH - 1)}, DataError, "pad at the end only"),
    ],
)
def test_rows_that_it_would_misread_are_refused(
    tmp_path: Path, change: Any, kind: type[Exception], message: str
) -> None:
    """The objective knows tokens and labels, and attention from left to right over all of them."""
    data = [{k: v for k, v in {**row, **change}.items() if v is not None} for row in rows()]
    run = DistillationTrainer(student(), settings(tmp_path), train_dataset=data, loss=["cross_entropy"])
    with pytest.raises(kind, match=message):
        run.train()
