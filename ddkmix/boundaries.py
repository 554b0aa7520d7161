"""Keeping the documents of a row apart: positions that restart, and proof that a model heeds them.

transformers makes block-diagonal attention from position ids that restart, if it gets no attention mask and
no cache. Whether it does depends on the architecture (Mamba, BLOOM and MPT swallow `position_ids`), on the
attention kernel (flash attention restarts only in batches of one row) and on versions, and nothing says so.
So `check_isolation` tries: a document must not change when the documents before it do.
"""

from typing import NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddkmix.errors import ModelError
from ddkmix.models import hidden_states

_LEAK = 0.02
"""Share of the change that an open row shows; a mixture of experts rounds otherwise in other company."""
_ROUNDING = 0.05
"""Share of the largest hidden state; bfloat16 sums in another order differ by 0.01 to 0.02."""


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
        changed, by_company, alone = _probe(model, separator_id)
    except TypeError as error:  # a forward without position_ids
        _refuse(model, f"({' '.join(str(error).split())[:200]})")
    finally:
        model.train(was_training)
    if not changed <= _LEAK * by_company:
        _refuse(
            model, f"(a document changes by {changed:.3g} with those before it, {by_company:.3g} if open)"
        )
    if not alone <= _ROUNDING:
        _refuse(model, f"(a document in a row differs by {alone:.1%} from the same one alone)")


def _probe(model: nn.Module, separator_id: int) -> tuple[float, float, float]:
    """How much the last document of a row changes with the others: kept apart, and in an open row; and how
    much it differs from itself alone, as a share of its largest hidden state.

    Two rows with other boundaries, because some kernels look at one row only. Same shapes and kernels before
    and after the change, so even in bfloat16 a dense model that keeps documents apart shows exactly 0.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = torch.arange(2 * 24, device=weight.device).remainder(len(weight)).reshape(2, 24)
    tokens[tokens == separator_id] = (separator_id + 1) % len(weight)
    others = tokens.flip(0)
    starts = ((7, 13), (3, 15))
    for row, (second, third) in enumerate(starts):
        others[row, third:] = tokens[row, third:]
        for rows in (tokens, others):
            rows[row, [second, third]] = separator_id
    positions = document_positions(tokens, separator_id)
    apart, changed = (hidden_states(model, rows, positions).float() for rows in (tokens, others))
    open_row, by_company = (hidden_states(model, rows).float() for rows in (tokens, others))
    last = [(row, slice(third, None)) for row, (_, third) in enumerate(starts)]
    own = [hidden_states(model, tokens[row, part][None])[0].float() for row, part in last]
    return (
        max((apart[at] - changed[at]).abs().max().item() for at in last),
        min((open_row[at] - by_company[at]).abs().max().item() for at in last),
        max(
            ((apart[at] - one).abs().max() / one.abs().max()).item()
            for at, one in zip(last, own, strict=True)
        ),
    )


def _refuse(model: nn.Module, why: str) -> NoReturn:
    raise ModelError(
        f"trainer.document_boundaries = true; {type(model).__name__} does not keep the documents of a row "
        f"apart {why}. Set it to false, or use an architecture whose attention restarts with position_ids."
    )
