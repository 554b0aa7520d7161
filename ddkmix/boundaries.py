"""Keeping the documents of a row apart: positions that restart, and proof that a model heeds them.

transformers makes block-diagonal attention from position ids that restart, if it gets no attention mask and
no cache. Whether it does depends on the architecture (in 5.23 Mamba, BLOOM and MPT swallow `position_ids`;
OPT, Falcon and GPT-OSS use them for positions and not for attention), on the attention kernel (flash
attention restarts only in batches of one row) and on versions, and nothing says so. So `check_isolation`
tries: a document must not change when the documents before it do.
"""

from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.errors import ModelError
from ddkmix.models import hidden_states

_NOISE = 8
"""How many times louder than rounding a change must be to count."""


def document_positions(input_ids: Int[Tensor, "B T"], separator_id: int | None) -> Int[Tensor, "B T"] | None:
    """The position of each token in its document's segment (see `segments`); None, which means a row from
    its beginning to its end, where no separator keeps documents apart."""
    if separator_id is None:
        return None
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = (input_ids == separator_id) | (index == 0)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


@torch.no_grad()
def check_isolation(model: nn.Module, separator_id: int) -> None:
    """Try whether a model keeps documents apart (a few small forward passes).

    Raises:
        ModelError: a document changes with the documents before it, or differs from itself alone.
    """
    was_training = model.training
    model.eval()
    try:
        change, noise, difference, rounding = _probe(model, separator_id)
    except TypeError as error:  # a forward without position_ids
        _refuse(model, " ".join(str(error).split())[:200])
    finally:
        model.train(was_training)
    if not change <= _NOISE * noise:
        _refuse(model, f"a hidden state changed by {change:.3g} with the documents before it")
    if not difference <= rounding:
        _refuse(
            model, f"a document's hidden states differ from those alone by {difference:.2g} of the largest"
        )


def _probe(model: nn.Module, separator_id: int) -> tuple[float, float, float, float]:
    """Change, noise, difference and rounding of the last document of a row.

    It may not change with the documents before it: same shapes and kernels, so even in bfloat16 a change of
    0 is to be had. Only where tokens of different rows meet, in a mixture of experts, is there noise: what
    changes with the *other row*, where no attention goes. Then it is compared with itself alone, in other
    shapes and therefore to rounding. Two rows with other boundaries, because some kernels look at one only.
    """
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    size = len(embedding)
    tokens = torch.arange(2 * 24, device=embedding.device).remainder(size).reshape(2, 24)
    tokens[tokens == separator_id] = (separator_id + 1) % size
    others = tokens.flip(0)
    last = ((0, slice(13, None)), (1, slice(15, None)))
    for begins, (row, part) in zip((7, 3), last, strict=True):
        others[row, part] = tokens[row, part]
        for rows in (tokens, others):
            rows[row, [begins, part.start]] = separator_id

    def states(rows: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return hidden_states(model, rows, document_positions(rows, separator_id))

    hidden, changed = states(tokens), states(others)
    other_row = states(torch.stack([tokens[0], others[1]]))
    alone = [hidden_states(model, tokens[place][None])[0] for place in last]
    return (
        max(_largest(hidden[place] - changed[place]) for place in last),
        _largest(hidden[0] - other_row[0]),
        max(_largest(hidden[p] - own) / _largest(own) for p, own in zip(last, alone, strict=True)),
        max(torch.finfo(dtype).eps for dtype in (hidden.dtype, torch.float32)) ** 0.5,
    )


def _largest(values: Float[Tensor, "..."]) -> float:
    return values.float().abs().max().item()


def _refuse(model: nn.Module, why: str) -> NoReturn:
    raise ModelError(
        f"trainer.document_boundaries = true, but {type(model).__name__} does not keep the documents of a "
        f"row apart: {why}. Set it to false, or use an architecture whose attention restarts with "
        "position_ids."
    )
