"""What the adapter for Lightning does, as plain hooks: its code exists twice, as `lightning.pytorch` and as
`pytorch_lightning`.

    batch start: is this the next step's? -> batch end: a step is done -> measure, new weights -> next batch

Lightning asks for the next batch after `on_train_batch_end`, as long as the loader has a length; without one
it reads a batch ahead (`loops/fetchers.py::_PrefetchDataFetcher`) and a change would come late. What is saved
is the state after the optimizer steps that the checkpoint holds, whatever was handed out since.
"""

from collections.abc import Iterator
from logging import getLogger
from typing import Any

from ddkmix.errors import ConfigError, RunError
from ddkmix.integrations.lightning_checks import check_loader, check_trainer
from ddkmix.integrations.lightning_progress import begin_at_a_step
from ddkmix.loader import DomainMixture
from ddkmix.reweighting import Reweighter
from ddkmix.step_loader import StepLoader

_KEY = "ddkmix"
"""Of our state in a checkpoint."""
_LOG = getLogger("ddkmix")


class TrainLoader(StepLoader):
    """A step loader whose state is in the checkpoint already: the callback saves that of the finished steps.

    Lightning would save the steps handed out; of a loader without these methods it warns at a resume.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class DataHooks:
    """The hooks of `MixtureDataModule`."""

    trainer: Any
    """Lightning's, which sets it."""

    def __init__(
        self, mixture: DomainMixture, *, microbatches: int | None = None, domain_ids: bool = False
    ) -> None:
        super().__init__()
        self.mixture: DomainMixture = mixture
        """The `DomainMixture`."""
        self._microbatches, self._domain_ids = microbatches, domain_ids

    def setup(self, stage: str) -> None:
        """Refuse a run whose state nobody would save.

        Raises:
            ConfigError: no `MixtureCallback` of the same mixture is there.
        """
        callbacks = [hooks for hooks in self.trainer.callbacks if isinstance(hooks, CallbackHooks)]
        if stage == "fit" and not any(hooks.mixture is self.mixture for hooks in callbacks):
            raise ConfigError(
                "MixtureDataModule without a MixtureCallback of the same mixture: no checkpoint would hold "
                "its state; add MixtureCallback(reweighter), or MixtureCallback(mixture), to "
                "Trainer(callbacks=[...])."
            )

    def train_dataloader(self) -> TrainLoader:
        """Micro-batches up to the trainer's `max_steps`, from wherever the mixture is."""
        return TrainLoader(
            self.mixture,
            steps=self.trainer.max_steps,
            microbatches=self._microbatches or self.trainer.accumulate_grad_batches,
            domain_ids=self._domain_ids,
        )


class CallbackHooks:
    """The hooks of `MixtureCallback`."""

    def __init__(
        self,
        mixture: Reweighter | DomainMixture,
        *,
        student: str | None = "model",
        allow_changes: bool = False,
    ) -> None:
        super().__init__()
        self._source = mixture
        self._reweighter = mixture if isinstance(mixture, Reweighter) else None
        found = mixture.mixture if isinstance(mixture, Reweighter) else mixture
        if not isinstance(found, DomainMixture):
            raise ConfigError(
                f"MixtureCallback of a {type(found).__name__}: a DataLoader reads ahead of its weights; "
                "give a DomainMixture, or a Reweighter of one."
            )
        self.mixture: DomainMixture = found
        """The `DomainMixture`."""
        self._student, self._allow_changes = student, allow_changes
        self._loaded: dict[str, Any] | None = None
        """The state of a checkpoint, until training starts."""
        self._done = self._epoch_from = 0

    # --- a run begins and ends --------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse settings under which steps would not be the mixture's, before anything is loaded."""
        if stage == "fit":
            check_trainer(trainer)
            if self._reweighter is not None:
                self._student_of(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on from the checkpoint, and measure if an interval begins here."""
        check_loader(trainer, pl_module, self._loader(trainer))
        self._go_on(trainer.global_step)
        self._step_is_done(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop the workers."""
        if stage == "fit":
            self.mixture.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the workers; a checkpoint can still be saved."""
        self.mixture.close()

    # --- steps ------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refuse to train on rows that are not those of the step to come.

        Raises:
            RunError: the mixture has handed out another number of steps.
        """
        handed, done = self.mixture.state.step, trainer.global_step
        if handed != done + 1:
            raise RunError(
                f"the mixture has handed out {handed} steps and the trainer has finished {done}; a batch of "
                f"step {done} must follow. Every {self._loader(trainer).microbatches} micro-batches must end "
                "in one optimizer step, none may be skipped, and nothing may read ahead of the trainer."
            )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and reweight where an interval ends; the next batch is asked for afterwards."""
        if trainer.global_step != self._done:
            self._step_is_done(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember where it begins."""
        self._epoch_from = self.mixture.state.step

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop where no domain may serve another row; Lightning would begin empty epochs for ever.

        Raises:
            RunError: Trainer(min_steps=...) or Trainer(min_epochs=...) do not let it stop.
        """
        if self.mixture.state.step != self._epoch_from:
            return
        message = f"no domain may serve another row after {self._epoch_from} steps (max_epochs)"
        if trainer.should_stop:
            raise RunError(f"{message}, and min_steps or min_epochs ask for more; raise it or lower these.")
        _LOG.warning("%s; training stops.", message)
        trainer.should_stop = True

    # --- checkpoints ------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the state after the optimizer steps that the checkpoint holds."""
        loader = self._loader(trainer, required=False)
        checkpoint[_KEY] = {
            "microbatches": loader.microbatches if loader else trainer.accumulate_grad_batches,
            "state": self._source.state_dict(trainer.global_step),
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state until training starts, and let Lightning's counters begin at a whole step.

        Raises:
            RunError: the checkpoint is of a run without this callback.
        """
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get(_KEY)
        if saved is None:
            raise RunError(
                "the checkpoint holds no state of a mixture: its run had no MixtureCallback. To start from "
                "its parameters only, load them with load_from_checkpoint and fit without ckpt_path."
            )
        self._loaded = saved["state"]
        was = saved["microbatches"]
        begin_at_a_step(
            checkpoint,
            was=was,
            now=trainer.accumulate_grad_batches if pl_module.automatic_optimization else was,
        )

    # --- parts ------------------------------------------------------------------------------------------

    def _go_on(self, done: int) -> None:
        """Take the mixture to where the trainer is."""
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            for change in self._source.load_state_dict(state, allow_changes=self._allow_changes):
                _LOG.warning("the mixture goes on although %s.", change)
        elif self.mixture.state.step == done + 1:  # a step that was interrupted is served again
            self._source.load_state_dict(self._source.state_dict(done))
        if self.mixture.state.step != done:
            raise RunError(
                f"the mixture has handed out {self.mixture.state.step} steps and the trainer has finished "
                f"{done}; begin with a new mixture, or pass the checkpoint's path as fit(ckpt_path=...)."
            )

    def _step_is_done(self, trainer: Any, pl_module: Any) -> None:
        self._done = trainer.global_step
        if self._reweighter is None:
            return
        model = self._student_of(trainer, pl_module)
        with trainer.precision_plugin.forward_context():  # as in the user's own validation_step
            losses = self._reweighter.step(model, self._done)
        if losses is not None:
            _record(trainer, self._reweighter.metrics(), self._done)

    def _student_of(self, trainer: Any, pl_module: Any) -> Any:
        if self._student is None:
            return trainer.model  # wrapped by the strategy, which FSDP and ZeRO need
        if not hasattr(pl_module, self._student):
            raise ConfigError(
                f"MixtureCallback(student={self._student!r}): {type(pl_module).__name__} has no such "
                "attribute; name its language model."
            )
        return getattr(pl_module, self._student)

    def _loader(self, trainer: Any, *, required: bool = True) -> Any:
        """The trainer's loader of this mixture."""
        for loader in _leaves(trainer.train_dataloader):
            if isinstance(loader, StepLoader) and loader.mixture is self.mixture:
                return loader
        if required:
            raise ConfigError(
                "the trainer's train_dataloader is none of this callback's mixture; fit(model, "
                "MixtureDataModule(mixture)), or return mixture.loader(...) from train_dataloader."
            )
        return None


def _leaves(loaders: Any) -> Iterator[Any]:
    """Loaders in dicts and lists, which Lightning takes too."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if not isinstance(loaders, list | tuple):
        yield loaders
        return
    for loader in loaders:
        yield from _leaves(loader)


def _record(trainer: Any, metrics: dict[str, float], step: int) -> None:
    """Log at once: `self.log` would drop what falls between two multiples of log_every_n_steps."""
    from torch import tensor

    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
    # for EarlyStopping and ModelCheckpoint(monitor=...), as Lightning's LearningRateMonitor does
    trainer.callback_metrics.update({name: tensor(value) for name, value in metrics.items()})
