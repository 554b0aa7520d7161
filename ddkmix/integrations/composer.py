"""MosaicML Composer: a loader whose state Composer saves, and a callback that reweights between batches.

    loader = MixtureLoader(mixture)
    trainer = Trainer(..., train_dataloader=loader, callbacks=[MixtureCallback(reweighter)])

A batch of Composer is what one optimizer step takes on one rank. Composer itself cuts it into micro-batches
(`device_train_microbatch_size`), so a step's rows are the same however it is cut; it reads no batch ahead.
Checkpoints hold the mixture and the policy, so `load_path` and `autoresume` go on with the very next row.

Read in Composer 0.32.1, and what follows from it:

- `State._dataset_of` asks only a torch `DataLoader` for its dataset's state, so the loader inherits from it.
- `Trainer._train_loop` drops as many batches as the epoch has had, unless the dataset was resumed. A second
  `fit` would lose those rows, so the callback says that the data resume themselves.
- Sharded checkpoints load what a fresh run's state has, key by key, so a state is one string.
- Where a dataset has a state, random numbers are restored at an epoch's end and not within it. Rows do not
  depend on them; dropout after a resume does, with this loader as with MosaicML's own.

Composer 0.32.1 asks for torch below 2.7.1 and ddkmix for 2.8, so no extra can install both: install
`mosaicml` with `--no-deps`. The tests run its Trainer on torch 2.13, in one process and without a GPU.
"""

import json
from collections.abc import Iterator, Mapping
from logging import getLogger
from typing import Any

from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ddkmix.errors import ConfigError, DataError, MixtureExhausted
from ddkmix.loader import DomainMixture
from ddkmix.reweighting import Reweighter

__all__ = ["MixtureCallback", "MixtureLoader"]

_LOG = getLogger("ddkmix")
_STATE = "ddkmix"
"""The one key of a saved state."""


class MixtureLoader(DataLoader[Any]):
    """The batches of a mixture, one for each optimizer step, for `Trainer(train_dataloader=...)`.

    Batches are the mixture's own; wrap the loader in a `composer.core.DataSpec` where they are not dicts of
    tensors. Reader processes are the mixture's own too (its `num_workers`).

    Args:
        mixture: its rows on this rank are the loader's `batch_size`.
        epoch_steps: optimizer steps in an epoch of Composer. With None an epoch has no end, and
            `max_duration` must be in batches ("300ba"). It stands for `train_subset_num_batches`, which
            would count the batches of an epoch anew after a resume.
        allow_changes: go on from a checkpoint although domains, data or settings have changed; what has
            changed is logged.

    Raises:
        ConfigError: `epoch_steps` is below 1, or a batch cannot be dealt to so many ranks.
    """

    def __init__(
        self, mixture: DomainMixture, *, epoch_steps: int | None = None, allow_changes: bool = False
    ) -> None:
        if epoch_steps is not None and epoch_steps < 1:
            raise ConfigError(f"epoch_steps = {epoch_steps}; it must be at least 1, or None for no end.")
        self._of_mixture = _MixtureDataset(mixture, epoch_steps, allow_changes)
        super().__init__(self._of_mixture, batch_size=mixture.settings.batch_rows // mixture.ranks[1])
        self.mixture: DomainMixture = mixture
        """The `DomainMixture`."""
        self.epoch_steps: int | None = epoch_steps
        """Optimizer steps in an epoch of Composer."""

    @property
    def used_up(self) -> bool:
        """Whether an iteration has come to where no domain may serve another row."""
        return self._of_mixture.used_up

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # the workers are the mixture's
        """The batches from where the mixture is to the next end of an epoch.

        Raises:
            MixtureExhausted: there is none, and the iteration before had said so by ending early.
        """
        return iter(self._of_mixture)

    def __len__(self) -> int:
        """Batches in an epoch.

        Raises:
            TypeError: `epoch_steps` was not given; Composer takes it that there is no end.
        """
        if self.epoch_steps is None:
            raise TypeError("this loader has no length; give epoch_steps to MixtureLoader.")
        return self.epoch_steps


class _MixtureDataset(IterableDataset[Any]):
    """What Composer takes the state of."""

    def __init__(self, mixture: DomainMixture, epoch_steps: int | None, allow_changes: bool) -> None:
        self._mixture, self._epoch_steps, self._allow_changes = mixture, epoch_steps, allow_changes
        self.used_up = False

    def __iter__(self) -> Iterator[Any]:
        for batch in self._mixture.loader():
            yield batch
            if self._epoch_steps and self._mixture.state.step % self._epoch_steps == 0:
                return
        if self.used_up:  # Composer would begin one empty epoch after the other, for ever
            raise MixtureExhausted(
                f"no domain may serve another row after step {self._mixture.state.step}; raise max_epochs, "
                "or give the Trainer a max_duration that the domains last for."
            )
        self.used_up = True

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, str]:
        """The mixture's state. The mixture knows where it is; Composer's count of samples is not needed."""
        del num_samples, from_beginning
        return {_STATE: json.dumps(self._mixture.state_dict())}

    def load_state_dict(self, state: Mapping[str, str] | None) -> None:
        """Go on from a saved state; None says that the checkpoint's loader had none."""
        for change in self._mixture.load_state_dict(_unpacked(state), allow_changes=self._allow_changes):
            _LOG.warning("the mixture goes on although %s.", change)
        self.used_up = False


class MixtureCallback(Callback):
    """Measures and reweights before the first batch and after each interval, and logs what comes of it.

    Weights change between two batches, before Composer writes the checkpoint that is due there. A model is
    measured in the Trainer's precision, as Composer evaluates. Use the callback without a reweighter too: it
    keeps a second `fit` from dropping batches, and ends the training where the data end.

    Args:
        reweighter: of the mixture that the Trainer reads; None leaves the weights to you.
        model: the module to measure; None is the model inside Composer's (`HuggingFaceModel.model`).
        allow_changes: go on from a checkpoint although domains, data or settings have changed; what has
            changed is logged.
    """

    def __init__(
        self,
        reweighter: Reweighter | None = None,
        *,
        model: nn.Module | None = None,
        allow_changes: bool = False,
    ) -> None:
        self._reweighter, self._model, self._allow_changes = reweighter, model, allow_changes

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check that the Trainer reads this mixture, and measure if the run begins here.

        Raises:
            ConfigError: it does not, or the epochs of Trainer and loader differ.
            RunError: the mixture is not at the Trainer's batch.
        """
        self._check(state)
        state.dataset_resumption["train"] = True
        self._reweight(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure if an interval ends here; the next batch follows the new weights.

        Raises:
            RunError: the mixture is not at the Trainer's batch.
        """
        self._reweight(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """End the training if the domains are used up; Composer would go on without data."""
        if _loader(state).used_up:
            state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        """The reweighter's state, for Composer's checkpoint."""
        return {} if self._reweighter is None else {_STATE: json.dumps(self._reweighter.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DataError: it is of other data, or was saved without a reweighter.
        """
        if self._reweighter is not None:
            saved = _unpacked(state)
            for change in self._reweighter.load_state_dict(saved, allow_changes=self._allow_changes):
                _LOG.warning("the mixture and its weights go on although %s.", change)

    def close(self, state: State, logger: Logger) -> None:
        """Stop the mixture's readers."""
        if isinstance(state.train_dataloader, MixtureLoader):
            state.train_dataloader.mixture.close()

    def _check(self, state: State) -> None:
        loader = _loader(state)
        if self._reweighter is not None and self._reweighter.mixture is not loader.mixture:
            raise ConfigError(
                "MixtureCallback reweights one DomainMixture and the Trainer reads another; give both one."
            )
        length = None if state.dataloader_len is None else state.dataloader_len.value
        if length != loader.epoch_steps:
            raise ConfigError(
                f"train_subset_num_batches = {length} and epoch_steps = {loader.epoch_steps}; leave the "
                "first out and say the length of an epoch to MixtureLoader(mixture, epoch_steps=...)."
            )

    def _reweight(self, state: State, logger: Logger) -> None:
        if self._reweighter is None:
            return
        model = self._model if self._model is not None else _model_of(state)
        with get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False):
            losses = self._reweighter.step(model, state.timestamp.batch.value)
        if losses is not None:
            logger.log_metrics(self._reweighter.metrics())


def _loader(state: State) -> MixtureLoader:
    loader = state.train_dataloader
    if not isinstance(loader, MixtureLoader):
        raise ConfigError(
            f"the Trainer reads a {type(loader).__name__}; MixtureCallback needs "
            "train_dataloader=MixtureLoader(mixture)."
        )
    return loader


def _model_of(state: State) -> nn.Module:
    """The model inside DistributedDataParallel and Composer's own wrapper."""
    from composer.models import HuggingFaceModel

    model = state.model
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner.model if isinstance(inner, HuggingFaceModel) else inner


def _unpacked(state: Mapping[str, str] | None) -> Any:
    if not state or _STATE not in state:
        raise DataError(
            "the checkpoint has no state of a mixture: it was written without MixtureLoader, or without a "
            "reweighter. Load the model alone (load_weights_only=True); the mixture begins at its first row."
        )
    return json.loads(state[_STATE])
