"""LLKD's idea for rows of text: learn where the teacher is sure and the student is not.

OUR RECONSTRUCTION. LLKD (arXiv 2411.08028) classifies texts: it keeps a sample whose pseudo-label the teacher
gives with a confidence above a threshold of that class while the student's uncertainty is above another, and
weighs the loss with both. Its thresholds could not be read ("class-wise, dynamic"), and a row of tokens has
no label. Here a row's confidence is the teacher's mean probability of its tokens, exp(-teacher_loss); its
uncertainty is 1 - exp(-student_loss); domains are the classes; and thresholds are quantiles of what a domain
has offered, as running averages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from ddkmix.selection.checked import finite

__all__ = ["ConfidenceSelection"]

_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceSelection:
    """Rows that the teacher knows and the student does not (after LLKD, arXiv 2411.08028; see the module).

        keep row i of domain d if  c_i >= tau_c[d]  and  u_i >= tau_u[d]
        c = exp(-teacher_loss),  u = 1 - exp(-student_loss);  its weight is c u over the mean of those kept
        after each batch  tau[d] = decay tau[d] + (1 - decay) quantile of the batch's rows of d

    Thresholds are those from before the batch, so that a row's fate does not depend on its neighbours; what
    a domain offers first is kept whole and makes its first thresholds. Where a teacher is sure, students
    mostly are too: of losses that correlate with 0.8, quantiles of 1/4 let 49 % of rows pass, and of 1/2
    10 % (simulated).
    """

    confidence_quantile: _Share = 0.25
    """Share of a domain's rows of which the teacher is least sure, to be dropped; 0 drops none."""
    uncertainty_quantile: _Share = 0.25
    """Share of a domain's rows of which the student is surest, to be dropped; 0 drops none."""
    decay: _Share = 0.9
    """Share of the old threshold in the new one, for each batch with rows of the domain."""
    weigh: bool = True
    """Weigh the rows that are kept with c u, to a mean of 1; otherwise all alike."""

    def init(self, num_domains: int) -> dict[str, Any]:
        """The state before the first batch, JSON-able.

        Args:
            num_domains: domains of the mixture.
        """
        thresholds: dict[str, Any] = {name: [None] * num_domains for name in ("confidence", "uncertainty")}
        return {**thresholds, "offered": [0] * num_domains, "kept": [0] * num_domains}

    def select(
        self,
        state: Mapping[str, Any],
        domain_ids: Int[np.ndarray, " B"],
        teacher_loss: Float[np.ndarray, " B"],
        student_loss: Float[np.ndarray, " B"],
    ) -> tuple[Float[np.ndarray, " B"], dict[str, Any]]:
        """The weight of each row, 0 where it is dropped, and the state after the batch.

        Every weight may be 0: a batch in which nobody has anything to learn. The weights of a batch do not
        depend on the order of its rows, so ranks that gather losses agree.

        Args:
            state: what `init` or `select` gave.
            domain_ids: domain of each row, by its place in the mixture.
            teacher_loss: mean over the row's tokens, nats per token.
            student_loss: of the student now, nats per token.

        Raises:
            NumericsError: a loss is not finite.
        """
        confidence = np.exp(-finite("teacher_loss", teacher_loss))
        uncertainty = -np.expm1(-finite("student_loss", student_loss))
        kept = np.ones(len(domain_ids), dtype=np.bool_)
        after = {name: list(state[name]) for name in ("confidence", "uncertainty", "offered", "kept")}
        for domain in np.unique(domain_ids).tolist():
            own = domain_ids == domain
            for name, values, quantile in (
                ("confidence", confidence, self.confidence_quantile),
                ("uncertainty", uncertainty, self.uncertainty_quantile),
            ):
                threshold = state[name][domain]
                if threshold is not None and quantile > 0:
                    kept &= ~own | (values >= threshold)
                after[name][domain] = self._moved(threshold, float(np.quantile(values[own], quantile)))
            after["offered"][domain] += int(own.sum())
            after["kept"][domain] += int((own & kept).sum())
        return self._weights(kept, confidence * uncertainty), after

    def _moved(self, threshold: float | None, now: float) -> float:
        return now if threshold is None else self.decay * threshold + (1 - self.decay) * now

    def _weights(
        self, kept: Bool[np.ndarray, " B"], score: Float[np.ndarray, " B"]
    ) -> Float[np.ndarray, " B"]:
        total = np.sort(score[kept]).sum()  # sorted, so that the sum is the same in any order of rows
        if not self.weigh or total <= 0:
            return kept.astype(np.float64)
        weights: Float[np.ndarray, " B"] = np.where(kept, score * (int(kept.sum()) / total), 0.0)
        return weights
