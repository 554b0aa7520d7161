"""Objectives of responses: which of two is preferred, and what the student's own samples teach.

A pair objective is a frozen dataclass whose fields are its parameters; called with what student and teacher
think of the chosen and the rejected response of each pair (`ResponseScores`), it gives the loss of each
pair. One family a file; those files load no torch when imported, so that `lint` can check a config at once.

What else the published methods are made of stands where it belonged already:

- `dpkd_token` is a loss of single tokens: `ddkmix.losses.DpkdToken`.
- `gkd` is `jsd` on data of which a share lambda are the student's samples: `on_policy.OnPolicyShare`.
- `distillm` is `skew_kl` or `skew_reverse_kl` with `on_policy.AdaptiveOffPolicy`; `distillm2` is both, each
  on its side of a pair, with the weights of `contrastive.ContrastiveSkew`.
- `minillm` is `reverse_kl` and `cross_entropy` with the weights of `minillm.MiniLLM` at each token.
- `seqkd` (arXiv 1606.07947) is `cross_entropy` on the teacher's responses: nothing but data.

Axis letters: B rows or pairs, T tokens in a row, n response tokens of all rows, V vocabulary.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

from ddkmix.preference.dpkd import ChosenNLL, Dpkd
from ddkmix.preference.plad import PladMargin, PladRanking
from ddkmix.preference.relatives import CPO, IPO, SimPO

__all__ = [
    "CPO",
    "IPO",
    "PAIR_LOSSES",
    "ChosenNLL",
    "Dpkd",
    "PairLoss",
    "PladMargin",
    "PladRanking",
    "SimPO",
]


@runtime_checkable
class PairLoss(Protocol):
    """What a pair objective must offer. Its tensors are torch's; their types are left open, as in losses."""

    needs_teacher: ClassVar[bool]
    """Whether it looks at the teacher's log-probabilities."""

    def __call__(self, chosen: Any, rejected: Any) -> Any:
        """The loss of each pair.

        Args:
            chosen: `ResponseScores` of B preferred responses; the result is differentiable in its `student`.
            rejected: `ResponseScores` of the other responses to the same prompts.

        Returns:
            (B,) float32, nats per pair. Normalising them is not its business.
        """
        ...


PAIR_LOSSES: dict[str, type] = {
    "dpkd": Dpkd,
    "chosen_nll": ChosenNLL,
    "plad_ranking": PladRanking,
    "plad_margin": PladMargin,
    "ipo": IPO,
    "cpo": CPO,
    "simpo": SimPO,
}
"""The pair objectives that a config can name."""
