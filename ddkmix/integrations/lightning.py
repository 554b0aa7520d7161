"""The mixture in Lightning's `Trainer`.

    trainer = lightning.Trainer(max_steps=1000, callbacks=[MixtureCallback(reweighter)])
    trainer.fit(model, MixtureDataModule(mixture))

`ddkmix.integrations.pytorch_lightning` has the same classes for `import pytorch_lightning`.
"""

from lightning.pytorch import Callback, LightningDataModule

from ddkmix.integrations.lightning_hooks import CallbackHooks, DataHooks


class MixtureDataModule(DataHooks, LightningDataModule):
    """..."""


class MixtureCallback(CallbackHooks, Callback):
    """..."""
