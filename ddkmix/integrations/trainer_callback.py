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
    """An `EpochLoader` with what `MixtureCallback` needs: a Trainer hands it to every callback."""

    def __init__(
        self,
        mixture: DomainMixture,
        *,
        reweighter: Reweighter | None,
        log: Callable[[dict[str, float]], None],
        **options: Any,
    ) -> None:
        super().__init__(mixture, **options)
        self.reweighter, self.log = reweighter, log

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        if self.reweighter is None:
            return {"mixture": self.mixture.state_dict()}
        return self.reweighter.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self.reweighter is None:
            self.mixture.load_state_dict(state["mixture"])
        else:
            self.reweighter.load_state_dict(state)


class MixtureCallback(TrainerCallback, ExportableState):
    """Measures and sets weights between steps, and carries the mixture's state in the trainer's checkpoints.

    It knows its trainer only by the loader that it is handed, because a Trainer may make callbacks anew when
    it resumes (`restore_callback_states_from_checkpoint`).
    """

    def __init__(self) -> None:
        self._loader: MixtureLoader | None = None
        self.saved: dict[str, Any] | None = None
        """Set by a Trainer that restores callbacks; `on_train_begin` reads the same from its state."""

    def state(self) -> dict[str, Any]:
        """What a Trainer writes into `trainer_state.json`."""
        saved = None if self._loader is None else self._loader.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Go on from the checkpoint if there is one, and measure if an interval begins here.

        Raises:
            DataError: the checkpoint is of other data or settings.
            RunError: the checkpoint has no mixture state, or the mixture is elsewhere than the run.
        """
        if not isinstance(train_dataloader, MixtureLoader):
            raise RunError(
                f"the train dataloader is a {type(train_dataloader).__name__}: something has wrapped the "
                "mixture and may reshard it or read ahead. Do not pass it to accelerator.prepare."
            )
        self._loader = train_dataloader
        if state.global_step:
            train_dataloader.load_state_dict(_saved_state(state))
        self._check_step(state, "begin")
        _check_rows_left(train_dataloader, state.max_steps)
        self._follow(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure if an interval ends here; the weights are those of the very next step."""
        self._check_step(state, "end")
        assert self._loader is not None
        # a Trainer that resumes without skipping counts the epoch from its beginning
        state.epoch = state.global_step / self._loader.steps
        self._follow(state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop, with a checkpoint, where the mixture has no rows left; a Trainer would only warn and idle."""
        assert self._loader is not None
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
        assert self._loader is not None
        self._loader.mixture.close()

    def _follow(self, state: Any, model: Any) -> None:
        assert self._loader is not None
        reweighter = self._loader.reweighter
        if reweighter is not None and reweighter.step(model, state.global_step) is not None:
            self._loader.log(reweighter.metrics())

    def _check_step(self, state: Any, when: str) -> None:
        assert self._loader is not None
        taken = self._loader.mixture.state.step
        if taken != state.global_step:
            raise RunError(
                f"the mixture has handed out {taken} steps and the trainer is at the {when} of step "
                f"{state.global_step}: somebody else took rows from it, or train() was called twice. Make a new "
                "trainer (and mixture), or resume with train(resume_from_checkpoint=True)."
            )


def _saved_state(state: Any) -> dict[str, Any]:
    """The mixture's state in a checkpoint that a Trainer has loaded."""
    entry = (state.stateful_callbacks or {}).get(MixtureCallback.__name__, {})
    saved = entry.get("attributes", {}).get("saved") if isinstance(entry, Mapping) else None
    if saved is None:
        raise RunError(
            f"the checkpoint of step {state.global_step} has no mixture state in trainer_state.json; it was "
            "written without MixtureTrainer. Start a new run from its model, or resume another checkpoint."
        )
    return dict(saved)


def _check_rows_left(loader: EpochLoader, max_steps: int) -> None:
    """A run that cannot be finished must not begin."""
    caps, mixture = loader.mixture.settings.cap_rows, loader.mixture
    wanted = max_steps * mixture.settings.batch_rows
    most = sum(cap for cap in caps if cap is not None)
    if None not in caps and most < wanted:
        raise ConfigError(
            f"max_steps = {max_steps} of {mixture.settings.batch_rows} rows are {wanted} rows, and the domains "
            f"may serve {most} (max_epochs); set max_steps to at most {most // mixture.settings.batch_rows} or "
            "raise max_epochs."
        )
