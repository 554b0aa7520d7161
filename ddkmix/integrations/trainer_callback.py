"""What a Trainer calls between steps: measure, set weights, carry the mixture's state in its checkpoints."""

from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ddkmix.errors import ConfigError, RunError
from ddkmix.integrations.trainer_data import EpochLoader
from ddkmix.loader import DomainMixture
from ddkmix.reweighting import Reweighter

_LOG = getLogger("ddkmix")


class MixtureLoader(EpochLoader):
    """An `EpochLoader` with what `MixtureCallback` needs: a Trainer hands it to every callback.

    Args:
        mixture: what serves the rows.
        reweighter: of this mixture.
        measures: whether it has an evaluator.
        log: writes one record of metrics.
        allow_changes: resume although something has changed.
        options: other arguments of `EpochLoader`.
    """

    def __init__(
        self,
        mixture: DomainMixture,
        *,
        reweighter: Reweighter,
        measures: bool,
        log: Callable[[dict[str, float]], None],
        allow_changes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(mixture, **options)
        self.reweighter, self._measures, self._log = reweighter, measures, log
        self._allow_changes = allow_changes

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DataError: it is of other data or settings, and changes are not allowed.
        """
        for change in self.reweighter.load_state_dict(saved, allow_changes=self._allow_changes):
            _LOG.warning("resumed at step %d: %s", self.mixture.state.step, change)

    def check_interval(self, max_steps: int) -> None:
        """Say when the weights will never move."""
        if self._measures and self.reweighter.interval_steps >= max_steps:
            _LOG.warning(
                "interval_steps = %d and the run has %d steps: the weights are set once, before the first.",
                self.reweighter.interval_steps,
                max_steps,
            )

    def follow(self, model: Any, done: int) -> None:
        """After `done` optimizer steps: measure and set weights if an interval ends here.

        Raises:
            RunError: the mixture is elsewhere than the run.
        """
        if not self._measures:
            self.reweighter.check_step(done)
        elif self.reweighter.step(model, done) is not None:
            self._log(self.reweighter.metrics())


class MixtureCallback(TrainerCallback, ExportableState):
    """Measures and sets weights between steps, and carries the mixture's state in the trainer's checkpoints.

    It knows its trainer only by the loader that it is handed, because a Trainer may make callbacks anew when
    it resumes (`restore_callback_states_from_checkpoint`).
    """

    _loader: MixtureLoader
    saved: dict[str, Any] | None = None
    """Set by a Trainer that restores callbacks; `on_train_begin` reads the same from the trainer's state."""

    def state(self) -> dict[str, Any]:
        """What a Trainer writes into `trainer_state.json`; of rank 0, and the same on all."""
        saved = self._loader.reweighter.state_dict() if hasattr(self, "_loader") else None
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Go on from the checkpoint if there is one, and measure if an interval begins here.

        Raises:
            ConfigError: the domains may not serve as many rows as the run wants.
            DataError: the checkpoint is of other data or settings.
            RunError: the checkpoint has no mixture state, or the mixture is elsewhere than the run.
        """
        if not isinstance(train_dataloader, MixtureLoader):
            raise RunError(
                f"the train dataloader is a {type(train_dataloader).__name__}: something has wrapped the "
                "mixture and may reshard it or read ahead of the loop. Keep what get_train_dataloader gives."
            )
        self._loader = train_dataloader
        if state.global_step:
            self._loader.resume(_saved_state(state))
        _check_beginning(self._loader.mixture, state)
        self._loader.check_interval(state.max_steps)
        self._loader.follow(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure if an interval ends here; the weights are those of the very next step."""
        # a Trainer that resumes without skipping counts the epoch from its beginning
        state.epoch = state.global_step / self._loader.steps
        self._loader.follow(model, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, with a checkpoint, where the mixture has no rows left; a Trainer would idle to the end."""
        if self._loader.ended and state.global_step < state.max_steps:
            _LOG.warning(
                "the mixture has no more rows after step %d of %d (max_epochs, on_cap); training ends here.",
                state.global_step,
                state.max_steps,
            )
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the reader processes go."""
        self._loader.mixture.close()


def _saved_state(state: Any) -> dict[str, Any]:
    """The mixture's state in a checkpoint that a Trainer has loaded."""
    entry = state.stateful_callbacks.get(MixtureCallback.__name__, {})
    saved = entry.get("attributes", {}).get("saved") if isinstance(entry, Mapping) else None
    if saved is None:
        raise RunError(
            f"the checkpoint of step {state.global_step} has no mixture state in trainer_state.json: it was "
            "written without MixtureTrainer. Start a new run from its model, or resume another checkpoint."
        )
    return dict(saved)


def _check_beginning(mixture: DomainMixture, state: Any) -> None:
    """A run that begins wrong, or cannot be finished, must not begin."""
    if mixture.state.step != state.global_step:
        raise RunError(
            f"the mixture has handed out {mixture.state.step} steps and the trainer begins at step "
            f"{state.global_step}: somebody else took rows from it, or train() was called before. Make a new "
            "mixture and trainer; train(resume_from_checkpoint=True) then goes on where a run has stopped."
        )
    caps, batch_rows = mixture.settings.cap_rows, mixture.settings.batch_rows
    most = sum(cap for cap in caps if cap is not None)
    if None not in caps and most < state.max_steps * batch_rows:
        raise ConfigError(
            f"{state.max_steps} steps of {batch_rows} rows want {state.max_steps * batch_rows} rows, and the "
            f"domains may serve {most} (max_epochs); set max_steps to at most {most // batch_rows}, or raise "
            "max_epochs."
        )
