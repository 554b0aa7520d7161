"""Objectives of whole responses inside the student's forward pass: pairs, policy gradients, moving skews.

Each is an `OfResponses` of `ddkmix.distillation`: given what student and teacher say about a batch, it makes
one number to be differentiated and the values to be watched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.losses import LossTerm
from ddkmix.predicted_tokens import ResponseBatch
from ddkmix.preference import PairLoss
from ddkmix.preference.contrastive import ContrastiveSkew
from ddkmix.preference.dpkd import ChosenNLL
from ddkmix.preference.minillm import MiniLLM, mixed_log_probs
from ddkmix.preference.rewards import PAIR_MEASURES, pair_measures
from ddkmix.preference.scores import ResponseScores, mean_per_row, response_log_probs, response_scores

__all__ = ["PairStep", "PolicyGradientStep", "SkewStep"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairStep:
    """A pair loss, and language modelling on the chosen responses; rows 2 i are chosen, 2 i + 1 rejected."""

    loss: PairLoss
    weight: float
    """Of the whole."""
    chosen_nll: float
    """Weight of `ChosenNLL`, beside the pair loss's 1."""
    quality: Float[Tensor, " B"] | None = None
    """Of each row's response, where the loss asks for it."""

    @property
    def weights(self) -> list[float]:
        """Of each value in the objective."""
        return [self.weight, self.weight * self.chosen_nll, *[0.0] * len(PAIR_MEASURES)]

    def __call__(
        self, batch: ResponseBatch, weight: float | Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "values B"]]:
        """The sum over pairs of weight x (pair loss + chosen_nll x NLL), and for each pair the names of
        `Pairs.windows`: loss, NLL, and the rows of `pair_measures`.

        Args:
            batch: rows of pairs.
            weight: share of each pair.

        Raises:
            DataError: a row has no response token.
        """
        student = _log_probs(batch)
        scores = response_scores(student, batch.teacher_log_probs(), batch.row_of, batch.num_rows)
        chosen, rejected = (self._side(scores, side) for side in (0, 1))
        preferred, likely = self.loss(chosen, rejected), ChosenNLL()(chosen, rejected)
        objective = (weight * self.weight * (preferred + self.chosen_nll * likely)).sum()
        # where there is no reference, beta is a factor on something else: a margin, which may be 0
        beta = getattr(self.loss, "beta", 1.0) if self.loss.needs_teacher else 1.0
        normalize = getattr(self.loss, "length_normalize", True)
        watched = pair_measures(chosen, rejected, beta=beta, length_normalize=normalize)
        return objective, torch.cat([preferred.detach()[None], likely.detach()[None], watched])

    def _side(self, scores: ResponseScores, side: int) -> ResponseScores:
        return ResponseScores(
            student=scores.student[side::2],
            teacher=scores.teacher[side::2],
            tokens=scores.tokens[side::2],
            quality=None if self.quality is None else self.quality[side::2],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyGradientStep:
    """MiniLLM's gradient on responses that were drawn with the student as it is."""

    minillm: MiniLLM
    weight: float
    """Of the whole."""

    @property
    def weights(self) -> list[float]:
        """Only the reverse KL is a loss that one can watch."""
        return [self.weight, 0.0, 0.0, 0.0]

    def __call__(
        self, batch: ResponseBatch, weight: float | Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "values n"]]:
        """What has MiniLLM's gradient, and at each token reverse KL, surprise, advantage and ratio w_t.

        Args:
            batch: rows of sampled responses.
            weight: share of each token.
        """
        with torch.no_grad():
            log_q = _log_probs(batch)
        log_p = batch.teacher_log_probs()
        sampled = mixed_log_probs(log_q, log_p, self.minillm.teacher_share)
        advantages = self.minillm.advantages(batch.in_rows(log_q), batch.in_rows(log_p), batch.where)
        of_tokens = advantages[batch.where]
        weights = self.minillm.token_weights(log_q, sampled, of_tokens) * self.weight * weight
        objective, values = batch.objective(self.minillm.terms, weights)
        return objective, torch.cat([values, of_tokens[None], (log_q - sampled).exp()[None]])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SkewStep:
    """One side of DistiLLM-2; a call of the loss for each skew that its rows have."""

    contrast: ContrastiveSkew
    of_teacher: bool
    """Whether the teacher wrote the responses; else the student did."""
    step: int
    steps: int
    weight: float
    """Of the whole."""

    @property
    def weights(self) -> list[float]:
        """Of each value in the objective."""
        return [self.weight * self._term(self.contrast.skew).weight, 0.0]

    def __call__(
        self, batch: ResponseBatch, weight: float | Tensor
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "values n"]]:
        """The sum over tokens of weight x divergence, and at each token divergence and skew.

        Args:
            batch: rows of responses of one side.
            weight: share of each token.
        """
        of_rows, row_of = self._skews(batch), batch.row_of
        shares = torch.as_tensor(weight, dtype=torch.float32, device=row_of.device).expand(len(row_of))
        total, values = batch.states.new_zeros((), dtype=torch.float32), torch.zeros_like(shares)
        for skew in sorted(set(of_rows)):
            own = torch.tensor([other == skew for other in of_rows], device=row_of.device)[row_of]
            part, of_own = batch.of(own).objective([self._term(skew)], shares[own] * self.weight)
            total = total + part
            values[own] = of_own[0].to(values.dtype)
        skews = torch.tensor(of_rows, dtype=values.dtype, device=row_of.device)
        return total, torch.stack([values, skews[row_of]])

    def _term(self, skew: float) -> LossTerm:
        terms = self.contrast.terms(step=self.step, steps=self.steps, skews=(skew, skew))
        return terms[0 if self.of_teacher else 1]

    def _skews(self, batch: ResponseBatch) -> Sequence[float]:
        if not self.contrast.moving_skew:
            return [self.contrast.skew] * batch.num_rows
        with torch.no_grad():
            log_q = _log_probs(batch)
        student, teacher = (
            mean_per_row(values, batch.row_of, batch.num_rows).exp().tolist()
            for values in (log_q, batch.teacher_log_probs())
        )
        own, other = (teacher, student) if self.of_teacher else (student, teacher)
        return self.contrast.skews(own, other)


def _log_probs(batch: ResponseBatch) -> Float[Tensor, " n"]:
    """The student's, of the predicted tokens."""
    return response_log_probs(
        batch.states,
        batch.head,
        batch.labels,
        chunk_tokens=batch.chunk_tokens,
        memory_mb=batch.memory_mb,
    )


def with_quality(step: PairStep, quality: Tensor | None) -> PairStep:
    """The same for a batch whose responses are graded.

    Args:
        step: for any batch.
        quality: (B,) of each row's response; None where the loss asks for none.
    """
    return replace(step, quality=quality)
