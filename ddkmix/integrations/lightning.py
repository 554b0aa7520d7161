"""The mixture in Lightning's `Trainer` (`pip install 'ddkmix[lightning]'`).

    trainer = lightning.Trainer(max_steps=1000, callbacks=[MixtureCallback(reweighter)])
    trainer.fit(module, MixtureDataModule(mixture))

`ddkmix.integrations.pytorch_lightning` has the same two classes for `import pytorch_lightning`.
"""

from lightning.pytorch import Callback, LightningDataModule

from ddkmix.integrations.lightning_hooks import CallbackHooks, DataHooks

__all__ = ["MixtureCallback", "MixtureDataModule"]


class MixtureDataModule(DataHooks, LightningDataModule):
    """The train rows of a run of Lightning: a LightningDataModule around a mixture.

    Gives as many micro-batches a step as the Trainer accumulates, up to its `max_steps`. Batches are dicts of
    `input_ids` (b, T) int64 and `labels` (b, T) int64 (not shifted, -100 at padding), or what the mixture's
    `collate_fn` makes. The Trainer needs a `MixtureCallback` of the same mixture, which saves the state. For
    validation of your own, subclass it and add `val_dataloader`.

    Args:
        mixture: rows; ranks are those of the strategy, whatever `use_distributed_sampler` says.
        microbatches: batches of an optimizer step, for manual optimization only, where the Trainer does not
            accumulate; None is `accumulate_grad_batches`.
        domain_ids: add `domain_ids` (b,) int64, into `mixture.domains`, to every batch.

    Raises:
        ConfigError: no `MixtureCallback` is there, or the rows cannot be dealt into so many micro-batches.
    """


class MixtureCallback(CallbackHooks, Callback):
    """Measures the student at every interval, sets the weights, and keeps the state in checkpoints.

    Any checkpoint of the Trainer holds what `fit(ckpt_path=...)` needs to go on with the very next step, also
    one made within a step or on an exception, with other workers, ranks or `accumulate_grad_batches`. The
    weights, epochs, losses and gaps of `Reweighter.metrics` are logged at each interval by the Trainer's
    loggers, under the number of finished steps, and can be monitored.

    Args:
        mixture: a `Reweighter`; or a `DomainMixture` whose weights stay, or are yours to set between steps
            (in `on_train_batch_end`).
        student: the attribute of the LightningModule that is the language model. None measures the module
            itself, as the strategy wraps it, by its own `forward(input_ids)`: FSDP and ZeRO stage 3 need it.
        allow_changes: go on from a checkpoint although domains, their data or settings have changed; each
            change is logged.

    Raises:
        ConfigError: settings of the Trainer under which its steps would not be the mixture's.
        RunError: a batch is not of the step to come: something reads ahead, skips or repeats.
    """
