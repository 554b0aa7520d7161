"""How much each row of a step teaches: `selection: {name: confidence}` in the loop.

    nats of each row under teacher and student -> ConfidenceSelection.select -> batch["row_weights"]

Batches stay the planner's: a row of weight 0 was read and counts as served, it only teaches nothing, so that
shares, limits, resuming and the number of ranks are no business of a selection. Weights are scaled to a mean
of 1 over the predicted tokens of the global batch: the objective stays a mean over tokens, of those that
teach, and the learning rate means what it meant. Where every row of a batch has weight 0, its gradient is 0.

What it costs: one forward pass more of the student, without gradients and without dropout, and one more of a
live teacher, whose states of a whole step are not kept in memory until the backward passes want them. A
logits store is only read twice.
"""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddkmix.evaluator import TokenNats
from ddkmix.predicted_tokens import predicted, signal_nats
from ddkmix.ranks import current_rank, sum_over_ranks
from ddkmix.selection import ConfidenceSelection, Selection
from ddkmix.teacher import CHUNK_TOKENS, SignalSource


class RowWeights:
    """A run's selection with its state, which is a part of checkpoints."""

    def __init__(
        self,
        selection: ConfidenceSelection,
        domains: Sequence[str],
        *,
        student: nn.Module,
        nats: TokenNats,
        teacher: SignalSource,
        microbatch_rows: int | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        """`nats` is the loss of `student`; rows pass through both models `microbatch_rows` at a time."""
        self._selection, self._domains = selection, tuple(domains)
        self._student, self._nats, self._teacher = student, nats, teacher
        self._microbatch_rows, self._chunk_tokens = microbatch_rows, chunk_tokens or CHUNK_TOKENS
        self.state: dict[str, Any] = selection.init(len(domains))
        """JSON-able: thresholds, rows offered and kept."""

    def weigh(self, batch: dict[str, Tensor]) -> None:
        """Add `row_weights` (b,) to this rank's rows of a step; all ranks call it together.

        Args:
            batch: `input_ids` and `labels` (b, T), `domain_ids` (b,), and what the teacher wants.

        Raises:
            NumericsError: a loss is not finite; the state is as before.
        """
        own = self._measured(batch)
        (rank, world_size), count = current_rank(), own.shape[1]
        table = own.new_zeros((len(own), world_size * count))
        mine = slice(rank * count, (rank + 1) * count)
        table[:, mine] = own
        domains, tokens, teacher, student = sum_over_ranks(table).cpu().numpy()
        has = tokens > 0
        weights = 0.0 * tokens
        weights[has], self.state = self._selection.select(
            self.state,
            domains[has].astype("int64"),
            teacher[has] / tokens[has],
            student[has] / tokens[has],
        )
        total = fsum((weights * tokens).tolist())  # exact, so the same in any order of ranks
        if total > 0:
            weights *= tokens.sum() / total
        batch["row_weights"] = torch.from_numpy(weights[mine]).float().to(batch["labels"].device)

    def metrics(self) -> dict[str, float]:
        """Share of the rows of each domain that has taught so far, for domains that were served."""
        columns = zip(self._domains, self.state["kept"], self.state["offered"], strict=True)
        return {f"selection/kept/{name}": kept / offered for name, kept, offered in columns if offered}

    @torch.no_grad()
    def _measured(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "4 b"]:
        """Domain, predicted tokens, and nats under teacher and student of each row, float64."""
        labels = batch["labels"]
        found = torch.zeros((4, len(labels)), dtype=torch.float64, device=labels.device)
        found[0], found[1] = batch["domain_ids"], predicted(labels).sum(1)
        parts = -(-len(labels) // (self._microbatch_rows or len(labels)))
        was_training = self._student.training
        self._student.eval()
        try:
            for part in range(parts):
                micro = {name: tensor[part::parts] for name, tensor in batch.items()}
                row_of = predicted(micro["labels"]).nonzero()[:, 0]
                said = self._teacher.signal(micro)
                theirs = signal_nats(said, micro["labels"], chunk_tokens=self._chunk_tokens)
                own = self._nats(micro["input_ids"], micro["labels"])
                sums = found.new_zeros((2, len(micro["labels"])))
                found[2:, part::parts] = sums.index_add_(1, row_of, torch.stack([theirs, own]).double())
        finally:
            self._student.train(was_training)
        return found


def row_weights_of(selection: Selection | None, domains: Sequence[str], **parts: Any) -> RowWeights | None:
    """What weighs the rows of a run; None where nothing does. `parts` are those of `RowWeights`."""
    if not isinstance(selection, ConfidenceSelection):
        return None
    return RowWeights(selection, domains, **parts)


def token_weights(batch: Mapping[str, Tensor], share: float) -> float | Float[Tensor, " n"]:
    """What each predicted token counts in the objective: `share`, times the weight of its row if it has one.

    Args:
        batch: of one forward pass; n predicted tokens.
        share: of every token where rows weigh alike.
    """
    weights = batch.get("row_weights")
    if weights is None:
        return share
    tokens: Float[Tensor, " n"] = share * weights[predicted(batch["labels"]).nonzero()[:, 0]]
    return tokens
