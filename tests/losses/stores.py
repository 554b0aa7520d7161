"""Logits of random tokens in float64, and every kind of truncated signal made of a teacher's."""

import math

import torch

from ddkmix.batch import TruncatedSignal

TEMPERATURES = (0.5, 2.0, 4.0)
"""Temperatures other than 1 of which the signals know log Z."""


def random_pair(seed=0, tokens=4, classes=6, spread=2.0):
    """Logits of student and teacher in float64; the student's is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        spread * torch.randn(tokens, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def _signal(teacher_logits, ids, log_probs, **others):
    log_p = teacher_logits.log_softmax(-1)
    return TruncatedSignal(
        ids=ids,
        log_probs=log_probs,
        entropy=-(log_p.exp() * log_p).sum(-1),
        teacher_nats=torch.zeros(len(ids), dtype=log_p.dtype),
        log_z={t: (log_p / t).logsumexp(-1) for t in TEMPERATURES},
        **others,
    )


def top(teacher_logits, k, tail="bucket", *, unused=0):
    """The k likeliest classes of each token, then `unused` places as the store leaves them."""
    kept = teacher_logits.log_softmax(-1).topk(k)
    ids = torch.cat([kept.indices, kept.indices[:, :1].expand(-1, unused)], dim=1)
    filler = kept.values.new_full((len(ids), unused), -math.inf)
    return _signal(teacher_logits, ids, torch.cat([kept.values, filler], dim=1), tail=tail)


def drawn(teacher_logits, num_draws, generator, *, exact=0):
    """`num_draws` draws with replacement outside the `exact` likeliest classes, which stand for
    themselves."""
    log_p = teacher_logits.log_softmax(-1)
    kept = log_p.topk(exact).indices
    outside = log_p.exp().scatter(1, kept, 0.0)
    found = torch.multinomial(outside, num_draws, replacement=True, generator=generator)
    counts = torch.zeros_like(log_p).scatter_add(1, found, torch.ones_like(found, dtype=log_p.dtype))
    # every class has a place here: those that were neither kept nor drawn are left unused
    there = counts > 0
    there = there.scatter(1, kept, True)
    ids = torch.arange(log_p.shape[1]).expand_as(log_p)
    ids = torch.where(there, ids, there.double().argmax(-1, keepdim=True))
    return _signal(
        teacher_logits,
        ids,
        log_p.masked_fill(~there, -math.inf),
        draws=counts.long(),
        num_draws=num_draws,
        drawn_mass=outside.sum(-1),
    )
