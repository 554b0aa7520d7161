"""The domain losses of any causal language model beside its teacher's, for loops that are not ours.

held-out rows of each domain x (student now, teacher once) -> DomainLosses
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.config import Storage, Teacher
from ddkmix.distillation import predicted
from ddkmix.errors import ConfigError, ModelError
from ddkmix.evaluator import Evaluator, HeldOutRows, NatsCache, TokenNats, select_rows, summarise
from ddkmix.fingerprint import hash_json
from ddkmix.hub import model_fingerprint
from ddkmix.index import DomainRows
from ddkmix.models import load_teacher
from ddkmix.own_held_out import select_items
from ddkmix.own_rows import MapDataset
from ddkmix.pack.cards import pack_cards
from ddkmix.ranks import current_rank, sum_over_ranks
from ddkmix.row_layout import Strategy
from ddkmix.types import DomainLosses

_CHUNK_TOKENS = 1024
"""Tokens whose logits are turned into float32 at one time."""


class GapEvaluator:
    """Measures a student on held-out rows of every domain, beside a teacher or reference losses.

    Rows are split over the ranks of torch.distributed; all ranks must call `measure` together. The teacher is
    measured once, when first needed, and let go. Given as a folder or Hub id, its row sums are kept in
    `cache_dir` and it is not even loaded the next time.

    Args:
        held_out: rows of each domain: packed ones, or your own dataset of items with `input_ids` and
            optionally `labels` (unshifted, -100 where nothing is predicted) and `attention_mask`.
        teacher: a model, measured on the device where it is, or the folder or Hub id of one; must share the
            student's vocabulary.
        reference: instead of a teacher: losses to compare with, nats per token, by domain. With neither,
            the gap is the student's loss itself.
        rows: most rows of each domain; the same ones for every student.
        batch_rows: rows in one forward pass; their logits exist at one time (rows x tokens x vocabulary).
        logits: (model, input_ids (B, T)) -> logits (B, T, V); when None the model is called with
            `input_ids` and gives logits or an object that has them, as transformers models do.
        teacher_dtype: "float32" or "bfloat16", of a teacher that is loaded here.
        cache_dir: where the teacher's sums are kept.
        storage: how remote rows are read; the defaults of a config when None.

    Raises:
        ConfigError: teacher and reference together, reference losses of other domains or not finite, or a
            dataset that is not map-style.
        DataError: an item cannot be used, or a domain has nothing to predict.
    """

    def __init__(
        self,
        held_out: Mapping[str, DomainRows] | Mapping[str, MapDataset],
        *,
        teacher: nn.Module | str | Path | None = None,
        reference: Mapping[str, float] | None = None,
        rows: int = 500,
        batch_rows: int = 8,
        logits: Callable[[nn.Module, Int[Tensor, "B T"]], Float[Tensor, "B T V"]] | None = None,
        teacher_dtype: str = "float32",
        cache_dir: Path | str = ".cache/ddkmix",
        storage: Storage | None = None,
    ) -> None:
        if not isinstance(held_out, Mapping):
            raise ConfigError(f"held_out is a {type(held_out).__name__}; give a dict {{domain: rows}}.")
        if teacher is not None and reference is not None:
            raise ConfigError("teacher and reference are both given; the gap is to one of them.")
        if reference is not None and set(reference) != set(held_out):
            raise ConfigError(
                f"reference losses are of {sorted(reference)} and held-out rows of {sorted(held_out)}."
            )
        if reference is not None and not all(map(isfinite, reference.values())):
            raise ConfigError(f"reference losses are {dict(reference)}; each must be a finite number.")
        if rows < 1 or batch_rows < 1 or not held_out:
            raise ConfigError(
                f"rows = {rows}, batch_rows = {batch_rows}, held_out of {sorted(held_out)}; the numbers must "
                "be at least 1, and there must be a domain."
            )
        self.domains: tuple[str, ...] = tuple(sorted(held_out))
        """Names of the domains, sorted."""
        self._held_out: dict[str, HeldOutRows] = {
            name: _select(name, held_out[name], rows) for name in self.domains
        }
        self._teacher, self._reference = teacher, reference
        self._batch_rows, self._logits, self._storage = batch_rows, logits or _logits_of, storage
        self._teacher_dtype, self._cache_dir = teacher_dtype, Path(cache_dir)
        self._sums: Mapping[str, Float[np.ndarray, " R"]] | None = None

    @classmethod
    def from_cards(
        cls,
        cards: Sequence[str] | str,
        *,
        tokenizer: str,
        seq_len: int,
        separator: str | None = None,
        strategy: Strategy = "concatenate",
        processes: int = 1,
        cache_dir: Path | str = ".cache/ddkmix",
        storage: Storage | None = None,
        **options: Any,
    ) -> "GapEvaluator":
        """The evaluator of the held-out rows of some domain cards; packs what the cache lacks.

        Args:
            cards: card files, globs or folders.
            tokenizer: local folder or Hub id.
            seq_len, separator, strategy, processes: as in `ddkmix.config.Pack`: tokens in a row, and so on.
            cache_dir: where packed rows and the teacher's sums are kept.
            storage: how remote shards are read.
            options: other arguments of the constructor.

        Raises:
            ConfigError: an argument is wrong.
            DataError: a card or its shards are wrong.
        """
        packed = pack_cards(
            cards,
            tokenizer=tokenizer,
            seq_len=seq_len,
            cache_dir=cache_dir,
            separator=separator,
            strategy=strategy,
            processes=processes,
            storage=storage,
        )
        rows = {name: domain.held_out for name, domain in packed.items()}
        return cls(rows, cache_dir=cache_dir, storage=storage, **options)

    def measure(self, model: nn.Module) -> DomainLosses:
        """Held-out losses of a model as it is now, nats per token, beside the teacher's or the reference.

        The model is in evaluation mode meanwhile and as before afterwards; no gradients are made.

        Args:
            model: the student, wrapped by DDP, FSDP or DeepSpeed or not.

        Raises:
            ModelError: the teacher cannot be loaded, or a model gives no logits of the rows' tokens.
            DataError: a row cannot be read.
        """
        evaluator = self._evaluator(_device_of(model))
        if self._sums is None:
            self._sums = self._teacher_sums(evaluator)
            self._teacher = None
        with _evaluating(model):
            student = evaluator.sums(self._token_nats(model))
        return summarise(self._held_out, student, self._sums)

    def _evaluator(self, device: torch.device) -> Evaluator:
        rank, world_size = current_rank()
        return Evaluator(
            held_out=self._held_out,
            batch_rows=self._batch_rows,
            device=device,
            rank=rank,
            world_size=world_size,
            reduce=sum_over_ranks,
            storage=self._storage,
        )

    def _teacher_sums(self, evaluator: Evaluator) -> Mapping[str, Float[np.ndarray, " R"]]:
        teacher, cache = self._teacher, None
        if teacher is None:
            means = self._reference or dict.fromkeys(self.domains, 0.0)
            return {name: means[name] * held_out.num_tokens for name, held_out in self._held_out.items()}
        if not isinstance(teacher, nn.Module):
            name = str(teacher)
            fingerprint = model_fingerprint(name, None, self._cache_dir)
            key = hash_json([fingerprint, self._teacher_dtype, evaluator.device.type, "logits"])
            cache = NatsCache(self._cache_dir / "teacher_nats", key)
            if (known := evaluator.cached(cache)) is not None:
                return known
            teacher = load_teacher(Teacher.model_validate({"model": name, "dtype": self._teacher_dtype}))
            teacher.to(evaluator.device)
        # in its own precision, whatever the loop around trains in: the sums are kept under that name
        with _evaluating(teacher), torch.autocast(evaluator.device.type, enabled=False):
            return evaluator.sums(self._token_nats(teacher), cache)

    def _token_nats(self, model: nn.Module) -> TokenNats:
        """Cross-entropy of the predicted tokens of a batch, from the model's logits."""

        device, classes = _device_of(model), _embedded(model)

        @torch.no_grad()
        def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
            input_ids, labels = input_ids.to(device), labels.to(device)
            largest = int(torch.maximum(input_ids, labels).max())
            _check_vocabulary(model, largest, classes)  # before the forward pass: a GPU does not recover
            logits = self._logits(model, input_ids)
            if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
                raise ModelError(
                    f"{type(model).__name__} gives logits {tuple(logits.shape)} for tokens "
                    f"{tuple(input_ids.shape)}; they must be (B, T, V). Pass logits=... if it is called in "
                    "another way."
                )
            _check_vocabulary(model, largest, logits.shape[2])
            where = predicted(labels)
            chosen, targets = logits[:, :-1][where], labels[:, 1:][where]
            parts = zip(torch.split(chosen, _CHUNK_TOKENS), torch.split(targets, _CHUNK_TOKENS), strict=True)
            return torch.cat(
                [nn.functional.cross_entropy(part.float(), own, reduction="none") for part, own in parts]
            )

        return nats


def _select(name: str, rows: Any, limit: int) -> HeldOutRows:
    return select_rows(rows, limit) if isinstance(rows, DomainRows) else select_items(name, rows, limit)


def _logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    found = model(input_ids)
    if isinstance(found, Tensor):
        return found
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"{type(model).__name__} gives a {type(found).__name__} without logits; pass logits=(model, "
            "input_ids) -> logits to GapEvaluator."
        )
    return logits


def _check_vocabulary(model: nn.Module, largest: int, classes: int | None) -> None:
    if classes is not None and largest >= classes:
        raise ModelError(
            f"{type(model).__name__} knows {classes} tokens and held-out rows have token {largest}; teacher "
            "and student must share the tokenizer of the rows."
        )


def _embedded(model: nn.Module) -> int | None:
    """Tokens that a transformers model, wrapped or not, has embeddings for; None of other models."""
    for module in model.modules():
        embeddings: Any = getattr(module, "get_input_embeddings", None)
        if embeddings is not None:
            return getattr(embeddings(), "num_embeddings", None)
    return None


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module is as before afterwards, also those that were in it already."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
