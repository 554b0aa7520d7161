"""Which trainers are known, and what their constructors get in place of a train dataset.

`Trainer` wants rows that it can count. Those of TRL look at the columns of a `datasets.Dataset` and prepare
its rows, and two of them make one batch for all micro-batches of a step. Anything else is refused: batches
that a class makes in a way of its own would be replaced without a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from ddkmix.errors import ConfigError
from ddkmix.integrations.trainer_data import JoinedRows, check_datasets, joined, packed_stand_in
from ddkmix.loader import DomainMixture

_WINDOWS = ("DistillationTrainer", "GOLDTrainer")
"""Trainers of TRL whose batches hold the rows of a whole step, and come once for every micro-batch."""
_MAKES_BATCHES = ("get_train_dataloader", "_get_train_sampler", "get_batch_samples", "_inner_training_loop")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerKind:
    """What a trainer class does with its train dataset."""

    name: str
    """The class of transformers or TRL that the trainer is."""
    prepares: bool
    """Whether its constructor reads and changes the rows of a `datasets.Dataset`."""
    windows: bool
    """Whether each batch holds the rows of all micro-batches of a step."""


def trainer_kind(classes: Sequence[type[Any]]) -> TrainerKind:
    """What a trainer does, from its classes in the order of method resolution.

    Raises:
        ConfigError: it makes batches in a way that is not known here.
    """
    trainers = [cls for cls in classes if issubclass(cls, Trainer)]
    if not trainers:
        raise ConfigError(
            f"{classes[0].__name__} is no Trainer of transformers; name one after MixtureMixin."
        )
    for cls in trainers[: trainers.index(Trainer)]:
        own = [name for name in _MAKES_BATCHES if name in vars(cls)]
        if own and cls.__name__ not in _WINDOWS:
            raise ConfigError(
                f"{cls.__name__}.{own[0]} chooses batches in its own way, which a mixture would replace; "
                f"known are {', '.join(_WINDOWS)} and trainers that leave batches to Trainer."
            )
    library = next(cls for cls in trainers if cls.__module__.split(".")[0] in ("trl", "transformers"))
    return TrainerKind(
        name=library.__name__,
        prepares=library.__module__.split(".")[0] == "trl",
        windows=any(cls.__name__ in _WINDOWS for cls in trainers),
    )


def stand_in(data: Any, kind: TrainerKind) -> Any:
    """What the trainer's own constructor gets as its train dataset.

    Args:
        data: `{domain: dataset}`, a `DomainMixture` or None.
        kind: of the trainer.

    Raises:
        ConfigError: it is something else, or the trainer cannot use it.
    """
    if data is None:
        return None
    if isinstance(data, DomainMixture):
        if kind.prepares and kind.name != "SFTTrainer":
            raise ConfigError(
                f"train_dataset is a DomainMixture, and {kind.name} prepares rows of its own kind; give "
                "{domain: datasets.Dataset}."
            )
        return packed_stand_in() if kind.prepares else JoinedRows(sum(data.settings.num_rows))
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"train_dataset is a {type(data).__name__}; it must be a dict of datasets, one per domain, or a "
            "DomainMixture."
        )
    check_datasets(data)
    if kind.prepares:
        return joined(data, kind.name)
    return JoinedRows(sum(len(dataset) for dataset in data.values()))
