"""What users do to a Trainer: it works, or one line says why not; and what the adapter relies on."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ddkmix import DomainMixture, GapEvaluator, MixtureBatchSampler, Reweighter
from ddkmix.errors import ConfigError, DataError, RunError
from ddkmix.integrations.lightning import MixtureCallback, MixtureDataModule
from tests.conftest import REPO
from tests.hand_made import numbered_rows
from tests.integrations.conftest import Rows
from tests.integrations.lightning_student import QUIET, Language, Student, trainer_of
from tests.integrations.policies import Rotating

STEPS, NAMES = 8, ("a", "b", "c")
MakeMixture = Callable[..., DomainMixture]

pytestmark = QUIET


@pytest.fixture
def make(tmp_path: Path) -> MakeMixture:
    """A function that makes the same small mixture; each row names itself by its tokens."""

    def mixture(**options: Any) -> DomainMixture:
        rows = {
            name: numbered_rows(tmp_path / "rows", name, 20, length=4, seq_len=4, first=1 + 40 * i)
            for i, name in enumerate(options.pop("names", NAMES))
        }
        return DomainMixture(rows, **{"batch_rows": 6, **options})

    return mixture


@pytest.fixture
def plain(make: MakeMixture) -> Rows:
    """The rows of each step, with constant weights."""
    return [[tuple(row) for row in batch["input_ids"].tolist()] for batch in islice(make(), STEPS)]


def reweighter_of(
    mixture: DomainMixture, folder: Path, interval_steps: int = 2, teacher: Language | None = None
) -> Reweighter:
    """Weights that move at every interval."""
    held_out = {name: [{"input_ids": [1, 2, 3, 4]}] for name in mixture.domains}
    evaluator = GapEvaluator(held_out, teacher=teacher, cache_dir=folder / "cache")
    return Reweighter(mixture, evaluator, Rotating(), interval_steps=interval_steps)


def fit(
    folder: Path, mixture: DomainMixture, *callbacks: Callback, student: Student | None = None, **options: Any
) -> Student:
    """Train with constant weights."""
    student, ckpt_path = student or Student(), options.pop("ckpt_path", None)
    trainer = trainer_of(folder, MixtureCallback(mixture), *callbacks, **{"max_steps": STEPS, **options})
    trainer.fit(student, MixtureDataModule(mixture), ckpt_path=ckpt_path)
    return student


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pytorch_lightning_is_the_same(tmp_path: Path, make: MakeMixture, plain: Rows) -> None:
    """Its Trainer takes only its own classes; stopped in the middle of a step and resumed."""
    import pytorch_lightning

    from ddkmix.integrations import pytorch_lightning as adapter

    class Twin(pytorch_lightning.LightningModule):
        training_step, rows = Student.training_step, Student.rows
        configure_optimizers = Student.configure_optimizers

        def __init__(self, fails_at: int | None) -> None:
            super().__init__()
            self.model, self.fails_at, self.seen = Language(), fails_at, []

    path = tmp_path / "saved.ckpt"
    for fails_at in (10, None):
        mixture, student = make(), Twin(fails_at)
        trainer = pytorch_lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            accumulate_grad_batches=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[adapter.MixtureCallback(mixture)],
        )
        data = adapter.MixtureDataModule(mixture)
        try:
            trainer.fit(student, data, ckpt_path=path if path.exists() else None)
        except ZeroDivisionError:
            trainer.save_checkpoint(path)
    assert plain[3:] == student.rows(3, 3)


def test_only_the_adapters_import_lightning() -> None:
    """ddkmix, and what the two adapters share, need none of it."""
    code = (
        "import sys, ddkmix.integrations.lightning_hooks\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPO)})


# --- weights ----------------------------------------------------------------------------------------------


class Moves(Callback):
    """A user's own callback, which moves all weight to `a` after three steps."""

    def __init__(self, mixture: DomainMixture) -> None:
        self.mixture = mixture

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the third step's last micro-batch."""
        if trainer.global_step == 3 and self.mixture.state.version == 0:
            self.mixture.set_weights({"a": 1.0, "b": 0.0, "c": 0.0})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_change_after_a_step_is_whole_at_the_next(
    tmp_path: Path, make: MakeMixture, plain: Rows, workers: int
) -> None:
    """Also with micro-batches, whatever workers have read ahead."""
    mixture = make(num_workers=workers)
    rows = fit(tmp_path, mixture, Moves(mixture), accumulate_grad_batches=3).rows(3)
    assert plain[:3] == rows[:3]
    assert all(row[0] <= 20 for step in rows[3:] for row in step)


# --- what the adapter relies on in Lightning ----------------------------------------------------------------


class Endless:
    """The loader of a mixture without its length."""

    def __init__(self, mixture: DomainMixture) -> None:
        self.mixture = mixture

    def __iter__(self) -> Iterator[Any]:
        return iter(self.mixture.loader(steps=STEPS))


class HandedOut(Callback):
    """Steps handed out by the mixture at the end of each optimizer step."""

    def __init__(self, mixture: DomainMixture) -> None:
        self.mixture, self.found = mixture, []

    def on_train_batch_end(self, *_: Any) -> None:
        """Before the next batch is fetched, if all is well."""
        self.found.append(self.mixture.state.step)


def test_nothing_is_read_ahead(tmp_path: Path, make: MakeMixture) -> None:
    """With a length, the next batch is asked for after on_train_batch_end."""
    mixture = make()
    handed_out = HandedOut(mixture)
    fit(tmp_path, mixture, handed_out)
    assert [1, 2, 3, 4, 5, 6, 7, 8] == handed_out.found


def test_lightning_reads_ahead_of_a_loader_without_a_length(tmp_path: Path, make: MakeMixture) -> None:
    """This is why ours has one; should Lightning change, this test tells."""
    mixture = make()
    handed_out = HandedOut(mixture)
    trainer_of(tmp_path, handed_out, max_steps=STEPS).fit(Student(), Endless(mixture))
    assert [2, 3, 4, 5, 6, 7, 8, 8] == handed_out.found


def test_a_loader_that_is_read_ahead_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Whoever reads ahead: here the loader has no length."""
    mixture = make()
    trainer = trainer_of(tmp_path, MixtureCallback(mixture), max_steps=STEPS)
    with pytest.raises(ConfigError, match=r"steps=None\) and Trainer\(max_steps=8\).*reads a batch ahead"):
        trainer.fit(Student(), mixture.loader())


# --- a user's own loaders -----------------------------------------------------------------------------------


class OwnData(LightningDataModule):
    """A user's own data module; the mixture may stand beside other loaders."""

    def __init__(self, mixture: DomainMixture, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.mixture, self.wrap = mixture, wrap

    def train_dataloader(self) -> Any:
        """As the documentation says."""
        microbatches = self.trainer.accumulate_grad_batches
        return self.wrap(self.mixture.loader(steps=self.trainer.max_steps, microbatches=microbatches))


class First(Student):
    """Trains on the mixture's part of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The first loader's."""
        return super().training_step(batch["text"], batch_idx)


OTHER = DataLoader(list(range(100)), batch_size=1)


@pytest.mark.filterwarnings("ignore:You're resuming:UserWarning")  # the other loader really cannot
@pytest.mark.parametrize(
    ("student", "wrap"),
    [(Student, lambda loader: loader), (First, lambda loader: {"text": loader, "other": [OTHER]})],
)
def test_a_loader_in_a_data_module_of_the_users(
    tmp_path: Path, make: MakeMixture, plain: Rows, student: type[Student], wrap: Callable[[Any], Any]
) -> None:
    """Alone or beside others: stopped in the middle of a step and resumed."""
    for first, fails_at in ((0, 11), (3, None)):
        mixture = make()
        trainer = trainer_of(
            tmp_path,
            MixtureCallback(mixture),
            max_steps=STEPS,
            accumulate_grad_batches=3,
            num_sanity_val_steps=0,
        )
        module, path = student(fails_at), tmp_path / "saved.ckpt" if first else None
        try:
            trainer.fit(module, OwnData(mixture, wrap), ckpt_path=path)
        except ZeroDivisionError:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert plain[3:] == module.rows(3, 3)


# --- runs that go on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 6, 0.25])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_epochs_of_limit_train_batches(
    tmp_path: Path, make: MakeMixture, plain: Rows, stop: int, limit: float
) -> None:
    """An epoch is a stretch of the run: rows go on over it, also after a resume within or between epochs."""
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1)
    options = {"accumulate_grad_batches": 3, "limit_train_batches": limit, "ckpt_path": None}
    assert plain == fit(tmp_path, make(), saving, **options).rows(3)
    (path,) = (tmp_path / "saved").glob(f"*step={stop}.ckpt")
    assert plain[stop:] == fit(tmp_path, make(), **{**options, "ckpt_path": path}).rows(3, stop)


def test_a_finished_run_is_made_longer(tmp_path: Path, make: MakeMixture, plain: Rows) -> None:
    """By its last checkpoint, and by the same Trainer."""
    mixture, student = make(), Student()
    trainer = trainer_of(tmp_path, MixtureCallback(mixture), max_steps=3)
    trainer.fit(student, MixtureDataModule(mixture))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert plain[3:] == fit(tmp_path, make(), ckpt_path=tmp_path / "saved.ckpt").rows(1, 3)
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit(student, MixtureDataModule(mixture))
    assert plain == student.rows(1)


def test_an_interrupted_trainer_fits_again(tmp_path: Path, make: MakeMixture, plain: Rows) -> None:
    """The step that was not finished is served again; a notebook's way."""
    mixture, student = make(num_workers=2), Student(fails_at=10)
    trainer = trainer_of(tmp_path, MixtureCallback(mixture), max_steps=STEPS, accumulate_grad_batches=3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(student, MixtureDataModule(mixture))
    student.fails_at, student.seen = None, []
    trainer.fit(student, MixtureDataModule(mixture))
    assert plain[3:] == student.rows(3, 3)


def test_the_learning_rate_finder_leaves_the_run_as_it_was(
    tmp_path: Path, make: MakeMixture, plain: Rows
) -> None:
    """It trains a few steps and goes back; so do the rows."""
    student = Student()
    student.lr = 1e-3
    finder = LearningRateFinder(num_training_steps=3, min_lr=1e-4, max_lr=1e-2, update_attr=False)
    fit(tmp_path, make(), finder, student=student)
    assert 3 + STEPS == len(student.seen)
    student.seen = student.seen[3:]
    assert plain == student.rows(1)


def test_domains_may_change_where_it_is_allowed(tmp_path: Path, make: MakeMixture, caplog: Any) -> None:
    """As in ddkmix train --resume --allow-changes; each change is logged."""
    fit(tmp_path, make(), ModelCheckpoint(tmp_path / "saved", "at", every_n_train_steps=4), max_steps=7)
    path = tmp_path / "saved" / "at.ckpt"
    with pytest.raises(DataError, match="domain 'd' was added"):
        fit(tmp_path, make(names="abcd"), ckpt_path=path)
    mixture = make(names="abcd")
    trainer = trainer_of(tmp_path, MixtureCallback(mixture, allow_changes=True), max_steps=12)
    trainer.fit(Student(), MixtureDataModule(mixture), ckpt_path=path)
    assert 12 * 6 == sum(mixture.served.values())
    assert "domain 'd' was added" in caplog.text


def test_a_run_ends_when_no_domain_may_serve_another_row(
    tmp_path: Path, make: MakeMixture, caplog: Any
) -> None:
    """Lightning alone would begin empty epochs for ever."""
    student = fit(tmp_path, make(max_epochs=0.3), max_steps=100)
    assert [0, 1, 2] == [step for step, _ in student.seen]
    assert "no domain may serve another row after 3 steps" in caplog.text
    with pytest.raises(RunError, match="min_steps or min_epochs ask for more"):
        fit(tmp_path, make(max_epochs=0.3), max_steps=100, min_steps=10)


# --- measuring ----------------------------------------------------------------------------------------------


def test_losses_weights_and_epochs_are_logged_at_every_interval(tmp_path: Path, make: MakeMixture) -> None:
    """By the Trainer's loggers, under the number of finished steps, whatever log_every_n_steps."""
    reweighter = reweighter_of(make(), tmp_path, interval_steps=3)
    logger = CSVLogger(tmp_path / "log", name="", version="")
    trainer = trainer_of(
        tmp_path, MixtureCallback(reweighter), max_steps=STEPS, logger=logger, log_every_n_steps=5
    )
    trainer.fit(Student(), MixtureDataModule(reweighter.mixture))
    lines = [line.split(",") for line in (tmp_path / "log" / "metrics.csv").read_text().splitlines()]
    at = {name: i for i, name in enumerate(lines[0])}
    logged = [(line[at["step"]], round(float(line[at["mixture/weight/b"]]), 6)) for line in lines[1:]]
    assert [("0", 0.05), ("3", 0.9), ("6", 0.05)] == logged
    assert {"loss_gap/a", "student_loss/c", "mixture/epochs/b"} < set(at)


def test_callbacks_monitor_what_is_measured(tmp_path: Path, make: MakeMixture) -> None:
    """EarlyStopping and ModelCheckpoint find `loss_gap/a` where they look for logged metrics."""
    reweighter = reweighter_of(make(), tmp_path)
    trainer = trainer_of(tmp_path, MixtureCallback(reweighter), max_steps=STEPS)
    trainer.fit(Student(), MixtureDataModule(reweighter.mixture))
    assert reweighter.metrics()["loss_gap/a"] == pytest.approx(float(trainer.callback_metrics["loss_gap/a"]))


@pytest.mark.parametrize(
    ("precision", "expected"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)]
)
def test_the_student_is_measured_in_the_trainers_precision(
    tmp_path: Path, make: MakeMixture, precision: Any, expected: torch.dtype
) -> None:
    """As in the user's own validation_step, in evaluation mode, without gradients; the teacher in its own."""
    student, teacher, found = Student(), Language(), {}

    def note(module: Any, _: Any, logits: torch.Tensor) -> None:
        if not module.training:
            found[module] = (logits.dtype, logits.requires_grad)

    for model in (student.model, teacher):
        model.register_forward_hook(note)
    reweighter = reweighter_of(make(), tmp_path, teacher=teacher)
    trainer = trainer_of(tmp_path, MixtureCallback(reweighter), max_steps=2, precision=precision)
    trainer.fit(student, MixtureDataModule(reweighter.mixture))
    assert {student.model: (expected, False), teacher: (torch.float32, False)} == found
    assert student.model.training


def test_the_module_itself_may_be_the_student(tmp_path: Path, make: MakeMixture) -> None:
    """student=None measures what the strategy trains, by the module's own forward."""

    class Forward(Student):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids)

    reweighter = reweighter_of(make(), tmp_path)
    trainer = trainer_of(tmp_path, MixtureCallback(reweighter, student=None), max_steps=2)
    trainer.fit(Forward(), MixtureDataModule(reweighter.mixture))
    assert 0 < reweighter.metrics()["student_loss/a"]


# --- optimizers ---------------------------------------------------------------------------------------------


class Manual(Student):
    """Steps itself, after every `every` batches."""

    def __init__(self, every: int, count: int = 1) -> None:
        super().__init__()
        self.automatic_optimization, self.every, self.count = False, every, count

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Accumulates by hand."""
        optimizers = self.optimizers()
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        """As many as wanted."""
        return [torch.optim.AdamW(self.parameters(), lr=1e-3) for _ in range(self.count)]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_manual_optimization_says_how_many_batches_make_a_step(
    tmp_path: Path, make: MakeMixture, plain: Rows
) -> None:
    """MixtureDataModule(microbatches=...), checked at every batch; stopped and resumed."""
    saving = ModelCheckpoint(tmp_path / "saved", "at", every_n_train_steps=5, enable_version_counter=False)
    for path in (None, tmp_path / "saved" / "at.ckpt"):
        mixture, student = make(), Manual(every=3)
        trainer = trainer_of(tmp_path, MixtureCallback(mixture), saving, max_steps=STEPS)
        trainer.fit(student, MixtureDataModule(mixture, microbatches=3), ckpt_path=path)
    assert plain[5:] == student.rows(3, 5)


def test_a_step_of_other_batches_than_announced_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """The batch after the announced last one belongs to a step that the trainer has not reached."""
    mixture = make()
    trainer = trainer_of(tmp_path, MixtureCallback(mixture), max_steps=STEPS)
    with pytest.raises(RunError, match=r"handed out 2 steps and the trainer has finished 0.*Every 2 micro-"):
        trainer.fit(Manual(every=3), MixtureDataModule(mixture, microbatches=2))


# --- wrong use ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1, "max_epochs": 1}, r"Trainer\(max_steps=-1\): a mixture has no epochs"),
        ({"overfit_batches": 2}, r"overfit_batches=2.*never serves a batch twice"),
        ({"limit_train_batches": 4, "accumulate_grad_batches": 3}, "4 batches an epoch .* multiple of 3"),
        ({"fast_dev_run": True, "accumulate_grad_batches": 3}, r"1 batches an epoch .*fast_dev_run"),
        ({"accumulate_grad_batches": 4}, "cannot be dealt into 4 equal micro-batches"),
    ],
)
def test_settings_that_would_break_steps_are_refused(
    tmp_path: Path, make: MakeMixture, options: dict[str, Any], message: str
) -> None:
    """Before a batch is read."""
    mixture = make()
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, mixture, **options)
    assert 0 == mixture.state.step


def test_fast_dev_run_of_whole_steps_works(tmp_path: Path, make: MakeMixture, plain: Rows) -> None:
    """Three batches are one step of three."""
    assert plain[:1] == fit(tmp_path, make(), fast_dev_run=3, accumulate_grad_batches=3).rows(3)


def test_a_schedule_of_accumulation_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """It would change the rows of a step on the way; one that changes nothing is none."""
    with pytest.raises(ConfigError, match=r"scheduling=\{4: 2, 0: 1\}\) changes the rows of a step"):
        fit(tmp_path, make(), GradientAccumulationScheduler({4: 2}))
    fit(tmp_path, make(), GradientAccumulationScheduler({0: 1}))


def test_several_optimizers_are_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Lightning's global_step counts the steps of each."""
    with pytest.raises(ConfigError, match=r"2 optimizers: .* counts every one's steps"):
        fit(tmp_path, make(), student=Manual(every=1, count=2))


def test_a_data_module_without_its_callback_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Nobody would save the state; one of another mixture does not count."""
    with pytest.raises(ConfigError, match="MixtureDataModule without a MixtureCallback of the same mixture"):
        trainer_of(tmp_path, MixtureCallback(make()), max_steps=STEPS).fit(
            Student(), MixtureDataModule(make())
        )


def test_a_callback_without_its_loader_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """The weights would go nowhere."""
    trainer = trainer_of(tmp_path, MixtureCallback(make()), max_steps=STEPS)
    with pytest.raises(ConfigError, match="none of this callback's mixture"):
        trainer.fit(Student(), make().loader(steps=STEPS))


def test_a_loader_of_other_micro_batches_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Lightning would step elsewhere."""
    mixture = make()
    trainer = trainer_of(tmp_path, MixtureCallback(mixture), max_steps=STEPS, accumulate_grad_batches=3)
    with pytest.raises(ConfigError, match=r"microbatches=2\) and Trainer\(accumulate_grad_batches=3\)"):
        trainer.fit(Student(), mixture.loader(steps=STEPS, microbatches=2))


def test_a_used_mixture_is_refused_in_a_new_run(tmp_path: Path, make: MakeMixture) -> None:
    """Without a checkpoint it would go on in the middle."""
    mixture = make()
    fit(tmp_path, mixture)
    with pytest.raises(RunError, match="handed out 8 steps and the trainer has finished 0; begin with a new"):
        fit(tmp_path, mixture)


def test_a_checkpoint_without_a_mixture_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Its run had no MixtureCallback; rows would begin anew in the middle of a run."""
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.fit(Student(), make().loader(steps=2))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(RunError, match="the checkpoint holds no state of a mixture"):
        fit(tmp_path, make(), ckpt_path=tmp_path / "saved.ckpt")


def test_a_skipped_batch_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """A module that answers -1 ends the epoch there, and Lightning drops the batch."""

    class Skips(Student):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.trainer.global_step == 2 else None

    with pytest.raises(RunError, match=r"out 4 steps and the trainer has finished 2.*none may be skipped"):
        fit(tmp_path, make(), student=Skips())


def test_a_batch_sampler_is_refused(tmp_path: Path) -> None:
    """The DataLoader around it would have read rows of the old weights."""
    sampler = MixtureBatchSampler({name: [1, 2, 3] for name in NAMES}, batch_rows=3)
    with pytest.raises(
        ConfigError, match="MixtureCallback of a MixtureBatchSampler: a DataLoader reads ahead"
    ):
        MixtureCallback(Reweighter(sampler, None))


def test_a_student_that_is_not_there_is_refused(tmp_path: Path, make: MakeMixture) -> None:
    """Before anything is loaded."""
    reweighter = reweighter_of(make(), tmp_path)
    trainer = trainer_of(tmp_path, MixtureCallback(reweighter, student="net"), max_steps=STEPS)
    with pytest.raises(ConfigError, match=r"student='net'\): Student has no such attribute"):
        trainer.fit(Student(), MixtureDataModule(reweighter.mixture))
