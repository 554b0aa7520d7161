"""MosaicML Composer: its own Trainer, checkpoints and resume, on the rows of our own trainer."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from ddkmix.errors import ConfigError, DataError, MixtureExhausted, RunError
from tests.integrations.composer_here import import_composer
from tests.integrations.conftest import BATCH_ROWS, INTERVAL_STEPS, STEPS, Parts, Rows, rows_of

import_composer()

from composer import Trainer  # noqa: E402
from composer.core import Callback, Precision, State, Time  # noqa: E402
from composer.loggers import InMemoryLogger, Logger  # noqa: E402
from composer.models import HuggingFaceModel  # noqa: E402

from ddkmix.integrations.composer import MixtureCallback, MixtureLoader  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

Make = Callable[..., Parts]


class Recorder(Callback):
    """The rows of each batch, taken from the micro-batches that the model is given."""

    def __init__(self) -> None:
        self.steps: Rows = []
        self.sizes: list[int] = []
        self._rows: list[Any] = []

    def before_forward(self, state: State, logger: Logger) -> None:
        """A micro-batch is about to be trained on."""
        self.sizes.append(len(state.batch["input_ids"]))
        self._rows += rows_of(state.batch["input_ids"])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer counts this batch as done."""
        self.steps.append(self._rows)
        self._rows = []


def trainer_of(
    parts: Parts,
    recorder: Recorder,
    *,
    until: str = f"{STEPS}ba",
    epoch_steps: int | None = None,
    **options: Any,
) -> Trainer:
    """Composer's Trainer with the mixture as its data, which learns nothing."""
    options.setdefault("callbacks", [MixtureCallback(parts.reweighter), recorder])
    options.setdefault("train_dataloader", MixtureLoader(parts.mixture, epoch_steps=epoch_steps))
    return Trainer(
        model=HuggingFaceModel(parts.student),
        optimizers=torch.optim.SGD(parts.student.parameters(), lr=0.0),
        max_duration=until,
        device="cpu",
        progress_bar=False,
        **options,
    )


def fit(trainer: Trainer, **options: Any) -> None:
    """Train and clean up; Composer leaves a folder to the garbage collector, which warns."""
    try:
        trainer.fit(**options)
    finally:
        trainer.close()
        if trainer._checkpoint_saver is not None:
            trainer._checkpoint_saver.tmp_dir_for_symlink.cleanup()


def run(parts: Parts, **options: Any) -> Rows:
    """The rows of each step of a run with Composer."""
    recorder = Recorder()
    trainer = trainer_of(parts, recorder, **options)
    fit(trainer)
    return recorder.steps


def saving(folder: Path, interval: str = "1ba") -> dict[str, Any]:
    """Options that write a checkpoint after every batch."""
    return {"save_folder": str(folder), "save_interval": interval, "save_overwrite": True}


# --- the rows of our own trainer --------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_rows_are_those_of_our_own_trainer(
    trainer_rows: Rows, parts: Make, workers: int, microbatches: int
) -> None:
    """Every step, with weights that move every other step; each in its first batch."""
    recorder = Recorder()
    size = BATCH_ROWS // microbatches
    trainer = trainer_of(parts(num_workers=workers), recorder, device_train_microbatch_size=size)
    fit(trainer)
    assert trainer_rows == recorder.steps
    assert [size] * (STEPS * microbatches) == recorder.sizes


def test_without_a_microbatch_size_a_batch_is_one(trainer_rows: Rows, parts: Make) -> None:
    """Composer takes `batch_size` of the loader: a step's rows on this rank."""
    recorder = Recorder()
    trainer = trainer_of(parts(), recorder, until="2ba")
    fit(trainer)
    assert [BATCH_ROWS] * 2 == recorder.sizes
    assert trainer_rows[:2] == recorder.steps


def test_ranks_share_a_step(trainer_rows: Rows, parts: Make) -> None:
    """Two ranks get a loader of half a batch each, and together the rows of the step."""
    loaders = [MixtureLoader(parts(rank=rank, world_size=2).mixture) for rank in range(2)]
    assert [BATCH_ROWS // 2] * 2 == [loader.batch_size for loader in loaders]
    halves = [rows_of(next(iter(loader))["input_ids"]) for loader in loaders]
    mixture = parts().mixture
    assert sorted(rows_of(next(mixture)["input_ids"])) == sorted(halves[0] + halves[1])


# --- weights ----------------------------------------------------------------------------------------


def test_weights_change_between_two_batches(parts: Make) -> None:
    """Measured before the first batch and after every interval; what comes of it is in Composer's log."""
    made, log = parts(num_workers=2), InMemoryLogger()
    measured = []
    made.reweighter._on_losses = lambda step, *_: measured.append(step)
    run(made, loggers=[log])
    assert list(range(0, STEPS + 1, INTERVAL_STEPS)) == measured
    weight = log.get_timeseries("mixture/weight/code")
    assert measured == [int(batch) for batch in weight["batch"]]
    assert pytest.approx([0.9, 0.05, 0.05, 0.9, 0.05]) == weight["mixture/weight/code"].tolist()


def test_the_model_that_is_measured_is_the_one_inside(parts: Make) -> None:
    """The transformers model by itself, or the module that the user names."""
    made, seen = parts(), []
    measure = made.evaluator.measure
    made.reweighter._evaluator = type("Spy", (), {"measure": lambda _, m: (seen.append(m), measure(m))[1]})()
    run(made, until="1ba")
    assert [made.student] == seen
    made = parts()
    made.reweighter._evaluator = type("Spy", (), {"measure": lambda _, m: (seen.append(m), measure(m))[1]})()
    other = parts().student
    run(made, until="1ba", callbacks=[MixtureCallback(made.reweighter, model=other)])
    assert other is seen[-1]


def test_a_model_is_measured_in_the_trainers_precision(parts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Composer evaluates; attention kernels of half precision refuse anything else."""
    asked = []

    def context(*given: Any, **named: Any) -> Any:
        asked.append((*given, named))
        return nullcontext()

    monkeypatch.setattr("ddkmix.integrations.composer.get_precision_context", context)
    made = parts()
    run(made, until="1ba")
    assert [(Precision.FP32, None, {"fp8_autocast_enabled": False})] * 2 == asked


def test_a_loader_that_reads_ahead_is_refused(parts: Make) -> None:
    """Somebody else takes a step of the mixture: rows would be lost and a change late."""

    class Thief(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            next(state.train_dataloader.mixture)

    made = parts()
    with pytest.raises(RunError, match=r"finished 1 optimizer steps .* handed out the rows of 2"):
        run(made, callbacks=[Thief(), MixtureCallback(made.reweighter)])


# --- resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_load_path_goes_on_with_the_very_next_row(
    trainer_rows: Rows, parts: Make, tmp_path: Path, stop: int
) -> None:
    """From a checkpoint between and at intervals, with other workers and micro-batches."""
    first = run(parts(num_workers=2), until=f"{stop}ba", **saving(tmp_path))
    resumed = run(
        parts(),
        load_path=str(tmp_path / f"ep0-ba{stop}-rank0.pt"),
        device_train_microbatch_size=BATCH_ROWS // 3,
    )
    assert trainer_rows == first + resumed


def test_autoresume_goes_on_with_the_very_next_row(trainer_rows: Rows, parts: Make, tmp_path: Path) -> None:
    """The same command twice, stopped the first time; it goes on from the checkpoint of two batches ago."""

    class Failure(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 5:
                raise KeyboardInterrupt

    again = {"run_name": "run", "autoresume": True, **saving(tmp_path, "3ba")}
    made, recorder = parts(num_workers=2), Recorder()
    trainer = trainer_of(
        made, recorder, callbacks=[MixtureCallback(made.reweighter), recorder, Failure()], **again
    )
    with pytest.raises(KeyboardInterrupt):
        fit(trainer)
    assert trainer_rows[:5] == recorder.steps
    assert trainer_rows[3:] == run(parts(), **again)


def test_an_interval_at_the_checkpoint_is_not_measured_twice(parts: Make, tmp_path: Path) -> None:
    """Composer saves after the batch's end, so the state holds the weights that were set there."""
    run(parts(), until="2ba", **saving(tmp_path))
    made, measured = parts(), []
    made.reweighter._on_losses = lambda step, *_: measured.append(step)
    run(made, load_path=str(tmp_path / "ep0-ba2-rank0.pt"))
    assert [4, 6, 8] == measured


def test_a_second_fit_loses_no_rows(trainer_rows: Rows, parts: Make) -> None:
    """Composer would spin over as many batches as the epoch has had."""
    recorder = Recorder()
    trainer = trainer_of(parts(num_workers=2), recorder, until="3ba")
    trainer.fit()
    assert active_children()
    fit(trainer, duration="5ba")
    assert trainer_rows == recorder.steps
    assert not active_children()  # Trainer.close stops the mixture's readers


def test_data_given_to_fit_resume_too(trainer_rows: Rows, parts: Make, tmp_path: Path) -> None:
    """A loader that comes after the checkpoint was loaded is given its state then."""
    first = run(parts(), until="3ba", **saving(tmp_path))
    made, recorder = parts(), Recorder()
    path = str(tmp_path / "ep0-ba3-rank0.pt")
    trainer = trainer_of(made, recorder, train_dataloader=None, load_path=path)
    fit(trainer, train_dataloader=MixtureLoader(made.mixture))
    assert trainer_rows == first + recorder.steps


def test_a_saved_state_is_one_string(parts: Make) -> None:
    """Sharded checkpoints load what a fresh run's state has, key by key."""
    made = parts()
    loader, callback = MixtureLoader(made.mixture), MixtureCallback(made.reweighter)
    fresh = loader.dataset.state_dict(0, True), callback.state_dict()
    made.reweighter.step(made.student, 0)
    next(iter(loader))
    later = loader.dataset.state_dict(BATCH_ROWS, True), callback.state_dict()
    assert [["ddkmix"]] * 4 == [list(state) for state in (*fresh, *later)]
    assert 1 == json.loads(later[0]["ddkmix"])["planner"]["step"]


def test_a_checkpoint_without_a_mixture_is_refused(parts: Make, tmp_path: Path) -> None:
    """It was written with other data: in one line, with the way out, and the way out works."""
    made = parts()
    plain = [next(made.mixture) for _ in range(2)]
    for batch in plain:
        del batch["domain_ids"]
    loader: Any = torch.utils.data.DataLoader(plain, batch_size=None)  # type: ignore[arg-type]
    trainer = trainer_of(
        made,
        Recorder(),
        until="2ba",
        train_dataloader=loader,
        callbacks=[],
        device_train_microbatch_size=BATCH_ROWS,
        **saving(tmp_path),
    )
    fit(trainer)
    path, resumed = str(tmp_path / "ep0-ba2-rank0.pt"), parts()
    refused = pytest.raises(DataError, match=r"no state of a mixture.*load_weights_only=True")
    with pytest.warns(UserWarning, match="MixtureCallback is not in the state_dict"), refused:
        trainer_of(resumed, Recorder(), load_path=path, callbacks=[MixtureCallback(resumed.reweighter)])
    assert 1 == len(run(parts(), until="1ba", load_path=path, load_weights_only=True))


@pytest.mark.parametrize("allow_changes", [False, True])
def test_other_data_are_refused_or_allowed(
    parts: Make, tmp_path: Path, allow_changes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of another cap: an error that says so, or a warning if changes are allowed."""
    run(parts(), until="2ba", **saving(tmp_path))
    made = parts(max_epochs=50.0)
    options = {
        "train_dataloader": MixtureLoader(made.mixture, allow_changes=allow_changes),
        "callbacks": [MixtureCallback(made.reweighter, allow_changes=allow_changes)],
        "load_path": str(tmp_path / "ep0-ba2-rank0.pt"),
    }
    if allow_changes:
        run(made, **options)
        assert STEPS == made.mixture.state.step
        assert "goes on although cap_rows was" in caplog.text
    else:
        with pytest.raises(DataError, match="cap_rows was"):
            trainer_of(made, Recorder(), **options)


# --- epochs and the end -----------------------------------------------------------------------------


def test_epochs_end_where_they_would_have_ended(trainer_rows: Rows, parts: Make, tmp_path: Path) -> None:
    """Epochs of three steps, stopped in the second: the resumed one has the two steps that are missing."""

    class Ends(Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def epoch_end(self, state: State, logger: Logger) -> None:
            self.at.append(int(state.timestamp.batch))

    ends, found = [Ends(), Ends()], []
    for i, until in enumerate(["4ba", f"{STEPS}ba"]):
        made, recorder = parts(), Recorder()
        options = {"load_path": str(tmp_path / "ep1-ba4-rank0.pt")} if i else saving(tmp_path)
        callbacks = [MixtureCallback(made.reweighter), recorder, ends[i]]
        run(made, until=until, epoch_steps=3, callbacks=callbacks, **options)
        found += recorder.steps
    assert trainer_rows == found
    assert [3, 6] == ends[0].at + ends[1].at


def test_a_duration_in_epochs_needs_their_length(trainer_rows: Rows, parts: Make) -> None:
    """Two epochs of four steps are eight; without a length Composer says what to give."""
    assert trainer_rows == run(parts(), until="2ep", epoch_steps=4)
    with pytest.raises(ValueError, match="max_duration cannot be specified in epochs"):
        run(parts(), until="2ep")


def test_training_ends_with_the_data(parts: Make) -> None:
    """All domains at their cap: Composer would begin empty epochs for ever."""
    made = parts(max_epochs=0.1)
    rows = sum(rows or 0 for rows in made.mixture.settings.cap_rows)
    start = MixtureLoader(made.mixture).dataset.state_dict(0, True)
    assert rows // BATCH_ROWS == len(run(made, until="100000ba"))
    loader = MixtureLoader(made.mixture)
    assert [] == list(loader)
    with pytest.raises(MixtureExhausted, match="raise max_epochs"):
        list(loader)
    loader.dataset.load_state_dict(start)
    assert rows // BATCH_ROWS == len(list(loader))


# --- mistakes ---------------------------------------------------------------------------------------


def test_a_loader_has_the_length_of_an_epoch(parts: Make) -> None:
    """And none without one; epochs have a step at least."""
    mixture = parts().mixture
    assert 5 == len(MixtureLoader(mixture, epoch_steps=5))
    with pytest.raises(TypeError, match="give epoch_steps"):
        len(MixtureLoader(mixture))
    with pytest.raises(ConfigError, match="epoch_steps = 0"):
        MixtureLoader(mixture, epoch_steps=0)


def test_mistakes_are_told_before_the_first_batch(parts: Make) -> None:
    """Another loader, another mixture, and Composer's own way to say the length of an epoch."""
    made, other = parts(), parts()
    plain: Any = torch.utils.data.DataLoader([{"input_ids": torch.zeros(1)}])
    with pytest.raises(ConfigError, match="reads a DataLoader; MixtureCallback needs"):
        run(made, train_dataloader=plain)
    with pytest.raises(ConfigError, match="reweights one DomainMixture and the Trainer reads another"):
        run(made, train_dataloader=MixtureLoader(other.mixture))
    with pytest.raises(ConfigError, match="train_subset_num_batches = 3 and epoch_steps = None"):
        run(made, train_subset_num_batches=3)
    assert 0 == made.mixture.state.step == other.mixture.state.step


def test_without_a_reweighter_the_weights_are_the_users(parts: Make) -> None:
    """The callback alone keeps a second fit right; the checkpoint holds the mixture by the loader."""
    made, recorder = parts(), Recorder()
    expected = [rows_of(batch["input_ids"]) for batch in islice(parts().mixture, 4)]
    trainer = trainer_of(made, recorder, until="2ba", callbacks=[MixtureCallback(), recorder])
    trainer.fit()
    fit(trainer, duration="2ba")
    assert expected == recorder.steps
    assert {} == MixtureCallback().state_dict()
    assert Time(4, "ba") == trainer.state.timestamp.batch
