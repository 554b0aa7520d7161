"""Random logits in float64; what a store would keep of a teacher's comes from tools/show_bias.py."""

import sys

import torch

from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))

from show_bias import top

__all__ = ["random_pair", "top"]


def random_pair(seed=0, tokens=4, classes=6, spread=2.0):
    """Logits of student and teacher in float64; the student's is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        spread * torch.randn(tokens, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher
