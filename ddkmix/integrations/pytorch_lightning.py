"""The mixture in the `Trainer` of `pytorch_lightning`; see `ddkmix.integrations.lightning`."""

from pytorch_lightning import Callback, LightningDataModule

from ddkmix.integrations.lightning_hooks import CallbackHooks, DataHooks


class MixtureDataModule(DataHooks, LightningDataModule):
    __doc__ = DataHooks.__doc__


class MixtureCallback(CallbackHooks, Callback):
    __doc__ = CallbackHooks.__doc__
