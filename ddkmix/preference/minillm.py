"""MiniLLM: the reverse KL of whole responses by policy gradient, as weights of losses that exist.

The gradient has two parts at every token of a sampled response: that of the reverse KL at this token, exact
over the vocabulary, and grad log q(y_t) times what the rest of the response earns. The second is
cross-entropy with a weight. So nothing here looks at logits: rewards, returns and weights are numbers, in
which no gradient flows, and `distillation_objective` makes both gradients in one pass, a chunk at a time.
Importing this module loads no torch.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ddkmix.losses import CrossEntropy, LossTerm, ReverseKL

__all__ = ["MiniLLM", "mixed_log_probs"]

_LEAST_VARIANCE = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniLLM:
    """Reverse KL by policy gradient (MiniLLM, arXiv 2306.08543): defaults are the paper's.

        grad L = -E_{y ~ p~} sum_t w_t (grad sum_v q_t(v) log(p_t(v) / q_t(v)) + R_{t+1} grad log q(y_t))
        p~ = a p + (1 - a) q,   w_t = q(y_t) / p~(y_t),   r_t = log p(y_t) - log q(y_t)
        R_{t+1} = mean of r_{t'} over t' > t;  0 at the last token

    p teacher, q student, all given the prompt and y_<t. Sampling from p~ keeps the student from samples on
    which both are confidently bad (reward hacking); w_t is the paper's single-step importance weight. It
    prints 1 / (T - t - 1) before a sum of T - t terms, which is 1 / 0 at the last but one token; we take
    the mean. A fixed sample's objective is no loss that one could watch: follow `reverse_kl`.

        log_q, log_p    (n,) of the sampled tokens, when they were sampled
        sampled         mixed_log_probs(log_q, log_p, minillm.teacher_share)
        advantages      minillm.advantages(log_q, log_p, mask), in rows, then of the n tokens
        token_weight    share of each token x minillm.token_weights(log_q now, sampled, advantages)
        distillation_objective(hidden, head, labels, token_weight, MiniLLM.terms, signal=...)

    Off by default, because the paper's formula has none of it, is what the authors' code (LMOps/minillm)
    does besides: discount 0.95; rewards divided by 0.5 and clipped at 100; own_step, which counts r_t in
    the return though the exact term has it already; whiten; ratio_clip 0.2; weigh_single_step false. Both
    add language modelling on text: `cross_entropy`, weight 1.
    """

    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """a: share of the teacher in the distribution that is sampled from."""
    length_normalize: bool = True
    """R is a mean over the tokens that are left. Without it a sum, under which short answers win."""
    single_step: bool = True
    """Take the reverse KL of each token exactly, and let R begin behind it (single-step decomposition)."""
    own_step: bool = False
    """Let R_t begin at its own token. Without `single_step` it must."""
    weigh_single_step: bool = True
    """Multiply the exact term by w_t too."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on rewards for each step that they are ahead."""
    reward_divisor: Annotated[float, Field(gt=0)] = 1.0
    """Divides rewards, in nats."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest reward of either sign after that, nats; None: no bound."""
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] | None = None
    """PPO's bound on w_t (arXiv 1707.06347): no pull where it has moved further than this share from 1 in
    the direction of the advantage; None: no bound."""
    whiten: bool = False
    """Shift and scale the advantages of a micro-batch's tokens to mean 0 and variance 1."""
    terms: ClassVar[tuple[LossTerm, ...]] = (
        LossTerm("reverse_kl", 1.0, ReverseKL()),
        LossTerm("cross_entropy", 1.0, CrossEntropy()),
    )
    """What `token_weights` weighs."""

    def __post_init__(self) -> None:
        """Refuse what would leave each token's own reward out."""
        if not (self.single_step or self.own_step):
            raise ValueError("without single_step the return must begin at its own token; set own_step: true")

    def advantages(self, log_q: Any, log_p: Any, mask: Any) -> Any:
        """R of every response token, without a gradient.

        Args:
            log_q: (B, T) the student's log-probabilities of the sampled tokens, nats.
            log_p: (B, T) the teacher's.
            mask: (B, T) bool, where the response's tokens are, one stretch in each row.

        Returns:
            (B, T) nats, 0 outside of responses.
        """
        import torch

        rewards = (log_p.detach() - log_q.detach()).masked_fill(~mask, 0.0) / self.reward_divisor
        if self.reward_clip is not None:
            rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
        returns, left = torch.zeros_like(rewards), torch.zeros_like(rewards)
        ahead, count = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
        for t in reversed(range(rewards.shape[1])):
            whole = rewards[:, t] + self.discount * ahead
            returns[:, t] = whole if self.own_step else ahead
            left[:, t] = count + mask[:, t] if self.own_step else count
            ahead, count = whole, count + mask[:, t]
        if self.length_normalize:
            returns = returns / left.clamp(min=1)
        if self.whiten:
            of_tokens = returns[mask]
            scale = (of_tokens.var(correction=0) + _LEAST_VARIANCE).rsqrt()
            returns = (returns - of_tokens.mean()) * scale
        return returns.masked_fill(~mask, 0.0)

    def token_weights(self, log_q: Any, sampled: Any, advantages: Any) -> Any:
        """Weight of each of `terms` at each token, without a gradient.

        Args:
            log_q: (n,) the student's log-probabilities now, nats; those of the sampling where that is fresh.
            sampled: (n,) log p~ of the sampled tokens, under which they were drawn, nats.
            advantages: (n,) as `advantages` gives them.

        Returns:
            (2, n): w_t for the exact reverse KL, and w_t R for the cross-entropy.
        """
        import torch

        ratio, advantages = (log_q.detach() - sampled.detach()).exp(), advantages.detach()
        of_kl = ratio if self.weigh_single_step else torch.ones_like(ratio)
        of_reward = ratio * advantages
        if self.ratio_clip is not None:
            moved = torch.where(advantages > 0, ratio - 1, 1 - ratio) > self.ratio_clip
            of_reward = of_reward.masked_fill(moved, 0.0)
        return torch.stack([of_kl if self.single_step else torch.zeros_like(ratio), of_reward])


def mixed_log_probs(log_q: Any, log_p: Any, teacher_share: float) -> Any:
    """log(a p + (1 - a) q), MiniLLM's teacher-mixed sampling (arXiv 2306.08543): of every class of the next
    token, to draw from, or of tokens that were drawn.

    Args:
        log_q: the student's log-probabilities, nats, of any shape.
        log_p: the teacher's.
        teacher_share: a, a share in [0, 1].

    Returns:
        Nats, of the same shape.
    """
    import torch

    assert 0 <= teacher_share <= 1, "a share"
    if teacher_share in (0, 1):
        return log_p if teacher_share else log_q
    return torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log1p(-teacher_share))
