"""Lightning's Trainer on a mixture: the rows of every optimizer step, whatever happens between two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from tests.integrations.conftest import Parts, Rows
from tests.integrations.lightning_student import QUIET, Saves, Student, fit

MakeParts = Callable[..., Parts]

pytestmark = QUIET


@pytest.fixture
def whole(tmp_path: Path, parts: MakeParts) -> Callable[[int], Student]:
    """A function that gives the student of an uninterrupted run; each is made once."""

    def make(microbatches: int) -> Student:
        if microbatches not in _WHOLE:
            _WHOLE[microbatches] = fit(tmp_path, parts(), microbatches=microbatches)
        return _WHOLE[microbatches]

    return make


_WHOLE: dict[int, Student] = {}


def same_parameters(one: Student, other: Student) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_rows_are_those_of_our_own_trainer(
    tmp_path: Path, trainer_rows: Rows, parts: MakeParts, workers: int, microbatches: int
) -> None:
    """Every step, with weights that move every other step."""
    student = fit(tmp_path, parts(num_workers=workers), microbatches=microbatches)
    assert trainer_rows == student.rows(microbatches)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_model_checkpoint_goes_on_exactly(
    tmp_path: Path,
    trainer_rows: Rows,
    parts: MakeParts,
    whole: Callable[[int], Student],
    stop: int,
    microbatches: int,
) -> None:
    """fit(ckpt_path=...) between and at intervals, with other workers: rows and parameters."""
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1)
    fit(tmp_path, parts(num_workers=2), saving, max_steps=stop + 1, microbatches=microbatches)
    (path,) = (tmp_path / "saved").glob(f"*step={stop}.ckpt")
    student = fit(tmp_path, parts(), ckpt_path=path, microbatches=microbatches)
    assert trainer_rows[stop:] == student.rows(microbatches, stop)
    assert same_parameters(whole(microbatches), student)


@pytest.mark.parametrize(("microbatches", "at"), [(1, 0), (1, 5), (3, 1), (3, 16), (3, 17)])
def test_a_checkpoint_on_exception_goes_on_exactly(
    tmp_path: Path,
    trainer_rows: Rows,
    parts: MakeParts,
    whole: Callable[[int], Student],
    microbatches: int,
    at: int,
) -> None:
    """The micro-batches of the interrupted step come again, and the step is made of all of them."""
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, parts(), saving, microbatches=microbatches, fails_at=at)
    student = fit(tmp_path, parts(), ckpt_path=Path(saving.ckpt_path), microbatches=microbatches)
    done = at // microbatches
    assert trainer_rows[done:] == student.rows(microbatches, done)
    assert same_parameters(whole(microbatches), student)


@pytest.mark.parametrize(
    ("hook", "batch"),
    [
        ("on_train_batch_start", 7),
        ("on_before_backward", 8),
        ("on_before_zero_grad", 9),
        ("on_train_batch_end", 9),
        ("on_train_batch_end", 11),
    ],
)
def test_a_checkpoint_of_any_moment_goes_on_exactly(
    tmp_path: Path,
    trainer_rows: Rows,
    parts: MakeParts,
    whole: Callable[[int], Student],
    hook: str,
    batch: int,
) -> None:
    """In the middle of a step, at its end, where an interval ends, and at the end of the run."""
    saving = Saves(tmp_path / "saved.ckpt", hook, batch)
    fit(tmp_path, parts(), saving, microbatches=3)
    student = fit(tmp_path, parts(), ckpt_path=saving.path, microbatches=3)
    done = int(torch.load(saving.path, weights_only=True)["global_step"])
    assert trainer_rows[done:] == student.rows(3, done)
    assert same_parameters(whole(3), student)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_a_run_goes_on_with_another_number_of_micro_batches(
    tmp_path: Path, trainer_rows: Rows, parts: MakeParts, before: int, after: int
) -> None:
    """The rows of a step are the same however they are dealt out."""
    saving = Saves(tmp_path / "saved.ckpt", "on_train_batch_end", 5 * before - 1)
    fit(tmp_path, parts(), saving, microbatches=before)
    student = fit(tmp_path, parts(), ckpt_path=saving.path, microbatches=after)
    assert trainer_rows[5:] == student.rows(after, 5)
