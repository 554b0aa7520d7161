"""Settings of a Trainer under which its optimizer steps would not be the mixture's steps."""

from typing import Any

from ddkmix.errors import ConfigError
from ddkmix.step_loader import StepLoader


def check_trainer(trainer: Any) -> None:
    """Settings that are known before anything is loaded."""
    if trainer.max_steps < 1:
        raise ConfigError(
            f"Trainer(max_steps={trainer.max_steps}): a mixture has no epochs and ends after a number of "
            "optimizer steps; set max_steps."
        )
    if trainer.overfit_batches:
        raise ConfigError(
            f"Trainer(overfit_batches={trainer.overfit_batches}): a mixture never serves a batch twice; "
            "overfit on a list of its batches."
        )
    for callback in trainer.callbacks:
        factors = getattr(callback, "scheduling", None) if _is_scheduler(callback) else None
        if factors and set(factors.values()) != {1}:
            raise ConfigError(
                f"GradientAccumulationScheduler(scheduling={factors}) changes the rows of a step during the "
                "run; use Trainer(accumulate_grad_batches=...)."
            )


def _is_scheduler(callback: Any) -> bool:
    return any(cls.__name__ == "GradientAccumulationScheduler" for cls in type(callback).__mro__)


def check_loader(trainer: Any, pl_module: Any, loader: StepLoader) -> None:
    """Settings that are known when training starts."""
    parts, accumulated = loader.microbatches, trainer.accumulate_grad_batches
    if len(trainer.optimizers) > 1:
        raise ConfigError(
            f"{len(trainer.optimizers)} optimizers: Lightning's global_step counts every one's steps and is "
            "not the mixture's; use one with several parameter groups."
        )
    if loader.steps is None or loader.steps < trainer.max_steps:
        raise ConfigError(
            f"mixture.loader(steps={loader.steps}) and Trainer(max_steps={trainer.max_steps}): give the "
            "loader the trainer's max_steps; without a length Lightning reads a batch ahead of the weights."
        )
    if pl_module.automatic_optimization and parts != accumulated:
        raise ConfigError(
            f"mixture.loader(microbatches={parts}) and Trainer(accumulate_grad_batches={accumulated}) must "
            "be the same number."
        )
    batches = trainer.num_training_batches
    if batches < trainer.max_steps * parts and batches % parts:
        raise ConfigError(
            f"{batches} batches an epoch (limit_train_batches or fast_dev_run) cut a step of {parts} "
            f"micro-batches in two; make it a multiple of {parts}."
        )
