"""Teacher signals of every kind for tests of losses, in float64."""

import math

import torch

from ddkmix.batch import TruncatedSignal

KINDS = ("dense", "bucket", "renormalize", "drop", "drawn")
"""What a loss can accept."""


def teacher_of(kind, logits, *, kept=4, temperatures=(1.0, 2.0), seed=0):
    """What a teacher with these (n, V) logits says: the logits themselves, or their `kept` best classes.

    Where more than two are kept, the last place of the first token is unused, as in a row of a store.
    `drawn` keeps one class for itself and spends 8 draws on the others.
    """
    if kind == "dense":
        return logits
    log_p = logits.log_softmax(-1)
    values, ids = log_p.sort(-1, descending=True)
    values, ids = values[:, :kept].clone(), ids[:, :kept].clone()
    if kept > 2 and len(ids):
        values[0, -1], ids[0, -1] = -math.inf, ids[0, 0]
    common = {
        "entropy": -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1),
        "teacher_nats": -log_p[:, 0],
        "log_z": {t: (log_p / t).logsumexp(-1) for t in temperatures if t != 1.0},
    }
    if kind != "drawn":
        return TruncatedSignal(ids=ids, log_probs=values, tail=kind, **common)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(1, 4, ids.shape, generator=generator)
    draws[:, 0] = 0
    draws[values == -math.inf] = 0
    mass = 1 - values[:, 0].exp()
    return TruncatedSignal(ids=ids, log_probs=values, draws=draws, num_draws=8, drawn_mass=mass, **common)
