"""What any causal language model predicts of a batch, from its logits: for models that are not ours."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddkmix.errors import ModelError
from ddkmix.evaluator import TokenNats, WithDivergence
from ddkmix.losses.forward_kl import ForwardKL
from ddkmix.predicted_tokens import predicted

_CHUNK_TOKENS = 1024
"""Tokens whose logits are turned into float32 at one time."""

Logits = Callable[[nn.Module, Tensor], Tensor]
"""(model, input_ids (B, T)) -> logits (B, T, V)."""


def token_nats_of(model: nn.Module, logits: Logits) -> TokenNats:
    """Cross-entropy of the predicted tokens of a batch, from a model's logits.

    Args:
        model: a causal language model.
        logits: how it is called.
    """
    predictions = _predictions(model, logits)

    @torch.no_grad()
    def nats(input_ids: Tensor, labels: Tensor) -> Tensor:
        chosen, targets = predictions(input_ids, labels)
        return torch.cat([_cross_entropy(*parts) for parts in _chunks(chosen, targets)])

    return nats


def divergence_of(model: nn.Module, teacher: nn.Module, logits: Logits) -> WithDivergence:
    """Cross-entropy and KL(teacher || student) at temperature 1, from the logits of both.

    Args:
        model: the student.
        teacher: read in its own precision, whatever autocast says.
        logits: how both are called.
    """
    own, theirs, kl = _predictions(model, logits), _predictions(teacher, logits), ForwardKL(temperature=1.0)

    @torch.no_grad()
    def values(_: str, input_ids: Tensor, labels: Tensor) -> Tensor:
        chosen, targets = own(input_ids, labels)
        with torch.autocast(input_ids.device.type, enabled=False):
            said = theirs(input_ids, labels)[0].to(chosen.device)
        if said.shape != chosen.shape:
            raise ModelError(
                f"the teacher has {said.shape[1]} classes and the student {chosen.shape[1]}; forward_kl is "
                "over classes that both have. Cut the longer: GapEvaluator(logits=lambda model, ids: "
                "model(ids).logits[..., :COUNT])."
            )
        parts = _chunks(chosen, targets, said)
        return torch.cat([_both(kl, *part) for part in parts], dim=1)

    return WithDivergence(values)


def _both(kl: ForwardKL, chosen: Tensor, targets: Tensor, said: Tensor) -> Tensor:
    divergence: Tensor = kl(chosen.float(), said.float(), targets)
    return torch.stack([_cross_entropy(chosen, targets), divergence])


def _predictions(model: nn.Module, logits_of: Logits) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(input_ids, labels) -> a model's logits (n, V) at the predicted tokens, and these (n,)."""
    device, classes = device_of(model), _embedded(model)

    def predictions(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        input_ids, labels = input_ids.to(device), labels.to(device)
        largest = int(torch.maximum(input_ids, labels).max())
        _check_vocabulary(model, largest, classes)  # before the forward pass: a GPU does not recover
        logits = logits_of(model, input_ids)
        if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
            raise ModelError(
                f"{type(model).__name__} gives logits {tuple(logits.shape)} for tokens "
                f"{tuple(input_ids.shape)}; they must be (B, T, V). Pass logits=... if it is called in "
                "another way."
            )
        _check_vocabulary(model, largest, logits.shape[2])
        where = predicted(labels)
        return logits[:, :-1][where], labels[:, 1:][where]

    return predictions


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few tokens of each at a time."""
    return zip(*(torch.split(tensor, _CHUNK_TOKENS) for tensor in tensors), strict=True)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits (B, T, V) of a model that is called with `input_ids` (B, T), as transformers models are.

    Raises:
        ModelError: it gives something else.
    """
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


def device_of(model: nn.Module) -> torch.device:
    """Where the first of a model's parameters is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module is as before afterwards, also those that were in it already."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
