"""The Trainer of transformers over a mixture: rows of every step, changes of weights, resume, mistakes."""

import inspect
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from ddkmix.errors import ConfigError, DataError, RunError
from ddkmix.integrations.trainer_callback import MixtureLoader
from ddkmix.integrations.trainer_data import EpochLoader
from ddkmix.integrations.transformers import MixtureMixin, MixtureTrainer, mixture_trainer
from tests.integrations.conftest import Parts, Rows, dealt, rows_of
from tests.integrations.policies import Rotating
from tests.integrations.trainers import (
    BATCH_ROWS,
    FIRST,
    INTERVAL,
    ROWS,
    Constant,
    Recorder,
    arguments,
    items,
    own,
    packed,
    steps_of,
    student,
    trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SAVING = {"save_strategy": "steps", "save_steps": 3}
STEPS_OF_A_PASS = math.ceil(sum(ROWS.values()) / BATCH_ROWS)  # 9


def domains_of(parts: list[list[int]]) -> dict[str, int]:
    """Rows of each domain in a step."""
    names = sorted(FIRST, key=lambda name: -FIRST[name])
    return dict(Counter(next(n for n in names if FIRST[n] <= row) for part in parts for row in part))


def resumed(folder: Path, step: int, **changes: Any) -> Recorder:
    """A new trainer that goes on from a checkpoint."""
    run: Recorder = trainer(folder, max_steps=11, **SAVING, **changes)
    run.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}"))
    return run


# --- which rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_rows_of_every_step_are_those_of_our_own_trainer(
    trainer_rows: Rows, parts: Callable[..., Parts], tmp_path: Path, accumulation: int, workers: int
) -> None:
    """Packed rows, a real evaluator, weights that move every other step: every token of every row."""
    made = parts(num_workers=workers)
    run = Whole(
        made.student,
        TrainingArguments(**arguments(tmp_path, accumulation=accumulation, max_steps=len(trainer_rows))),
        train_dataset=made.mixture,
        evaluator=made.evaluator,
        policy=Rotating(),
        interval_steps=INTERVAL,
    )
    run.train()
    assert trainer_rows == [dealt(step) for step in run.whole.values()]


class Whole(MixtureTrainer):
    """Notes whole rows."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One micro-batch."""
        self.__dict__.setdefault("whole", {}).setdefault(self.state.global_step, [])
        self.whole[self.state.global_step].append(rows_of(inputs["input_ids"]))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 2), (3, 0), (3, 2)])
def test_the_rows_of_own_datasets_are_those_of_the_mixture(
    tmp_path: Path, accumulation: int, workers: int
) -> None:
    """Micro-batch p of a step holds every third row from p on, whatever the workers."""
    run = trainer(tmp_path, items(), accumulation=accumulation, dataloader_num_workers=workers)
    run.train()
    assert list(steps_of(own(), 8, accumulation)) == list(run.rows.values())


def test_a_change_after_a_step_is_whole_at_the_next(tmp_path: Path) -> None:
    """Weights of a callback at the end of step 3: steps 1 to 3 hold thirds, all of step 4 is one domain."""

    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                run.mixture.set_weights({"code": 0.0, "math": 1.0, "prose": 0.0})

    run = trainer(
        tmp_path,
        accumulation=3,
        dataloader_num_workers=2,
        max_steps=5,
        evaluator=None,
        callbacks=[Change()],
        mixture_options={"weights": dict.fromkeys(ROWS, 1.0)},
    )
    run.train()
    thirds = {"code": 4, "math": 4, "prose": 4}
    assert [thirds] * 3 + [{"math": 12}] * 2 == [domains_of(step) for step in run.rows.values()]


def test_own_losses_move_the_weights(tmp_path: Path) -> None:
    """Without an evaluator, `reweighter.update` between steps does what a measurement would."""

    class Update(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                run.reweighter.update(Constant().measure(run.model))

    weights = {"code": 0.0, "math": 1.0, "prose": 0.0}
    run = trainer(
        tmp_path, max_steps=2, evaluator=None, callbacks=[Update()], mixture_options={"weights": weights}
    )
    run.train()
    assert {"math": 12} == domains_of(run.rows[0])
    assert {"code": 11, "math": 1} == domains_of(run.rows[1])  # 10.8, 0.6 and 0.6 rows are due


def test_the_seed_and_its_own_options_shape_the_mixture(tmp_path: Path) -> None:
    """data_seed orders the rows, else seed; options go to the mixture as they are."""
    first = trainer(tmp_path, seed=1, mixture_options={"max_epochs": 3.0}).mixture
    second = trainer(tmp_path, seed=5, data_seed=1, mixture_options={"max_epochs": 3.0}).mixture
    third = trainer(tmp_path, seed=1).mixture
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert (90, 150, 51) == first.settings.cap_rows


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_are_divided_by_the_tokens_of_the_whole_step(tmp_path: Path, accumulation: int) -> None:
    """12 rows of 8 tokens predict 84, in every micro-batch of every step."""
    run = trainer(tmp_path, accumulation=accumulation, max_steps=2)
    run.train()
    assert {0: [84] * accumulation, 1: [84] * accumulation} == run.num_items


def test_columns_that_the_model_does_not_take_are_not_read(tmp_path: Path) -> None:
    """As in a Trainer without a mixture: a column of text does not reach the collator."""
    data = {
        name: Dataset.from_list([{**row, "text": "as it was"} for row in rows])
        for name, rows in items().items()
    }
    run = trainer(tmp_path, data, max_steps=1)
    run.train()
    (parts,) = steps_of(own(), 1, 1)
    assert [parts] == list(run.rows.values())
    kept = trainer(tmp_path, data, remove_unused_columns=False)
    assert "as it was" == kept.mixture.stream.rows[0].dataset[0]["text"]
    assert "text" not in run.mixture.stream.rows[0].dataset[0]


# --- passes, length, end ----------------------------------------------------------------------------


def test_without_max_steps_a_run_has_as_many_passes_as_epochs(tmp_path: Path) -> None:
    """97 rows are 9 steps of 12; two epochs are 18 steps, with an evaluation and a record at each end."""
    run = trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        eval_strategy="epoch",
        logging_strategy="epoch",
        eval_dataset=items()["code"][:3],
        accumulation=3,
    )
    run.train()
    assert 18 == run.state.global_step == len(run.rows)
    evaluated = [(r["step"], r["epoch"]) for r in run.state.log_history if "eval_loss" in r]
    assert [(9, 1.0), (18, 2.0)] == evaluated
    assert list(steps_of(own(), 18, 3)) == list(run.rows.values())


def test_a_run_that_would_use_up_its_domains_does_not_begin(tmp_path: Path) -> None:
    """One pass allowed: 97 rows are 8 whole steps."""
    run = trainer(tmp_path, max_steps=9, mixture_options={"max_epochs": 1.0})
    message = "9 steps of 12 rows want 108 rows, and the domains may serve 97 .* at most 8"
    with pytest.raises(ConfigError, match=message):
        run.train()
    trainer(tmp_path, max_steps=8, mixture_options={"max_epochs": 1.0}).train()


def test_a_mixture_that_ends_early_ends_the_run_with_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prose is at its limit after four steps, and `on_cap` is "stop"."""
    options = {"max_epochs": 1.0, "on_cap": "stop", "weights": dict.fromkeys(ROWS, 1.0)}
    run = trainer(tmp_path, evaluator=None, mixture_options=options, **SAVING)
    run.train()
    assert 4 == run.state.global_step
    assert "no more rows after step 4 of 8" in caplog.text
    assert (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").exists()


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (3, {}),
        (6, {"dataloader_num_workers": 2}),
        (9, {}),
        (6, {"accumulation": 3}),
        (3, {"restore_callback_states_from_checkpoint": True}),
    ],
    ids=["same", "workers", "pass", "accumulation", "callbacks"],
)
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(
    saved_run: tuple[Path, Recorder], tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    """Rows, weights, records and, where the sums are the same, every bit of the parameters; at a step where
    an interval ends (6) the checkpoint holds the weights measured there, and nothing is measured twice.
    Step 9 ends a pass over the rows."""
    folder, whole = saved_run
    shutil.copytree(folder / "run", tmp_path / "run")
    run = resumed(tmp_path, step, **changes)
    expected = {s: dealt(found) for s, found in whole.rows.items() if s >= step}
    parts = changes.get("accumulation", 1)
    assert expected == {s: dealt(found) for s, found in run.rows.items()}
    assert {parts} == {len(found) for found in run.rows.values()}
    epochs = [(r["step"], r["epoch"]) for r in whole.state.log_history]
    assert epochs == [(r["step"], r["epoch"]) for r in run.state.log_history]
    if parts == 1:
        for before, after in zip(whole.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(before, after)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run of 11 steps, into the second pass, with checkpoints after 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("saved")
    run = trainer(folder, max_steps=11, **SAVING)
    run.train()
    return folder, run


def test_a_resumed_pass_ends_where_it_would_have_ended(
    saved_run: tuple[Path, Recorder], tmp_path: Path
) -> None:
    """What happens at the end of an epoch happens after step 9, also when the pass began at step 3."""
    shutil.copytree(saved_run[0] / "run", tmp_path / "run")
    run = resumed(tmp_path, 3, eval_strategy="epoch", eval_dataset=items()["code"][:3])
    assert [9, 11] == [r["step"] for r in run.state.log_history if "eval_loss" in r]


def test_what_a_checkpoint_holds(saved_run: tuple[Path, Recorder]) -> None:
    """A few hundred bytes of JSON in trainer_state.json: the state after exactly the steps trained."""
    folder, _ = saved_run
    state = json.loads((folder / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["MixtureCallback"]["attributes"]["saved"]
    assert 6 == saved["mixture"]["planner"]["step"] == saved["measured_at"]
    assert 72 == sum(saved["mixture"]["planner"]["served"])
    assert len(json.dumps(saved)) < 1500


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    """Its rows are unknown, so nothing can go on from it."""
    plain = Trainer(
        student(),
        TrainingArguments(**arguments(tmp_path, max_steps=3, **SAVING)),
        train_dataset=items()["code"],
    )
    plain.train()
    with pytest.raises(RunError, match="checkpoint of step 3 has no mixture state"):
        resumed(tmp_path, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 6}, "batch_rows was 12 and is 6"),
        ({"seed": 1}, "seed = 42 and this mixture 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    saved_run: tuple[Path, Recorder], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The stream would be another one."""
    shutil.copytree(saved_run[0] / "run", tmp_path / "run")
    with pytest.raises(DataError, match=message):
        resumed(tmp_path, 3, **changes)


def test_changes_are_allowed_on_request_and_logged(
    saved_run: tuple[Path, Recorder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on at its step with what it is given now."""
    shutil.copytree(saved_run[0] / "run", tmp_path / "run")
    run = resumed(tmp_path, 3, per_device_train_batch_size=6, allow_changes=True)
    assert "resumed at step 3: batch_rows was 12 and is 6" in caplog.text
    assert list(range(3, 11)) == sorted(run.rows)
    assert 3 * 12 + 8 * 6 == sum(run.mixture.served.values())


def test_resume_finds_the_last_checkpoint_by_itself(saved_run: tuple[Path, Recorder], tmp_path: Path) -> None:
    """`train(resume_from_checkpoint=True)`, as everybody writes it."""
    folder, whole = saved_run
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-11")
    run = trainer(tmp_path, max_steps=11, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert {s: parts for s, parts in whole.rows.items() if s >= 9} == run.rows


# --- everything else of a Trainer stays -------------------------------------------------------------


def test_evaluation_records_and_the_best_model_are_as_before(tmp_path: Path) -> None:
    """`evaluate` has its own loader; the record of a step where weights move is not lost; the best model is
    loaded at the end."""
    run = trainer(
        tmp_path,
        max_steps=6,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        eval_dataset=items()["math"][:5],
        per_device_eval_batch_size=2,
    )
    run.train()
    history = run.state.log_history
    assert [2, 4, 6] == [r["step"] for r in history if "loss" in r]
    assert [2, 4, 6] == [r["step"] for r in history if "eval_loss" in r]
    assert [0, 2, 4, 6] == [r["step"] for r in history if "mixture/weight/code" in r]
    best = min(r["eval_loss"] for r in history if "eval_loss" in r)
    assert best == pytest.approx(run.evaluate()["eval_loss"], rel=1e-6)
    (record,) = [r for r in history if r["step"] == 4 and "mixture/weight/code" in r]
    weights = [record[f"mixture/weight/{name}"] for name in ("code", "math", "prose")]
    assert [0.05, 0.05, 0.9] == pytest.approx(weights, abs=1e-6)  # the third domain's turn
    assert 1.0 == record["loss_gap/code"]


def test_a_trainer_that_only_evaluates_needs_no_mixture(tmp_path: Path) -> None:
    """And says what Trainer says when it is asked to train."""
    run = MixtureTrainer(
        student(), TrainingArguments(**arguments(tmp_path)), eval_dataset=items()["code"][:3]
    )
    assert 0 < run.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        run.train()


def test_reader_processes_end_with_the_run(tmp_path: Path) -> None:
    """None is left behind."""
    import multiprocessing

    run = trainer(tmp_path, dataloader_num_workers=2, max_steps=2)
    run.train()
    assert [] == [p for p in multiprocessing.active_children() if p.is_alive()]


# --- traps ------------------------------------------------------------------------------------------


def test_accelerate_leaves_the_loader_alone(tmp_path: Path) -> None:
    """Its own loaders are resharded and read one batch ahead; ours is handed back as it is."""
    run = trainer(tmp_path)
    loader = run.get_train_dataloader()
    assert loader is run.accelerator.prepare(loader)
    assert 97 == run.num_examples(loader) and STEPS_OF_A_PASS == len(loader)


def test_a_wrapped_loader_is_refused(tmp_path: Path) -> None:
    """Whatever it is: it may reshard the rows or read ahead."""

    class Wrapping(Recorder):
        def get_train_dataloader(self) -> Any:
            return list(super().get_train_dataloader())

    with pytest.raises(RunError, match="the train dataloader is a list: something has wrapped the mixture"):
        trainer(tmp_path, cls=Wrapping).train()


@pytest.mark.parametrize("sabotage", ["ahead", "behind"])
def test_a_loader_out_of_step_is_noticed_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sabotage: str
) -> None:
    """One batch ahead of the loop, as Accelerate's loaders are, or rows that are not the mixture's."""
    original = EpochLoader.__iter__

    def ahead(self: Any) -> Iterator[Any]:
        batches = original(self)
        held = next(batches)
        for batch in batches:
            yield held
            held = batch

    def behind(self: Any) -> Iterator[Any]:
        yield from [next(original(self))] * 8

    monkeypatch.setattr(
        MixtureLoader, "__iter__", {"ahead": ahead, "behind": behind}[sabotage], raising=False
    )
    run = trainer(tmp_path, interval_steps=1000, evaluator=None if sabotage == "behind" else Constant())
    with pytest.raises(RunError, match=r"the loop has finished [12] optimizer steps and the mixture"):
        run.train()
    assert run.state.global_step <= 2


def test_a_mixture_that_somebody_else_advanced_is_refused(tmp_path: Path) -> None:
    """Its rows are gone, and steps would not be those of the run."""
    mixture = packed(tmp_path)
    next(mixture)
    with pytest.raises(RunError, match="has handed out 1 steps and the trainer begins at step 0"):
        trainer(tmp_path, mixture).train()


def test_training_twice_is_refused(tmp_path: Path) -> None:
    """A Trainer would begin again at step 0 with rows of the middle of the run."""
    run = trainer(tmp_path, max_steps=2)
    run.train()
    with pytest.raises(RunError, match="train\\(\\) was called before"):
        run.train()


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy.*group_by_length.*defaults",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size.*defaults"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches.*defaults"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches.*defaults"),
    ],
)
def test_arguments_that_choose_rows_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """One line, before anything is trained."""
    with pytest.raises(ConfigError, match=message) as error:
        trainer(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_mixture_of_another_batch_size_is_refused(tmp_path: Path) -> None:
    """Also when the arguments change later."""
    message = r"the mixture has batch_rows = 12, and the arguments ask for 8 = 4 \(per device\) x 2"
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, packed(tmp_path), accumulation=2, per_device_train_batch_size=4)
    run = trainer(tmp_path)
    run.args.gradient_accumulation_steps = 2
    with pytest.raises(ConfigError, match="arguments ask for 24 = 12"):
        run.train()


def test_a_mixture_of_another_rank_is_refused(tmp_path: Path) -> None:
    """Half of its rows would be read by nobody."""
    with pytest.raises(ConfigError, match=r"= \(0, 2\) and the Trainer is \(0, 1\); leave rank"):
        trainer(tmp_path, packed(tmp_path, rank=0, world_size=2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "train_dataset is a list; it must be a dict of datasets"),
        ({}, "train_dataset = {}; give one"),
        ({"code": iter([])}, r"train_dataset\['code'\] is a list_iterator; it must be map-style"),
        ({"code": []}, "code"),
    ],
)
def test_other_data_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    """What it is, and what it should be."""
    with pytest.raises((ConfigError, DataError), match=message):
        trainer(tmp_path, data)


def test_options_of_a_ready_mixture_are_its_own(tmp_path: Path) -> None:
    """They would have no effect."""
    with pytest.raises(ConfigError, match="with a ready DomainMixture; give them to the mixture"):
        trainer(tmp_path, packed(tmp_path), mixture_options={"max_epochs": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluator": Constant(("code", "art"))}, "the evaluator measures .* of these domains"),
        ({"policy": "dkd"}, "did you mean 'ddk'"),
        ({"mixture_options": {"weigths": {}}}, "no 'weigths'; did you mean 'weights'"),
    ],
)
def test_mistakes_are_found_before_the_trainer_prepares_its_rows(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """A trainer of TRL may tokenise for hours: nothing of it has been asked for."""

    class Prepares(Trainer):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("too late")

    with pytest.raises(ConfigError, match=message) as error:
        trainer(tmp_path, cls=mixture_trainer(Prepares), **options)
    assert "\n" not in str(error.value)


def test_weights_that_will_never_move_are_said_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An interval as long as the run is seldom meant."""
    trainer(tmp_path, max_steps=2, interval_steps=2).train()
    assert "interval_steps = 2 and the run has 2 steps: the weights are set once" in caplog.text
    caplog.clear()
    trainer(tmp_path, max_steps=2, interval_steps=1).train()
    assert "interval_steps" not in caplog.text


def test_rows_are_not_to_be_had_from_the_stand_in(tmp_path: Path) -> None:
    """Code that asks the trainer for its dataset gets a length, and one line when it wants a row."""
    run = trainer(tmp_path)
    assert 97 == len(run.train_dataset)
    with pytest.raises(ConfigError, match="a mixture serves its rows itself"):
        run.train_dataset[0]


# --- any Trainer ------------------------------------------------------------------------------------


def test_classes_of_any_trainer(tmp_path: Path) -> None:
    """The factory gives one class for each; subclasses of a Trainer, ours or transformers', are Trainers."""
    assert mixture_trainer(Trainer) is mixture_trainer(Trainer)
    assert "MixtureSeq2SeqTrainer" == mixture_trainer(Seq2SeqTrainer).__name__

    class Mine(Trainer):
        pass

    run = mixture_trainer(Mine)(
        student(), TrainingArguments(**arguments(tmp_path, max_steps=2)), train_dataset=items()
    )
    run.train()
    assert 24 == sum(run.mixture.served.values())


def test_trainers_that_make_batches_in_their_own_way_are_refused() -> None:
    """A mixture would replace them without a word."""

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    with pytest.raises(ConfigError, match="get_train_dataloader chooses batches in its own way"):
        mixture_trainer(Own)

    class Nothing(MixtureMixin):
        pass

    with pytest.raises(ConfigError, match="mixture_trainer of a int object; give its class"):
        inspect.unwrap(mixture_trainer)(3)  # users do not have the type checker of the tests
    with pytest.raises(ConfigError, match="object is no Trainer"):
        Nothing()
