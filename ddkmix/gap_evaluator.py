"""The domain losses of any causal language model beside its teacher's, for loops that are not ours.

held-out rows of each domain x (student now, teacher once) -> DomainLosses
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.card import ReferenceLoss
from ddkmix.config import Storage, Teacher
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError
from ddkmix.evaluator import Evaluator, TeacherNats
from ddkmix.fingerprint import hash_json
from ddkmix.held_out import HeldOutRows, select_rows
from ddkmix.hub import model_fingerprint
from ddkmix.index import DomainRows
from ddkmix.measures import checked_measures
from ddkmix.models import load_teacher
from ddkmix.nats_cache import NatsCache
from ddkmix.own_held_out import select_items
from ddkmix.own_rows import MapDataset
from ddkmix.pack.cards import pack_cards
from ddkmix.predictions import device_of, divergence_of, evaluating, logits_of, token_nats_of
from ddkmix.ranks import current_rank, sum_over_ranks
from ddkmix.references import card_references, reference_sums
from ddkmix.row_layout import Strategy
from ddkmix.tokenizer import tokenizer_fingerprint
from ddkmix.types import DomainLosses


class GapEvaluator:
    """Measures a student on held-out rows of every domain, beside a teacher or reference losses.

    Rows are split over the ranks of torch.distributed; all ranks must call `measure` together. The teacher is
    measured once, when first needed, and let go, unless `forward_kl` wants it every time. Given as a folder
    or Hub id, its losses are kept in `cache_dir` and it is not even loaded the next time; not so with
    `logits` of your own, because what a function computes has no name to keep losses under.

    Args:
        held_out: rows of each domain: packed ones, or your own dataset of items with `input_ids` and
            optionally `labels` (unshifted, -100 where nothing is predicted) and `attention_mask`.
        teacher: a model, measured on the device where it is, or the folder or Hub id of one; must share the
            student's vocabulary.
        reference: instead of a teacher: losses to compare with by domain, nats per token, or as a card's
            `reference_loss`. With neither, the gap is the student's loss itself.
        rows: most rows of each domain; the same ones for every student.
        batch_rows: rows in one forward pass; their logits exist at one time (rows x tokens x vocabulary).
        logits: (model, input_ids (B, T)) -> logits (B, T, V); when None the model is called with
            `input_ids` and gives logits or an object that has them, as transformers models do.
        teacher_dtype: "float32" or "bfloat16", of a teacher that is loaded here.
        cache_dir: where the teacher's sums are kept; unused with `logits`.
        storage: how remote rows are read; the defaults of a config when None.
        measures: what to measure beside the losses. "excess_loss": the mean of max(0, student - teacher) over
            tokens; "forward_kl": the mean of KL(teacher || student), for which the teacher stays loaded, on
            the student's device, and reads the rows each time. A policy names them in its `needs`.

    Raises:
        ConfigError: teacher and reference together, reference losses of other domains or not finite, a
            dataset that is not map-style, or measures without a teacher.
        DataError: an item cannot be used, or a domain has nothing to predict.
    """

    def __init__(
        self,
        held_out: Mapping[str, DomainRows] | Mapping[str, MapDataset],
        *,
        teacher: nn.Module | str | Path | None = None,
        reference: Mapping[str, float] | Mapping[str, ReferenceLoss] | None = None,
        rows: int = 500,
        batch_rows: int = 8,
        logits: Callable[[nn.Module, Int[Tensor, "B T"]], Float[Tensor, "B T V"]] | None = None,
        teacher_dtype: str = "float32",
        cache_dir: Path | str = ".cache/ddkmix",
        storage: Storage | None = None,
        measures: Iterable[str] = (),
    ) -> None:
        if not isinstance(held_out, Mapping):
            raise ConfigError(f"held_out is a {type(held_out).__name__}; give a dict {{domain: rows}}.")
        if teacher is not None and reference is not None:
            raise ConfigError("teacher and reference are both given; the gap is to one of them.")
        if reference is not None and set(reference) != set(held_out):
            raise ConfigError(
                f"reference losses are of {sorted(reference)} and held-out rows of {sorted(held_out)}."
            )
        numbers = [loss for loss in (reference or {}).values() if not isinstance(loss, ReferenceLoss)]
        if reference is not None and not all(map(isfinite, numbers)):
            raise ConfigError(f"reference losses are {dict(reference)}; each must be a finite number.")
        if rows < 1 or batch_rows < 1 or not held_out:
            raise ConfigError(
                f"rows = {rows}, batch_rows = {batch_rows}, held_out of {sorted(held_out)}; the numbers must "
                "be at least 1, and there must be a domain."
            )
        self.measures: frozenset[str] = checked_measures(measures, where="GapEvaluator: measures =")
        """What it measures beside the losses."""
        if self.measures and teacher is None:
            raise ConfigError(
                f"GapEvaluator: measures = {sorted(self.measures)} look at a teacher token by token, and "
                "there is none; give teacher=..., or leave measures out."
            )
        self.domains: tuple[str, ...] = tuple(sorted(held_out))
        """Names of the domains, sorted."""
        self._held_out: dict[str, HeldOutRows] = {
            name: _select(name, held_out[name], rows) for name in self.domains
        }
        self._teacher, self._reference = teacher, reference
        self._batch_rows, self._logits, self._storage = batch_rows, logits or logits_of, storage
        self._teacher_dtype, self._cache_dir = teacher_dtype, Path(cache_dir)
        self._nats: TeacherNats | None = None

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

        Without a teacher and reference losses, the gap is to those that the cards name, if they do.

        Args:
            cards: card files, globs or folders.
            tokenizer: local folder or Hub id.
            seq_len, separator, strategy, processes: as in `ddkmix.config.Pack`: tokens in a row, and so on.
            cache_dir: where packed rows and the teacher's sums are kept.
            storage: how remote shards are read.
            options: other arguments of the constructor.

        Raises:
            ConfigError: an argument is wrong.
            DataError: a card or its shards are wrong, or some cards have a reference loss and others not.
        """
        if options.get("teacher") is None and options.get("reference") is None:
            domains = load_domains([cards] if isinstance(cards, str) else cards, storage)
            options["reference"] = card_references(domains, tokenizer_fingerprint(tokenizer))
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
        evaluator = self._evaluator(device_of(model))
        if self._nats is None:
            self._nats = self._teacher_nats(evaluator)
            self._teacher = self._live(evaluator.device) if "forward_kl" in self.measures else None
        with evaluating(model):
            if self._teacher is None:
                return evaluator.measure(token_nats_of(model, self._logits), self._nats)
            assert isinstance(self._teacher, nn.Module)
            with evaluating(self._teacher):
                return evaluator.measure(divergence_of(model, self._teacher, self._logits), self._nats)

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

    def _teacher_nats(self, evaluator: Evaluator) -> TeacherNats:
        teacher, cache, tokens = self._teacher, None, "excess_loss" in self.measures
        if teacher is None:
            reference = self._reference or dict.fromkeys(self.domains, 0.0)
            return TeacherNats(sums=reference_sums(self._held_out, reference))
        if not isinstance(teacher, nn.Module):
            cache = self._cache(str(teacher), evaluator.device)
            known = None if cache is None else evaluator.cached(cache, tokens=tokens)
            if known is not None:
                return known
            self._teacher = teacher = self._live(evaluator.device)
        # in its own precision, whatever the loop around trains in: the sums are kept under that name
        with evaluating(teacher), torch.autocast(evaluator.device.type, enabled=False):
            return evaluator.frozen(token_nats_of(teacher, self._logits), cache, tokens=tokens)

    def _cache(self, teacher: str, device: torch.device) -> NatsCache | None:
        """Where losses of a teacher in a folder or on the Hub are kept; None where the user computes them."""
        if self._logits is not logits_of:
            return None
        fingerprint = model_fingerprint(teacher, None, self._cache_dir)
        key = hash_json([fingerprint, self._teacher_dtype, device.type, "logits"])
        return NatsCache(self._cache_dir / "teacher_nats", key)

    def _live(self, device: torch.device) -> nn.Module:
        """The teacher as a module; one that was given stays where it is."""
        if isinstance(self._teacher, nn.Module):
            return self._teacher
        config = Teacher.model_validate({"model": str(self._teacher), "dtype": self._teacher_dtype})
        return load_teacher(config).to(device)


def _select(name: str, rows: Any, limit: int) -> HeldOutRows:
    return select_rows(rows, limit) if isinstance(rows, DomainRows) else select_items(name, rows, limit)
