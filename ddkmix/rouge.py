"""Rouge-L of a model's responses to held-out prompts, with which on-policy distillation is evaluated.

The text of each response is held against that of the reference: the F-measure of their longest common
subsequence of words, stemmed, as the package `rouge-score` computes it. The evaluation of MiniLLM (arXiv
2306.08543) does the same; it samples responses, where here the likeliest token is taken and no seed is
needed. Words are runs of a-z and 0-9 in lower case: of text in another script nothing is left, so such a row
scores 0, as does an empty one.

A model can raise it by the length of its responses alone, so that and the share that ended by itself stand
beside it. A response is the same whatever is decoded with it (`generation.decode`), so are the numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from ddkmix.config import RunConfig, Storage, Student
from ddkmix.errors import ConfigError
from ddkmix.generation.decode import Prompt
from ddkmix.held_out import HeldOut, select_rows
from ddkmix.index import DomainRows
from ddkmix.preflight import Prepared, check
from ddkmix.prepare import open_rows, storage_of
from ddkmix.ranks import current_rank, open_processes, sum_over_ranks
from ddkmix.responders import By, check_models, check_prompts, decoder_of, load_responder, response_cards
from ddkmix.response_store.card import ResponseCard
from ddkmix.response_store.prompts import leading_prompts
from ddkmix.rows import RowReader, byte_reader
from ddkmix.tokenizer import TokenizerCard
from ddkmix.tracking import progress_bar


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RougeRows:
    """What was measured on some held-out rows."""

    scores: Float[np.ndarray, " R"]
    """F-measure of Rouge-L of each response, in [0, 1]."""
    num_tokens: Int[np.ndarray, " R"]
    """Tokens of each response, the one that ends it included."""
    ended: Bool[np.ndarray, " R"]
    """Whether it ended by itself; otherwise it was cut at the most tokens that were allowed."""
    reference_tokens: Int[np.ndarray, " R"]
    """Tokens of each reference, the one that ends it included."""

    @property
    def mean(self) -> float:
        """Mean Rouge-L."""
        return float(self.scores.mean())

    @property
    def error(self) -> float:
        """Its standard error over rows; not a number of a single row."""
        count = len(self.scores)
        return float(self.scores.std(ddof=1)) / sqrt(count) if count > 1 else nan

    def to_json(self) -> dict[str, Any]:
        """Means as plain numbers."""
        return {
            "rows": len(self.scores),
            "rouge_l": self.mean,
            "error": None if self.error != self.error else self.error,
            "tokens": float(self.num_tokens.mean()),
            "ended": float(self.ended.mean()),
            "reference_tokens": float(self.reference_tokens.mean()),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResponseRouge:
    """Rouge-L of one model, or of the teachers of the domains."""

    by: By
    """Who answered."""
    domains: Mapping[str, RougeRows]
    """Those that have prompts."""
    left_out: tuple[str, ...]
    """Those that have none."""

    @property
    def together(self) -> RougeRows:
        """The rows of all domains."""
        every = list(self.domains.values())
        return RougeRows(
            scores=np.concatenate([one.scores for one in every]),
            num_tokens=np.concatenate([one.num_tokens for one in every]),
            ended=np.concatenate([one.ended for one in every]),
            reference_tokens=np.concatenate([one.reference_tokens for one in every]),
        )

    def to_json(self) -> dict[str, Any]:
        """Means by domain and over all rows, as plain numbers."""
        own = {name: one.to_json() for name, one in self.domains.items()}
        return {"domains": own, "all_rows": self.together.to_json()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """Who answers which held-out prompts; everything that needs no model is checked."""

    by: By
    prepared: Prepared
    cards: Mapping[str, ResponseCard]
    held_out: Mapping[str, HeldOut]
    left_out: tuple[str, ...]
    """Domains without prompts."""
    processes: Any


def response_rouge(
    config: RunConfig, *, student: str | Path | None = None, by: By = "student"
) -> ResponseRouge:
    """Let a config's student or teachers answer its held-out prompts, and compare with the references.

    The rows are those that gaps are measured on (`evaluation.rows` of each domain). Of the section `generate`
    only `max_new_tokens`, `stop`, `block_rows` and `batch_rows` count. Rows are split over processes, and
    every process gets the result.

    Args:
        config: the run; nothing is trained.
        student: folder or Hub id of a student in the place of the config's.
        by: who answers.

    Raises:
        ConfigError: no domain has prompts, prompts and responses do not fit into the model, or the teacher of
            a domain is an ensemble.
        DataError: a prompt is empty, or rows cannot be read.
        ModelError: a model cannot be used as asked.
        NumericsError: a model's logits are not finite.
    """
    return answered(open_asked(config, student=student, by=by))


def open_asked(config: RunConfig, *, student: str | Path | None = None, by: By = "student") -> Asked:
    """What `response_rouge` does before it loads a model."""
    prepared = check(_greedy(config, student), only_gaps=True)
    check_models(prepared, by)
    processes = open_processes()
    with processes.main_process_first():
        packed = open_rows(prepared, shown=processes.is_main_process)
    rows = {name: domain.held_out for name, domain in packed.items() if domain.held_out.are_prompts}
    if not rows:
        raise ConfigError(f"none of the domains {', '.join(packed)} has prompts; add one whose documents do.")
    return Asked(
        by=by,
        prepared=prepared,
        cards=_cards(prepared, by, rows),
        held_out={name: select_rows(own, config.evaluation.rows) for name, own in rows.items()},
        left_out=tuple(name for name in packed if name not in rows),
        processes=processes,
    )


def answered(asked: Asked) -> ResponseRouge:
    """Load the models, let them answer, and score: the rest of `response_rouge`."""
    prepared, by, held_out, config = asked.prepared, asked.by, asked.held_out, asked.prepared.config
    found: dict[str, RougeRows] = {}
    done, total = 0, sum(len(own.places) for own in held_out.values())
    with progress_bar("rouge", total=total, shown=asked.processes.is_main_process) as bar:
        for responder, names in _responders(prepared, by, list(held_out)).items():
            model = load_responder(prepared, by, responder).to(asked.processes.device)
            for name in names:

                def show(count: int, before: int = done, name: str = name) -> None:
                    bar.update(before + count, note=name)

                found[name] = rouge_of(
                    model,
                    held_out[name],
                    card=asked.cards[name],
                    tokenizer=prepared.tokenizer,
                    batch_rows=config.generate.batch_rows,
                    storage=storage_of(config),
                    on_rows=show,
                )
                done += len(held_out[name].places)
    return ResponseRouge(
        by=by,
        domains={name: found[name] for name in held_out},
        left_out=asked.left_out,
    )


def rouge_of(
    model: nn.Module,
    held_out: HeldOut,
    *,
    card: ResponseCard,
    tokenizer: TokenizerCard,
    batch_rows: int = 64,
    storage: Storage | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> RougeRows:
    """Rouge-L of a model's responses to the prompts of held-out rows.

    Args:
        model: a transformers causal language model, on its device; it is in evaluation mode meanwhile.
        held_out: prompts and their references.
        card: how tokens are chosen, what ends a response, and how long it may be.
        tokenizer: of the rows.
        batch_rows: rows taken in hand at once; without effect on the numbers.
        storage: how remote rows are read; the default settings when None.
        on_rows: called with the rows done so far, by all processes if they are as fast as this one.

    Raises:
        DataError: a prompt is empty or too long, or a row cannot be read.
        ModelError, NumericsError: see `generation.decode.Decoder.responses`.
    """
    rank, world_size = current_rank()
    prompts = held_out.rows.places.num_prompt_tokens
    longest = 0 if prompts is None else int(prompts.max(initial=0))  # of the domain, whichever rows are asked
    decoder = decoder_of(model, card, tokens=longest + card.max_new_tokens)
    score = _scorer(tokenizer)
    every = range(len(held_out.places))
    mine, stop = every[rank::world_size], set(card.stop_ids)
    sums = torch.zeros((4, len(every)), dtype=torch.float64)
    for start in range(0, len(mine), batch_rows):
        chosen = mine[start : start + batch_rows]
        asked, references = zip(*_read(held_out, chosen, storage), strict=True)
        for i, reference, response in zip(chosen, references, decoder.responses(asked), strict=True):
            own = (score(reference, response), len(response), int(response[-1]) in stop, len(reference))
            sums[:, i] = torch.tensor(own, dtype=torch.float64)
        on_rows(min(len(every), world_size * (start + len(chosen))))
    device = next(model.parameters()).device
    scores, tokens, ended, reference_tokens = sum_over_ranks(sums.to(device)).cpu().numpy()
    return RougeRows(
        scores=scores,
        num_tokens=tokens.astype(np.int64),
        ended=ended > 0,
        reference_tokens=reference_tokens.astype(np.int64),
    )


def rouge_l(reference: str, response: str) -> float:
    """F-measure of Rouge-L of two texts, in [0, 1]; 0 if one of them has no word of a-z and 0-9."""
    return float(_library().score(reference, response)["rougeL"].fmeasure)


def _scorer(tokenizer: TokenizerCard) -> Callable[[Int[np.ndarray, " _"], Int[np.ndarray, " _"]], float]:
    """(tokens of the reference, of the response) -> Rouge-L of their text without special tokens."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer.path)).decode

    def score(reference: Int[np.ndarray, " _"], response: Int[np.ndarray, " _"]) -> float:
        texts = [decode(ids.tolist(), skip_special_tokens=True) for ids in (reference, response)]
        return rouge_l(*texts)

    return score


@cache
def _library() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _read(
    held_out: HeldOut, chosen: Sequence[int], storage: Storage | None
) -> Iterator[tuple[Prompt, Int[np.ndarray, " _"]]]:
    """The prompt and the reference of some rows."""
    rows = held_out.rows
    reader = RowReader(rows, remote=byte_reader(storage))
    try:
        for shard, row in (held_out.places[i] for i in chosen):
            ids = reader.read(shard, row)[: rows.tokens_at(shard, row)].astype(np.int64)
            prompt, reference = np.split(ids, [rows.prompt_tokens_at(shard, row)])
            yield Prompt(ids=prompt, key=(), name=rows.name_of(shard, row)), reference
    finally:
        reader.close()


def _greedy(config: RunConfig, student: str | Path | None) -> RunConfig:
    """The config with the likeliest token always, and another student."""
    changes: dict[str, Any] = {"generate": config.generate.model_copy(update={"temperature": 0.0})}
    if student is not None:
        changes["student"] = Student.model_validate({"init": "load", "model": str(student)})
    return config.model_copy(update=changes)


def _cards(prepared: Prepared, by: By, rows: Mapping[str, DomainRows]) -> dict[str, ResponseCard]:
    """How each domain is answered.

    Raises:
        ConfigError, DataError: see `responders.check_prompts`.
    """
    cards = response_cards(prepared, by, {name: own.end_of_turn_id for name, own in rows.items()})
    for name, own in rows.items():
        prompts = leading_prompts(own, storage_of(prepared.config))
        assert prompts is not None
        check_prompts(prepared, by, prompts, cards[name])
    return cards


def _responders(prepared: Prepared, by: By, domains: Sequence[str]) -> dict[str, list[str]]:
    """The domains of each model that answers, so that one is loaded at a time."""
    if by == "student":
        return {by: [*domains]}
    found: dict[str, list[str]] = {}
    for name in domains:
        found.setdefault(prepared.teachers.of_domain[name], []).append(name)
    return found
