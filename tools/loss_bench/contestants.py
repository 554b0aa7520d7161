"""One objective, CE + 0.2 KL(teacher || student) as the mean over tokens, as each contestant computes it.

Each takes a problem, runs forward and backward, and returns the loss; gradients are left on the problem.
TRL has no loss of both terms, so its divergence runs alone, which is less work than all others do.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

GAMMA, STUDENT_HIDDEN, TEACHER_HIDDEN = 0.2, 512, 768


@dataclass
class Problem:
    """Hidden states and output weights of student and teacher, and the next tokens."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another type."""
        return Problem(
            self.hidden.detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.teacher_hidden.to(dtype),
            self.teacher_weight.to(dtype),
            self.labels,
        )


def make_problem(vocab: int, tokens: int, dtype: torch.dtype) -> Problem:
    """Random, with logits whose standard deviation is 2 for the student and 3 for the teacher."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(dtype)

    return Problem(
        random(tokens, STUDENT_HIDDEN, 1.0).requires_grad_(),
        random(vocab, STUDENT_HIDDEN, 2.0 / STUDENT_HIDDEN**0.5).requires_grad_(),
        random(tokens, TEACHER_HIDDEN, 1.0),
        random(vocab, TEACHER_HIDDEN, 3.0 / TEACHER_HIDDEN**0.5),
        torch.randint(vocab, (tokens,), generator=generator),
    )


def ours(problem: Problem) -> Tensor:
    """This package."""
    from ddkmix.batch import DenseSignal, Head
    from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
    from ddkmix.losses.objective import distillation_objective

    tokens = len(problem.labels)
    objective, _ = distillation_objective(
        problem.hidden,
        Head(weight=problem.weight),
        problem.labels,
        torch.full((tokens,), 1 / tokens),
        (LossTerm("cross_entropy", 1.0, CrossEntropy()), LossTerm("forward_kl", GAMMA, ForwardKL())),
        signal=DenseSignal(hidden=problem.teacher_hidden, head=Head(weight=problem.teacher_weight)),
    )
    objective.backward()  # type: ignore[no-untyped-call]
    return objective.detach()


def naive(problem: Problem) -> Tensor:
    """Whole logits and torch's own losses, as one would write it."""
    student = (problem.hidden @ problem.weight.T).float()
    with torch.no_grad():
        teacher = (problem.teacher_hidden @ problem.teacher_weight.T).float()
    divergence = F.kl_div(
        F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean"
    )
    loss = F.cross_entropy(student, problem.labels) + GAMMA * divergence
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def liger(problem: Problem) -> Tensor:
    """liger-kernel's chunked JSD at beta 0, with its chunks of 1024 tokens, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=GAMMA, beta=0.0, compiled=False, chunk_size=1024
    )
    loss = function(
        problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, problem.labels
    )
    loss.backward()
    result: Tensor = loss.detach()
    return result


def trl(problem: Problem) -> Tensor:
    """TRL's tiles, the divergence alone."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(
        problem.hidden, problem.weight, None, problem.teacher_hidden, problem.teacher_weight, None, 0.0
    )
    loss = GAMMA * values.mean()
    loss.backward()
    return loss.detach()


def torchtune(problem: Problem) -> Tensor:
    """Its chunked losses over the eight chunks of logits that its recipe hands them."""
    losses, cross_entropy = _of_torchtune("kd_losses"), _of_torchtune("ce_chunked_output_loss")
    student = [chunk @ problem.weight.T for chunk in problem.hidden[None].chunk(8, dim=1)]
    with torch.no_grad():
        teacher = [chunk @ problem.teacher_weight.T for chunk in problem.teacher_hidden[None].chunk(8, dim=1)]
    labels = problem.labels[None]
    loss = cross_entropy.CEWithChunkedOutputLoss()(student, labels)
    loss = loss + GAMMA * losses.ForwardKLWithChunkedOutputLoss()(student, teacher, labels)
    loss.backward()
    result: Tensor = loss.detach()
    return result


def _of_torchtune(name: str) -> ModuleType:
    """A file of its losses by itself: the package imports much that no loss needs."""
    if name not in sys.modules:
        found = importlib.util.find_spec("torchtune")  # finds it without importing it
        assert found is not None and found.origin is not None
        path = Path(found.origin).parent / "modules" / "loss" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


CONTESTANTS: dict[str, Callable[[Problem], Tensor]] = {
    "ddkmix": ours,
    "naive": naive,
    "liger": liger,
    "trl": trl,
    "torchtune": torchtune,
}
