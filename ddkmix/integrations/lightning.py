"""The mixture in Lightning's `Trainer` (`pip install 'ddkmix[lightning]'`).

    trainer = lightning.Trainer(max_steps=1000, callbacks=[MixtureCallback(reweighter)])
    trainer.fit(module, MixtureDataModule(mixture))

`ddkmix.integrations.pytorch_lightning` has the same two classes for `import pytorch_lightning`.
"""

from lightning.pytorch import Callback, LightningDataModule

from ddkmix.integrations.lightning_hooks import CallbackHooks, DataHooks


class MixtureDataModule(DataHooks, LightningDataModule):
    __doc__ = DataHooks.__doc__


class MixtureCallback(CallbackHooks, Callback):
    __doc__ = CallbackHooks.__doc__
