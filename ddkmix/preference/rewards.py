"""What to watch while a student learns from pairs: DPKD is content when the wrong likelihood falls.

Its loss knows a difference alone, so it can be lowered without end by making the student's own responses
unlikely, and with them whatever shares their tokens. DistiLLM-2 (arXiv 2503.07067) reports a student of
DPKD at 91 nats a response of its own where the teacher's cost it 20. `rejected_log_prob` shows it; the margin
and the share of preferred pairs do not, they look their best. Language modelling on text (`cross_entropy`)
ends it, because text needs the classes that rejected responses used; on the chosen responses alone
(`dpkd.ChosenNLL`) it keeps those likely and slows the fall of the others.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.preference.contrast import log_likelihood, log_ratio
from ddkmix.preference.scores import ResponseScores

__all__ = ["PAIR_MEASURES", "pair_measures"]

PAIR_MEASURES = (
    "chosen_log_prob",
    "rejected_log_prob",
    "chosen_reward",
    "rejected_reward",
    "reward_margin",
    "preferred",
)
"""Names of the rows of `pair_measures`."""


@torch.no_grad()
def pair_measures(
    chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 1.0, length_normalize: bool = True
) -> Float[Tensor, "measures B"]:
    """What `PAIR_MEASURES` names, of each pair, without a gradient; `LossWindow` sums them by domain.

    Log-probabilities are the student's, nats per token. A reward is beta (log q - log p), DPO's implicit one
    with the teacher as the reference; `reward_margin` is chosen less rejected, `preferred` 1 where that is
    above 0: its mean is the share of pairs in which the student leans to the teacher's response.

    Args:
        chosen: of B preferred responses.
        rejected: of the others.
        beta: factor on rewards, that of the objective.
        length_normalize: rewards per token, as in the objective, or sums over responses.
    """
    likelihoods = [log_likelihood(side, length_normalize=True) for side in (chosen, rejected)]
    ahead, behind = (beta * log_ratio(side, length_normalize=length_normalize) for side in (chosen, rejected))
    margin = ahead - behind
    return torch.stack([*likelihoods, ahead, behind, margin, (margin > 0).to(margin.dtype)])
