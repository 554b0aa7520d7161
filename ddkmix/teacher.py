"""The teacher signal of a live model, whose logits are made a few tokens at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddkmix.batch import DenseSignal
from ddkmix.boundaries import check_isolation, document_positions
from ddkmix.models import head_of, hidden_states


class LiveTeacher:
    """A frozen model that comments on batches."""

    def __init__(
        self, model: nn.Module, *, vocab_size: int | None = None, separator_id: int | None = None
    ) -> None:
        """Documents of a row see each other unless there is a `separator_id` that keeps them apart."""
        self.model, self._separator_id = model, separator_id
        self._head = head_of(model, vocab_size)
        if separator_id is not None:
            check_isolation(model, separator_id)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor]) -> DenseSignal:
        """What the teacher says about every position of a batch's `input_ids` (B, T)."""
        input_ids = batch["input_ids"]
        positions = document_positions(input_ids, self._separator_id)
        return DenseSignal(hidden=hidden_states(self.model, input_ids, positions), head=self._head)
