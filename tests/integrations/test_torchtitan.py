"""Loops in the shape of torchtitan's and torchtune's, with torch's own distributed checkpoints."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.functional import cross_entropy

from ddkmix import DomainMixture, Reweighter
from ddkmix.errors import ConfigError, DataError
from ddkmix.integrations.torchtitan import TitanLoader, TuneLoader, next_tokens
from tests.integrations.conftest import BATCH_ROWS, STEPS, Parts, Rows, dealt, rows_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

Make = Callable[..., Parts]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
ONE = {"dp_rank": 0, "dp_degree": 1}


def titan(parts: Parts, **options: Any) -> TitanLoader:
    """The loader of a single process, with the policy in its state."""
    return TitanLoader(parts.mixture, **{**ONE, "reweighter": parts.reweighter, **options})


class Loop:
    """torchtitan's `Trainer`, with what has to do with data: `train`, `train_step`, `batch_generator`."""

    def __init__(self, parts: Parts, accumulate: int, *, steps: int = STEPS, **options: Any) -> None:
        self.parts, self.accumulate, self.steps, self.step = parts, accumulate, steps, 0
        self.loader = titan(parts, microbatches=accumulate, **options)
        self.found: Rows = []

    def state_dict(self) -> dict[str, Any]:
        """The step, as torchtitan's `train_state`."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that step."""
        self.step = state["step"]

    @property
    def states(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"dataloader": self.loader, "train_state": self, "model": self.parts.student}

    def train(self, checkpoint: Path | None = None, load: Path | None = None) -> Rows:
        """The rows of each step."""
        if load is not None:
            dcp.load(self.states, checkpoint_id=load)
        batches = self.batch_generator()
        self.parts.reweighter.step(self.parts.student, self.step)
        while self.step < self.steps:
            self.step += 1
            self.train_step(batches)
            self.parts.reweighter.step(self.parts.student, self.step)
            if checkpoint is not None:
                dcp.save(self.states, checkpoint_id=checkpoint / str(self.step))
        return self.found

    def batch_generator(self) -> Iterator[Batch]:
        """A generator between loader and loop."""
        yield from self.loader

    def train_step(self, batches: Iterator[Batch]) -> None:
        """All micro-batches first, then the loss by the tokens of all of them."""
        microbatches = [next(batches) for _ in range(self.accumulate)]
        tokens = sum(int((labels != -100).sum()) for _, labels in microbatches)
        for inputs, labels in microbatches:
            logits = self.parts.student(inputs["input"]).logits
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens
            loss.backward()
        self.parts.student.zero_grad()
        self.found.append(dealt([rows_of(inputs["input"]) for inputs, _ in microbatches]))


# --- the rows of our own trainer --------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_are_those_of_our_own_trainer(
    trainer_rows: Rows, parts: Make, workers: int, accumulate: int
) -> None:
    """Every step, with weights that move every other step; a change is whole at the next one."""
    assert trainer_rows == Loop(parts(num_workers=workers), accumulate).train()


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_distributed_checkpoint_goes_on_with_the_very_next_row(
    trainer_rows: Rows, parts: Make, tmp_path: Path, stop: int
) -> None:
    """Saved and loaded by torch.distributed.checkpoint, between and at intervals, with other workers and
    micro-batches."""
    first = Loop(parts(num_workers=2), 1, steps=stop)
    found = first.train(checkpoint=tmp_path)
    second = Loop(parts(), 3)
    assert trainer_rows == found + second.train(load=tmp_path / str(stop))


def test_without_a_reweighter_the_mixture_is_saved(parts: Make, tmp_path: Path) -> None:
    """Weights that the user sets are part of it."""
    first, second = parts(), parts()
    loader = titan(first, reweighter=None)
    batches = iter(loader)
    next(batches)
    first.mixture.set_weights({"code": 1.0, "math": 0.0, "prose": 3.0})
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path)
    other = titan(second, reweighter=None)
    dcp.load({"dataloader": other}, checkpoint_id=tmp_path)
    assert {"code": 0.25, "math": 0.0, "prose": 0.75} == second.mixture.weights
    expected, found = next(batches), next(iter(other))
    assert rows_of(expected[0]["input"]) == rows_of(found[0]["input"])


def test_a_state_saved_within_a_step_begins_that_step_again(parts: Make) -> None:
    """Its gradients are in no checkpoint, so its rows must come again."""
    made = parts()
    loader = titan(made, microbatches=3)
    batches = iter(loader)
    step = [rows_of(next(batches)[0]["input"]) for _ in range(3)]
    within = [next(batches), loader.state_dict()]
    again = parts()
    titan(again).load_state_dict(within[1])
    assert 1 == again.mixture.state.step
    assert step != rows_of(within[0][0]["input"])
    assert rows_of(within[0][0]["input"]) == rows_of(next(iter(titan(again, microbatches=3)))[0]["input"])


# --- ranks ------------------------------------------------------------------------------------------


def test_the_state_is_one_string_and_the_same_on_all_ranks(parts: Make) -> None:
    """And every dp_degree that divides the batch goes on with the rows of the next step."""
    loaders = []
    for rank in range(2):
        made = parts(rank=rank, world_size=2)
        loaders.append(titan(made, dp_rank=rank, dp_degree=2))
        made.reweighter.step(made.student, 0)
    steps = [[rows_of(inputs["input"]) for inputs, _ in (next(b), next(b))] for b in map(iter, loaders)]
    states = [loader.state_dict() for loader in loaders]
    assert states[0] == states[1]
    assert ["ddkmix"] == list(states[0])
    assert 2 == json.loads(states[0]["ddkmix"])["mixture"]["planner"]["step"]
    one, expected = parts(), parts()
    titan(one).load_state_dict(states[0])
    expected.reweighter.step(expected.student, 0)
    whole = [rows_of(next(expected.mixture)["input_ids"]) for _ in range(3)]
    assert sorted(whole[1]) == sorted(steps[0][1] + steps[1][1])
    assert whole[2] == rows_of(next(iter(titan(one)))[0]["input"])


def test_the_data_parallel_rank_must_be_the_mixtures(parts: Make) -> None:
    """Under tensor parallelism the global rank is another one, and nothing else would fail."""
    with pytest.raises(
        ConfigError, match=r"rank 0 of 1, .* dp_rank = 1, dp_degree = 2; give rank=1, world_size=2"
    ):
        titan(parts(), dp_rank=1, dp_degree=2)
    made = parts(rank=1, world_size=2)
    assert BATCH_ROWS // 2 == len(next(iter(titan(made, dp_rank=1, dp_degree=2)))[1])


# --- batches ----------------------------------------------------------------------------------------


def test_labels_are_shifted_once(parts: Make) -> None:
    """A loss that does not shift, of labels that are, is the loss that transformers computes."""
    made, same = parts(), parts()
    inputs, labels = next(iter(titan(made)))
    batch = next(iter(same.mixture.loader()))
    with torch.no_grad():
        expected = same.student(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        logits = made.student(inputs["input"]).logits
    assert ["input"] == list(inputs)
    assert torch.int64 == inputs["input"].dtype == labels.dtype
    assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
    torch.testing.assert_close(expected, cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_the_last_place_and_padding_predict_nothing() -> None:
    """Padding is -100 already, and moves with the rest."""
    labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
    assert [[6, 7, -100], [6, -100, -100]] == next_tokens(labels).tolist()
    assert [[5, 6, 7], [5, 6, -100]] == labels.tolist()


def test_positions_come_with_document_boundaries(parts: Make) -> None:
    """Under the name that each framework has for them."""
    inputs, _ = next(iter(titan(parts(document_boundaries=True))))
    made = parts(document_boundaries=True)
    batch = next(iter(TuneLoader(made.mixture, **ONE)))
    assert ["input", "positions"] == list(inputs)
    assert ["input_pos", "labels", "tokens"] == sorted(batch)
    assert torch.equal(inputs["positions"], batch["input_pos"])


def test_torchtune_shifts_labels_itself(parts: Make) -> None:
    """Its recipes do it; what its model is called with has no other key."""
    made, same = parts(), parts()
    batch = next(iter(TuneLoader(made.mixture, **ONE)))
    assert ["labels", "tokens"] == sorted(batch)
    labels = batch.pop("labels")
    shifted = torch.hstack((labels[..., 1:], torch.full((BATCH_ROWS, 1), -100)))  # as in the recipe
    expected = next(iter(same.mixture.loader()))
    with torch.no_grad():
        loss = same.student(input_ids=expected["input_ids"], labels=expected["labels"]).loss
        logits = made.student(batch["tokens"]).logits
    torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), shifted.flatten()))


def test_torchtune_counts_steps_by_the_length(trainer_rows: Rows, parts: Make) -> None:
    """`len(dataloader) // gradient_accumulation_steps` are the steps of the run."""
    made = parts()
    loader = TuneLoader(made.mixture, **ONE, steps=STEPS, microbatches=3)
    assert STEPS * 3 == len(loader)
    made.reweighter.step(made.student, 0)
    assert trainer_rows[0] == dealt(
        [rows_of(batch["tokens"]) for _, batch in zip(range(3), loader, strict=False)]
    )
    with pytest.raises(TypeError, match="no length"):
        len(titan(made))


def test_datasets_of_ones_own_need_ids_and_labels() -> None:
    """Other keys are an error that names them; with both they are handed on."""
    items = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(8)]
    mixture = DomainMixture.from_datasets({"a": items}, batch_rows=2)
    inputs, labels = next(iter(TitanLoader(mixture, **ONE)))
    assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
    wrong: Any = [{"text": torch.arange(4) + i} for i in range(8)]
    for loader in (TitanLoader, TuneLoader):
        mixture = DomainMixture.from_datasets({"a": wrong}, batch_rows=2)
        with pytest.raises(ConfigError, match=rf"{loader.__name__} needs .* and got \['text'\]"):
            next(iter(loader(mixture, **ONE)))


# --- states -----------------------------------------------------------------------------------------


def test_the_loader_is_stateful_to_torch(parts: Make) -> None:
    """So checkpoints ask it for its state, and give it back."""
    assert isinstance(titan(parts()), Stateful)


def test_the_state_of_another_loader_is_refused(parts: Make) -> None:
    """torchtitan's own has one for each rank."""
    with pytest.raises(DataError, match=r"keys \['dp_rank_0', 'world_size'\] and not 'ddkmix'"):
        titan(parts()).load_state_dict({"dp_rank_0": b"", "world_size": 1})


def test_policy_and_loader_must_be_of_one_mixture(parts: Make) -> None:
    """Else the weights would change where nobody reads."""
    other = Reweighter(parts().mixture, None)
    with pytest.raises(ConfigError, match="give both one"):
        titan(parts(), reweighter=other)


@pytest.mark.parametrize("with_policy", [False, True])
def test_other_data_are_refused_or_allowed(
    parts: Make, with_policy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A state of another cap: an error that says so, or a warning if changes are allowed."""
    first, second = parts(), parts(max_epochs=50.0)
    state = titan(first, **({} if with_policy else {"reweighter": None})).state_dict()
    options: dict[str, Any] = {} if with_policy else {"reweighter": None}
    with pytest.raises(DataError, match="cap_rows was"):
        titan(second, **options).load_state_dict(state)
    assert "" == caplog.text
    titan(second, **options, allow_changes=True).load_state_dict(state)
    assert "the mixture goes on although cap_rows was" in caplog.text
