"""Plain loops in the shape of torchtitan's and torchtune's: loaders with a state, and batches as they expect.

    loader = TitanLoader(mixture, dp_rank=dp_rank, dp_degree=dp_degree, microbatches=2, reweighter=reweighter)
    dcp.load({"dataloader": loader, ...})
    reweighter.step(model, step)
    batches = iter(loader)
    while step < steps:
        step += 1
        train_step(batches)               # takes two batches
        reweighter.step(model, step)      # before the checkpoint of this step
        dcp.save({"dataloader": loader, ...})

Neither framework is imported. Read in torchtitan 0.3.0 and torchtune 0.6.1:

- torchtitan's labels are aligned, `labels[:, t]` is the token after `input[:, t]` (`HuggingFaceTextDataset`),
  and its loss does not shift. torchtune's recipes shift, so labels there are those of transformers.
- torchtitan takes all batches of a step before the first forward pass (`Trainer.train_step`), none of the
  next step, and saves after the step. A batch has `local_batch_size` rows, or with pipeline parallelism
  `pipeline_parallel_microbatch_size`; `microbatches` is batch_rows / (dp_degree * rows of a batch).
- Under tensor, context or pipeline parallelism several ranks must read the same rows, so what counts is the
  data-parallel rank. It is asked for and compared with the mixture's, for nothing fails where they differ.
- torchtitan's own loaders save one state for each data-parallel rank and refuse another degree. This state is
  the same on all ranks: one entry, one string, for every degree that divides the batch.
"""

import json
from collections.abc import Iterator, Mapping
from logging import getLogger
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ddkmix.errors import ConfigError, DataError
from ddkmix.loader import DomainMixture
from ddkmix.reweighting import Reweighter
from ddkmix.sources import IGNORE

__all__ = ["TitanLoader", "TuneLoader", "next_tokens"]

_LOG = getLogger("ddkmix")
_STATE = "ddkmix"
"""The one key of a saved state; its value is one string, which a checkpoint has or has not."""


class _PlainLoader:
    """What both have in common: the mixture's micro-batches, a length, a state for a checkpoint."""

    def __init__(
        self,
        mixture: DomainMixture,
        *,
        dp_rank: int,
        dp_degree: int,
        microbatches: int = 1,
        steps: int | None = None,
        reweighter: Reweighter | None = None,
        allow_changes: bool = False,
    ) -> None:
        if mixture.ranks != (dp_rank, dp_degree):
            rank, world_size = mixture.ranks
            raise ConfigError(
                f"the mixture deals rows to rank {rank} of {world_size}, the loop has dp_rank = {dp_rank}, "
                f"dp_degree = {dp_degree}; give rank={dp_rank}, world_size={dp_degree} to DomainMixture."
            )
        if reweighter is not None and reweighter.mixture is not mixture:
            raise ConfigError(
                "the reweighter is of one DomainMixture and the loader of another; give both one."
            )
        self._steps = mixture.loader(steps=steps, microbatches=microbatches)
        self._mixture, self._reweighter, self._allow_changes = mixture, reweighter, allow_changes

    def __len__(self) -> int:
        """Batches of the whole run, those before a resume included.

        Raises:
            TypeError: `steps` was not given.
        """
        return len(self._steps)

    def state_dict(self) -> dict[str, str]:
        """State after the last step of which every batch was taken; the same on all ranks."""
        state = self._steps.state_dict()
        if self._reweighter is not None:
            state = self._reweighter.state_dict(state["planner"]["step"])
        return {_STATE: json.dumps(state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, at any dp_degree; begin a new iteration afterwards.

        Args:
            state_dict: what `state_dict` gave.

        Raises:
            DataError: it is of other data or of another loader, or was saved without a reweighter.
        """
        if _STATE not in state_dict:
            raise DataError(
                f"the state of the checkpoint's loader has the keys {sorted(state_dict)} and not {_STATE!r}: "
                "another loader wrote it. Load the rest without it; the mixture begins at its first row."
            )
        goes_on = self._mixture if self._reweighter is None else self._reweighter
        saved = json.loads(state_dict[_STATE])
        for change in goes_on.load_state_dict(saved, allow_changes=self._allow_changes):
            _LOG.warning("the mixture goes on although %s.", change)


class TitanLoader(_PlainLoader):
    """Batches as torchtitan takes them: `({"input": (b, T)[, "positions": (b, T)]}, labels (b, T))`, int64.

    Labels are shifted here: the token after each input, -100 at the last place and where padding follows.
    `positions` are there if the mixture has `document_boundaries`.

    torchtitan's own Trainer builds its loader from a config, so give it one:

        class Mixture(TitanLoader, BaseDataLoader):
            @dataclass(kw_only=True, slots=True)
            class Config(BaseDataLoader.Config):
                batch_rows: int = 256

            def __init__(self, config, *, dp_rank, dp_world_size, local_batch_size, **_):
                ranks = {"rank": dp_rank, "world_size": dp_world_size}
                mixture = DomainMixture(rows, batch_rows=config.batch_rows, **ranks)
                parts = config.batch_rows // (dp_world_size * local_batch_size)
                super().__init__(mixture, dp_rank=dp_rank, dp_degree=dp_world_size, microbatches=parts)

    Args:
        mixture: its batches must have `input_ids` and `labels`.
        dp_rank: data-parallel rank (of torchtitan's `batch` mesh); not the global rank under tensor, context
            or pipeline parallelism.
        dp_degree: data-parallel size.
        microbatches: batches that the loop takes for each optimizer step.
        steps: optimizer steps of the whole run; None goes on until the domains are used up.
        reweighter: its policy is saved with the mixture; the loop calls its `step`.
        allow_changes: go on from a checkpoint although domains, data or settings have changed; what has
            changed is logged.

    Raises:
        ConfigError: the mixture deals its rows to other ranks, or a step's rows cannot be dealt so.
    """

    def __iter__(self) -> Iterator[tuple[dict[str, Int[Tensor, "b T"]], Int[Tensor, "b T"]]]:
        """Batches from where the mixture is.

        Raises:
            ConfigError: the mixture's batches have other keys.
        """
        for batch in self._steps:
            _check_keys(batch, type(self).__name__)
            inputs = {"input": batch["input_ids"]}
            if "position_ids" in batch:
                inputs["positions"] = batch["position_ids"]
            yield inputs, next_tokens(batch["labels"])


class TuneLoader(_PlainLoader):
    """Batches as torchtune's recipes take them: `tokens`, `labels`[, `input_pos`], each (b, T) int64.

    Labels are not shifted; the recipes do it. They also call `sampler.set_epoch`, for which a mixture has no
    use (leave that line out), and ask `len` for the steps, so give `steps`. Arguments are `TitanLoader`'s.
    """

    def __iter__(self) -> Iterator[dict[str, Int[Tensor, "b T"]]]:
        """Batches from where the mixture is.

        Raises:
            ConfigError: the mixture's batches have other keys.
        """
        names = {"input_ids": "tokens", "labels": "labels", "position_ids": "input_pos"}
        for batch in self._steps:
            _check_keys(batch, type(self).__name__)
            yield {names[key]: batch[key] for key in names if key in batch}


def next_tokens(labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Labels as transformers takes them -> the token after each place, -100 at the last.

    Args:
        labels: tokens, not shifted; -100 where nothing is predicted.
    """
    shifted = labels.roll(-1, dims=1)
    shifted[:, -1] = IGNORE
    return shifted


def _check_keys(batch: Any, loader: str) -> None:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(
            f"{loader} needs batches with input_ids and labels and got {found}; let the datasets' items or "
            "collate_fn give both."
        )
