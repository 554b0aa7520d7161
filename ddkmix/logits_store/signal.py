"""A row's columns <-> the teacher's signal."""

from collections.abc import Sequence

import numpy as np
import torch

from ddkmix.batch import TruncatedSignal
from ddkmix.logits_store.codec import TokenColumns


def columns_of(signal: TruncatedSignal) -> TokenColumns:
    """What a record keeps of the signal of n tokens."""
    used = signal.log_probs > -torch.inf
    drawn = used & (signal.draws > 0) if signal.draws is not None else torch.zeros_like(used)
    exact = used & ~drawn
    mass = torch.where(exact, signal.log_probs.double().exp(), 0.0).sum(1)
    # what draws were made from was summed up by itself, and is not rounded away beside the mass kept
    outside = (1.0 - mass).clamp(min=0.0) if signal.drawn_mass is None else signal.drawn_mass
    return TokenColumns(
        counts=exact.sum(1).cpu().numpy(),
        drawn_counts=drawn.sum(1).cpu().numpy(),
        teacher_nats=signal.teacher_nats.cpu().numpy(),
        entropy=signal.entropy.cpu().numpy(),
        outside=outside.cpu().numpy(),
        log_z={t: values.cpu().numpy() for t, values in signal.log_z.items()},
        ids=signal.ids[used].cpu().numpy(),
        log_probs=signal.log_probs[used].cpu().numpy(),
        draws=np.zeros(0, dtype=np.int64) if signal.draws is None else signal.draws[drawn].cpu().numpy(),
    )


def signal_of(columns: Sequence[TokenColumns], seq_len: int, num_draws: int) -> TruncatedSignal:
    """Rows put into tensors of one shape (B, T), K being the most entries of a token.

    Args:
        columns: of each row.
        seq_len: T.
        num_draws: draws for each token; 0 where nothing is drawn.
    """
    lengths = [len(row.counts) for row in columns]
    where = np.concatenate([i * seq_len + np.arange(n) for i, n in enumerate(lengths)])
    counts = np.concatenate([row.counts for row in columns])
    sizes = counts + np.concatenate([row.drawn_counts for row in columns])
    width = max(int(sizes.max(initial=1)), 1)
    total = len(columns) * seq_len
    token = np.repeat(where, sizes)
    place = np.arange(len(token)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ids = np.zeros((total, width), dtype=np.int64)
    log_probs = np.full((total, width), -np.inf, dtype=np.float32)
    log_probs[:, 0] = 0.0  # nothing predicted: one class that is certain
    ids[token, place] = np.concatenate([row.ids for row in columns])
    log_probs[token, place] = np.concatenate([row.log_probs for row in columns])
    np.copyto(ids, ids[:, :1], where=log_probs == -np.inf)

    def spread(values: Sequence[np.ndarray]) -> torch.Tensor:
        full = np.zeros(total, dtype=np.float32)
        full[where] = np.concatenate(values)
        return torch.from_numpy(full.reshape(len(columns), seq_len))

    def shaped(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.reshape(len(columns), seq_len, width))

    temperatures = set.intersection(*(set(row.log_z) for row in columns))
    draws = None
    if num_draws:
        drawn = np.zeros((total, width), dtype=np.int64)
        is_drawn = place >= np.repeat(counts, sizes)
        drawn[token[is_drawn], place[is_drawn]] = np.concatenate([row.draws for row in columns])
        draws = shaped(drawn)
    return TruncatedSignal(
        ids=shaped(ids),
        log_probs=shaped(log_probs),
        entropy=spread([row.entropy for row in columns]),
        teacher_nats=spread([row.teacher_nats for row in columns]),
        log_z={t: spread([row.log_z[t] for row in columns]) for t in temperatures},
        draws=draws,
        num_draws=num_draws,
        drawn_mass=None if draws is None else spread([row.outside for row in columns]),
    )
