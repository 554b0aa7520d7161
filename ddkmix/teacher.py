"""The teacher signal. Today one kind: a live model whose logits are made a few tokens at a time."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddkmix.batch import DenseSignal
from ddkmix.models import head_of, hidden_states


class LiveTeacher:
    """A frozen model that comments on batches."""

    def __init__(self, model: nn.Module, *, vocab_size: int | None = None) -> None:
        self.model = model
        self._head = head_of(model, vocab_size)

    @torch.no_grad()
    def signal(self, input_ids: Int[Tensor, "B T"]) -> DenseSignal:
        """What the teacher says about every position."""
        return DenseSignal(hidden=hidden_states(self.model, input_ids), head=self._head)
