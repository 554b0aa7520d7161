"""The `Trainer` of transformers, and the trainers of TRL, over a mixture of domains.

    from ddkmix import GapEvaluator
    from ddkmix.integrations.transformers import MixtureTrainer

    trainer = MixtureTrainer(model, args, train_dataset={"code": code, "math": math},
                             evaluator=GapEvaluator(held_out, teacher="..."), interval_steps=1000)
    trainer.train(resume_from_checkpoint=True)

A Trainer asks for all micro-batches of a step before the step and for none of the next one, so a weight
change made at its end is whole at the next. Its own way to resume skips batches, which would be those of
other weights; here the mixture's state travels in `trainer_state.json` and nothing is skipped.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ddkmix.config import Guards
from ddkmix.errors import ConfigError, did_you_mean
from ddkmix.integrations.trainer_callback import MixtureCallback, MixtureLoader
from ddkmix.integrations.trainer_data import taken_apart
from ddkmix.integrations.trainer_kinds import TrainerKind, stand_in, trainer_kind
from ddkmix.loader import DomainMixture
from ddkmix.policies import WeightPolicy, guarded, policy_of
from ddkmix.reweighting import MeasuresModels, Reweighter, check_evaluator
from ddkmix.sources import MixtureOptions
from ddkmix.types import DomainLosses

__all__ = ["MixtureMixin", "MixtureTrainer", "mixture_trainer"]

_PACKING = (
    "packing=True would put rows of several domains into one; turn it off, or pack each domain (ddkmix pack) "
    "and give DomainMixture.from_cards(...)."
)
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class MixtureMixin(_Base):
    """Makes any Trainer train on a mixture: `class MyTrainer(MixtureMixin, SFTTrainer)`.

    Takes the arguments of the trainer that it is mixed into, and:

    Args:
        args, kwargs: those of the trainer.
        train_dataset: `{domain: map-style dataset}`, from which a mixture of the trainer's own batch size,
            seed, workers and collator is made; or a `DomainMixture`, whose `batch_rows` must be
            per_device_train_batch_size x gradient_accumulation_steps x processes, and whose own workers read.
        evaluator: a `GapEvaluator`: it measures the model at step 0 and every `interval_steps`, and the
            weights follow. When None they stay, unless you call `trainer.reweighter.update(losses)` or
            `trainer.mixture.set_weights(weights)` in a callback of yours.
        policy, interval_steps, guards, on_losses: as in `Reweighter`; steps of the optimizer, nats per token.
        mixture_options: other arguments of `DomainMixture.from_datasets` for a dict of datasets, for example
            `{"weights": {...}, "max_epochs": 4}`.
        allow_changes: resume although domains, their data, settings or the policy have changed since the
            checkpoint; what has changed is logged.

    Raises:
        ConfigError: train_dataset is neither, or an argument chooses rows or batches in another way.
        DataError: a domain has no rows.
    """

    mixture: DomainMixture
    """What serves the rows; absent, as the next, from a trainer without train_dataset."""
    reweighter: Reweighter
    """What sets the mixture's weights."""
    batch_names: tuple[str, ...] = ()
    """Of `domain_ids` and `row_places`, what every batch says about its rows; models refuse them."""

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        evaluator: MeasuresModels | None = None,
        policy: str | Mapping[str, Any] | WeightPolicy = "ddk",
        interval_steps: int = 1000,
        guards: Guards | Mapping[str, Any] | bool | None = None,
        on_losses: Callable[[int, DomainLosses, Mapping[str, float]], None] = lambda *_: None,
        mixture_options: Mapping[str, Any] | None = None,
        allow_changes: bool = False,
        **kwargs: Any,
    ) -> None:
        if getattr(kwargs.get("args"), "packing", False):  # before hours of tokenising
            raise ConfigError(_PACKING)
        policy = guarded(policy_of(policy), guards)
        for name in mixture_options or {}:
            if name not in (known := [*MixtureOptions.__annotations__, "num_tokens"]):
                raise ConfigError(f"mixture_options has no {name!r}; {did_you_mean(name, known)}")
        kind = self._kind()
        kwargs["train_dataset"] = stand_in(train_dataset, kind)
        if isinstance(train_dataset, Mapping | DomainMixture):
            names = getattr(train_dataset, "domains", train_dataset)
            check_evaluator(evaluator, tuple(map(str, names)))
        super().__init__(*args, **kwargs)
        if train_dataset is None:
            return  # a Trainer that only evaluates
        self.mixture = self._mixture_of(train_dataset, kind, dict(mixture_options or {}))
        self._check_arguments(self.mixture)
        self.args.ignore_data_skip = True  # rows that were trained on are not read again to be dropped
        self.reweighter = Reweighter(
            self.mixture, evaluator, policy, interval_steps=interval_steps, on_losses=on_losses
        )
        self._measures, self._allow_changes = evaluator is not None, allow_changes
        self.add_callback(MixtureCallback())

    def get_train_dataloader(self) -> Any:
        """Micro-batches of the mixture; nothing reshards it, wraps it or reads ahead of it.

        Raises:
            ConfigError: the arguments ask for another number of rows than the mixture has in a step.
        """
        if self.train_dataset is None:
            return super().get_train_dataloader()  # which says so
        self._check_arguments(self.mixture)
        kind = self._kind()
        return MixtureLoader(
            self.mixture,
            microbatches=self.args.gradient_accumulation_steps,
            windows=kind.windows,
            attention_mask=kind.prepares and not kind.windows,
            names=self.batch_names,
            reweighter=self.reweighter,
            measures=self._measures,
            log=self._log_mixture,
            allow_changes=self._allow_changes,
        )

    def _kind(self) -> TrainerKind:
        mro = type(self).__mro__
        return trainer_kind(mro[mro.index(MixtureMixin) + 1 :])

    def _mixture_of(self, data: Any, kind: TrainerKind, options: dict[str, Any]) -> DomainMixture:
        if isinstance(data, DomainMixture):
            if options:
                raise ConfigError(
                    f"mixture_options = {options} with a ready DomainMixture; give them to the mixture."
                )
            return data
        from datasets import Dataset

        if kind.prepares:
            data = taken_apart(self.train_dataset, data, kind.name)
        collate: Any = self.data_collator
        if all(isinstance(dataset, Dataset) for dataset in data.values()):
            data = {name: self._remove_unused_columns(dataset, "training") for name, dataset in data.items()}
        else:
            collate = self._get_collator_with_removed_columns(collate, "training")
        return DomainMixture.from_datasets(
            data,
            **{
                "batch_rows": self._batch_rows(),
                "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
                "num_workers": self.args.dataloader_num_workers,
                "prefetch_steps": self.args.dataloader_prefetch_factor or 2,
                "collate_fn": collate,
                **options,
            },
        )

    def _batch_rows(self) -> int:
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _check_arguments(self, mixture: DomainMixture) -> None:
        """Refuse what chooses rows or batches beside the mixture."""
        if getattr(self.args, "packing", False):
            raise ConfigError(_PACKING)
        args, accelerator = self.args, self.args.accelerator_config
        wrong = {
            "train_sampling_strategy": args.train_sampling_strategy != "random",
            "auto_find_batch_size": args.auto_find_batch_size,
            "dataloader_multiprocessing_context": args.dataloader_multiprocessing_context is not None,
            "num_generations": getattr(args, "num_generations", 1) != 1,
        }
        found = {name: getattr(args, name) for name, is_wrong in wrong.items() if is_wrong}
        for name in ("split_batches", "dispatch_batches"):
            if getattr(accelerator, name, None):
                found[f"accelerator_config.{name}"] = True
        if found:
            raise ConfigError(
                f"{found}: the mixture chooses the rows of every batch; leave these at their defaults."
            )
        if self.get_total_train_batch_size(args) != self._batch_rows():
            raise ConfigError(
                "tensor, context or sequence parallelism gives several processes the same rows; make a "
                "DomainMixture with the rank and world_size of the data-parallel group and use your own loop."
            )
        self._check_mixture(mixture)

    def _check_mixture(self, mixture: DomainMixture) -> None:
        """Refuse a mixture of other batches or processes."""
        args, here = self.args, (self.args.process_index, self.args.world_size)
        if mixture.settings.batch_rows != self._batch_rows():
            raise ConfigError(
                f"the mixture has batch_rows = {mixture.settings.batch_rows}, and the arguments ask for "
                f"{self._batch_rows()} = {args.train_batch_size} (per device) x "
                f"{args.gradient_accumulation_steps} (gradient accumulation) x {args.world_size} "
                "(processes); make them equal."
            )
        if mixture.ranks != here:
            raise ConfigError(
                f"the mixture serves (rank, world_size) = {mixture.ranks} and the Trainer is {here}; leave "
                "rank and world_size of the mixture out, and start processes with torchrun or accelerate."
            )

    def _log_mixture(self, metrics: dict[str, float]) -> None:
        """A record of its own: `log` of a TRL trainer would add, and forget, the metrics of half a window."""
        should_log = self.control.should_log
        Trainer.log(self, dict(metrics))
        self.control.should_log = should_log  # logging takes it back, and the record of the step is due yet


class MixtureTrainer(MixtureMixin, Trainer):
    """The `Trainer` of transformers over a mixture; see `MixtureMixin` for its arguments."""


@cache
def mixture_trainer(trainer: type[Trainer]) -> type[Any]:
    """Any Trainer over a mixture: `mixture_trainer(SFTTrainer)(model, args=..., train_dataset={...})`.

    Args:
        trainer: `Trainer` or a subclass that leaves the loop as it is, those of TRL included.

    Raises:
        ConfigError: it is no class, or one that makes batches in a way that is not known here.
    """
    if not isinstance(trainer, type):
        raise ConfigError(f"mixture_trainer of a {type(trainer).__name__} object; give its class.")
    trainer_kind(trainer.__mro__)
    return type(f"Mixture{trainer.__name__}", (MixtureMixin, trainer), {})
