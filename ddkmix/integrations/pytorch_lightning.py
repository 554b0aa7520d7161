"""The mixture in the `Trainer` of `pytorch_lightning`: see `ddkmix.integrations.lightning`."""

from pytorch_lightning import Callback, LightningDataModule

from ddkmix.integrations.lightning_hooks import CallbackHooks, DataHooks

__all__ = ["MixtureCallback", "MixtureDataModule"]


class MixtureDataModule(DataHooks, LightningDataModule):
    """As `ddkmix.integrations.lightning.MixtureDataModule`."""


class MixtureCallback(CallbackHooks, Callback):
    """As `ddkmix.integrations.lightning.MixtureCallback`."""
