"""Pairs of responses for tests, in float64."""

import torch

from ddkmix.preference.scores import ResponseScores


def scores(student, teacher=None, tokens=None, quality=None):
    """`ResponseScores` from plain numbers; the student's sums are a leaf."""

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    return ResponseScores(
        student=tensor(student).requires_grad_(),
        teacher=tensor([0.0] * len(student) if teacher is None else teacher),
        tokens=torch.tensor([1] * len(student) if tokens is None else tokens),
        quality=None if quality is None else tensor(quality),
    )


def random_sides(seed=0, pairs=6):
    """Chosen and rejected responses of 1 to 30 tokens, with sums that such lengths have."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        tokens = torch.randint(1, 31, (pairs,), generator=generator)
        student, teacher = (
            -3 * tokens * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        quality = torch.rand(pairs, generator=generator, dtype=torch.float64)
        sides.append(scores(student.tolist(), teacher.tolist(), tokens.tolist(), quality.tolist()))
    return sides
