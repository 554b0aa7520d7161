"""One optimizer step: the rows that were planned -> parts -> forward and backward passes -> one update.

Nothing is normalised anywhere but here.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ddkmix.answers import Place, uniform_of
from ddkmix.checkpoint import latest_checkpoint
from ddkmix.errors import NumericsError
from ddkmix.losses import CrossEntropy, LossTerm
from ddkmix.objectives import Part
from ddkmix.planner import deal
from ddkmix.predicted_tokens import OfResponses, predicted
from ddkmix.preference.steps import PairStep, with_quality
from ddkmix.row_weights import token_weights
from ddkmix.run import Run
from ddkmix.schedule import lr_multiplier
from ddkmix.sources import IGNORE
from ddkmix.step_rows import StepRows

_NOTHING = (LossTerm("cross_entropy", 1.0, CrossEntropy()),)


def train_step(run: Run, batch: dict[str, Tensor], step: int) -> tuple[float, int]:
    """One optimizer step; returns the gradient norm and the number of predicted tokens of all ranks.

    Args:
        run: the run, whose student and optimizer move.
        batch: the planner's rows of this rank.
        step: completed steps.

    Raises:
        NumericsError: the gradient is not finite; parameters are as before.
        DataError, ModelError: responses cannot be had.
    """
    device, trainer = run.accelerator.device, run.config.trainer
    if run.row_weights is not None:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        run.row_weights.weigh(batch)
    # only the last backward pass is shared, and `loss` alone may train more than the student (hidden_match)
    in_order = sorted(parts_of(run, batch, step), key=lambda part: part.name in ("train", ""))
    parts = [_on(part, device) for part in in_order]
    # one collective: the normalisers of the whole window, and whether any rank was told to stop
    units = [_units(parts, name) for name in run.sums()]
    tokens = sum((predicted(part.batch["labels"]).sum() for part in parts if part.name), torch.tensor(0))
    stop = torch.tensor(len(run.stop_signal))
    counts = run.reduce(torch.stack([value.to(device) for value in (*units, tokens, stop)])).tolist()
    *of_names, num_tokens, stops = counts
    if stops and not run.stop_signal:
        run.stop_signal.append(signal.SIGTERM)
    normalisers = dict(zip(run.sums(), of_names, strict=True))
    todo = [(part, micro) for part in parts for micro in _micro_batches(part, trainer.microbatch_rows)]
    for number, (part, micro) in enumerate(todo):
        with nullcontext() if number == len(todo) - 1 else run.accelerator.no_sync(run.student):
            _backward(run, part, micro, normalisers.get(part.name, 0))
    limit = run.config.optimizer.max_grad_norm or float("inf")
    grad_norm = float(run.accelerator.clip_grad_norm_(run.student.parameters(), limit))
    if not torch.isfinite(torch.tensor(grad_norm)):
        _refuse(run, step, grad_norm, batch)
    multiplier = lr_multiplier(run.config.schedule, step, trainer.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.optimizer.lr * multiplier
    run.online.step(multiplier, run.reduce)  # refuses before anything has moved
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm, int(num_tokens)


def parts_of(run: Run, batch: dict[str, Tensor], step: int) -> list[Part]:
    """What a step trains on, on this rank: at least one part with rows, because ranks go backward together.

    Args:
        run: the run.
        batch: the planner's rows of this rank.
        step: completed steps.
    """
    terms = run.terms_at(step)
    if run.answers is None:
        return [Part(name="train", batch=batch, what=terms)]
    rows = _step_rows(run, batch, step, terms)
    found = [part for part in run.objective.parts(rows) if len(part.batch["labels"])]
    if rows.said:
        values = torch.tensor([run.answers.values(answer, step) for answer in rows.said]).T
        domains = torch.tensor([answer.place.domain for answer in rows.said])
        window = run.windows["rollouts"]
        window.add(values.to(run.accelerator.device), domains.to(run.accelerator.device), [0.0] * len(values))
    row = {name: batch[name][:1] for name in ("input_ids", "labels", "domain_ids")}
    return found or [Part(name="", batch=row, what=terms or _NOTHING)]


def _step_rows(run: Run, batch: dict[str, Tensor], step: int, terms: Sequence[LossTerm]) -> StepRows:
    answers, mixture = run.answers, run.mixture
    assert answers is not None
    assert mixture.last_plan is not None
    slots = deal(mixture.last_plan, *mixture.ranks).tolist()
    asked = [answers.has_prompts(domain) for domain in mixture.last_plan.domain_ids.tolist()]
    numbers = np.cumsum(asked) - 1
    tokens = batch["input_ids"].cpu().numpy()
    places = [
        Place(domain=domain, shard=shard, row=row, slot=slot, tokens=own)
        for domain, (shard, row), slot, own in zip(
            batch["domain_ids"].tolist(), mixture.row_places.tolist(), slots, tokens, strict=True
        )
    ]
    steps = run.config.trainer.steps
    source = run.objective.decide(
        run.objective_state or {},
        step=step,
        steps=steps,
        uniform=uniform_of(run.config.seed, step),
        stored=len(answers.buffer),
    )
    return StepRows(
        batch=_without_padding(batch),
        places=places,
        num_prompts=sum(asked),
        prompt_numbers=[int(numbers[slot]) for slot in slots if asked[slot]],
        answers=answers,
        source=source,
        terms=terms,
        step=step,
        steps=steps,
        padding_id=answers.padding_id,
    )


def _without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns up to the last token that is predicted in any row: examples are shorter than rows."""
    used = (batch["labels"] != IGNORE).any(0).nonzero()[:, 0].tolist()
    width = max([1, *used]) + 1
    return {name: tensor[:, :width] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}


def _on(part: Part, device: torch.device) -> Part:
    return replace(part, batch={k: v.to(device, non_blocking=True) for k, v in part.batch.items()})


def _units(parts: Sequence[Part], name: str) -> Tensor:
    """What the parts of a name are normalised by on this rank: predicted tokens, or pairs."""
    counts = [
        torch.tensor(len(part.batch["labels"]) // 2)
        if part.in_pairs
        else predicted(part.batch["labels"]).sum()
        for part in parts
        if part.name == name
    ]
    return torch.stack(counts).sum() if counts else torch.tensor(0)


def _micro_batches(part: Part, most: int | None) -> Iterator[Mapping[str, Tensor]]:
    """The rows of a part, at most so many at a time; pairs stay together."""
    rows, together = len(part.batch["labels"]), 2 if part.in_pairs else 1
    numbers = torch.arange(rows).view(-1, together)
    count = -(-len(numbers) // max((most or rows) // together, 1))
    if count == 1:
        yield part.batch
        return
    for i in range(count):
        yield {name: tensor[numbers[i::count].flatten()] for name, tensor in part.batch.items()}


def _backward(run: Run, part: Part, micro: Mapping[str, Tensor], count: int) -> None:
    """Forward and backward of one micro-batch."""
    what, teacher = part.what, None
    of_responses = isinstance(what, OfResponses)
    if of_responses or any(term.loss.needs_teacher for term in what):
        teacher = run.teacher.signal(micro)
    if isinstance(what, PairStep):
        what = with_quality(what, micro.get("quality"))
    # the sum over ranks is what is wanted, and DDP takes the mean
    share = run.accelerator.num_processes / max(count, 1) if part.name else 0.0
    weight = share if of_responses else token_weights(micro, share)
    objective, values = run.student(micro["input_ids"], micro["labels"], weight, what, teacher)
    run.accelerator.backward(objective)
    if not part.name:
        return
    run.online.learn(micro, 1 / max(count, 1))
    row_of = predicted(micro["labels"]).nonzero()[:, 0]
    ids = micro["domain_ids"][::2] if part.in_pairs else micro["domain_ids"][row_of]
    weights = what.weights if of_responses else [term.weight for term in what]
    run.sums()[part.name].add(values, ids, weights)


def _refuse(run: Run, step: int, grad_norm: float, batch: dict[str, Tensor]) -> None:
    losses = run.window.close(run.reduce)
    bad = {k: v for k, v in losses.items() if v != v}
    last = latest_checkpoint(run.config.run_dir)
    names = [run.mixture.domains[i] for i in sorted(set(batch["domain_ids"].tolist()))]
    raise NumericsError(
        f"step {step + 1}: the gradient norm is {grad_norm} (losses that are not numbers: {bad or 'none'}; "
        f"domains of the batch: {names}). The step was not taken. Lower optimizer.lr or max_grad_norm; "
        f"{f'{last.name} can be resumed' if last else 'no checkpoint was written yet'}."
    )
