"""What a truncated teacher signal does to the gradient of forward KL: its bias and its noise, as a table.

On a small vocabulary every expectation can be taken: signals without randomness have one gradient, for
those with random draws the mean over many is compared with the error that such a mean has by chance. Tests
(tests/losses/test_bias.py) hold each bias against its closed form, and enumerate every outcome of a few
draws.

    python tools/show_bias.py [--classes 1000] [--tokens 32] [--repeats 2000]
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddkmix.batch import TruncatedSignal
from ddkmix.losses import ForwardKL

TEMPERATURES = (0.5, 2.0, 4.0)
"""Temperatures other than 1 of which the signals know log Z."""
Maker = Callable[[Tensor, torch.Generator], TruncatedSignal]


def signal_of(teacher_logits: Tensor, ids: Tensor, log_probs: Tensor, **others: object) -> TruncatedSignal:
    """A signal with the scalars that a store keeps."""
    log_p = teacher_logits.log_softmax(-1)
    return TruncatedSignal(
        ids=ids,
        log_probs=log_probs,
        entropy=-(log_p.exp() * log_p).sum(-1),
        teacher_nats=torch.zeros(len(ids), dtype=log_p.dtype),
        log_z={t: (log_p / t).logsumexp(-1) for t in TEMPERATURES},
        **others,  # type: ignore[arg-type]
    )


def top(
    teacher_logits: Tensor, k: int, tail: str = "bucket", *, p: float = 1.0, unused: int = 0
) -> TruncatedSignal:
    """The smallest prefix of mass `p`, at most k classes, then `unused` places as a store leaves them."""
    kept = teacher_logits.log_softmax(-1).topk(k)
    mass_before = kept.values.exp().cumsum(-1) - kept.values.exp()
    left_out = mass_before >= p
    ids = torch.where(left_out, kept.indices[:, :1], kept.indices)
    log_probs = kept.values.masked_fill(left_out, -math.inf)
    ids = torch.cat([ids, ids[:, :1].expand(-1, unused)], dim=1)
    filler = log_probs.new_full((len(ids), unused), -math.inf)
    return signal_of(teacher_logits, ids, torch.cat([log_probs, filler], dim=1), tail=tail)


def from_counts(teacher_logits: Tensor, counts: Tensor, *, exact: int = 0) -> TruncatedSignal:
    """Draws outside the `exact` likeliest classes; `counts` says how often each class was drawn."""
    log_p = teacher_logits.log_softmax(-1)
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.topk(exact).indices, True)
    there = kept | (counts > 0)
    # every class has a place here, so those that were neither kept nor drawn are unused
    ids = torch.arange(log_p.shape[1]).expand_as(log_p)
    return signal_of(
        teacher_logits,
        torch.where(there, ids, there.double().argmax(-1, keepdim=True)),
        log_p.masked_fill(~there, -math.inf),
        draws=counts.long(),
        num_draws=int(counts[0].sum()),
        drawn_mass=log_p.exp().masked_fill(kept, 0.0).sum(-1),
    )


def counts_of(teacher_logits: Tensor, draws: int, generator: torch.Generator, *, exact: int = 0) -> Tensor:
    """How often each class comes in `draws` draws with replacement outside the `exact` likeliest ones."""
    p = teacher_logits.softmax(-1)
    outside = p.scatter(1, p.topk(exact).indices, 0.0)
    found = torch.multinomial(outside, draws, replacement=True, generator=generator)
    return torch.zeros_like(p).scatter_add(1, found, torch.ones_like(found, dtype=p.dtype))


def drawn(
    teacher_logits: Tensor, draws: int, generator: torch.Generator, *, exact: int = 0
) -> TruncatedSignal:
    """Random sampling (RS-KD, arXiv 2503.16870), beside `exact` classes that stand for themselves."""
    return from_counts(teacher_logits, counts_of(teacher_logits, draws, generator, exact=exact), exact=exact)


def renormalized_draws(teacher_logits: Tensor, counts: Tensor) -> TruncatedSignal:
    """Broken: the drawn classes with the teacher's probabilities scaled to 1, as Gemma 3's report has it."""
    log_p, there = teacher_logits.log_softmax(-1), counts > 0
    ids = torch.arange(log_p.shape[1]).expand_as(log_p)
    ids = torch.where(there, ids, there.double().argmax(-1, keepdim=True))
    return signal_of(teacher_logits, ids, log_p.masked_fill(~there, -math.inf), tail="renormalize")


def gradient(student_logits: Tensor, teacher: Tensor | TruncatedSignal, temperature: float = 1.0) -> Tensor:
    """(n, V) derivative of every token's forward KL by its logits."""
    leaf = student_logits.detach().requires_grad_()
    values = ForwardKL(temperature=temperature)(leaf, teacher, None)
    return torch.autograd.grad(values.sum(), leaf)[0]


FORMATS: dict[str, Maker] = {
    "top-16, bucket": lambda y, _: top(y, 16),
    "top-16, renormalize": lambda y, _: top(y, 16, "renormalize"),
    "top-16, drop": lambda y, _: top(y, 16, "drop"),
    "top-0.95-50, bucket": lambda y, _: top(y, 50, p=0.95),
    "top-0.95-50, renormalize (PD)": lambda y, _: top(y, 50, "renormalize", p=0.95),
    "16 draws (RS-KD)": lambda y, g: drawn(y, 16, g),
    "50 draws (RS-KD)": lambda y, g: drawn(y, 50, g),
    "top-8 and 8 draws": lambda y, g: drawn(y, 8, g, exact=8),
    "50 draws, renormalised (Gemma 3's text)": lambda y, g: renormalized_draws(y, counts_of(y, 50, g)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of one format, relative to the size of the dense gradient, root mean square over tokens."""

    bias: float
    """Distance of the mean gradient from the dense one."""
    chance: float
    """What `bias` would be by chance without any."""
    noise: float
    """Distance of a single gradient from its mean."""
    entries: float
    """Classes kept of a token, on average."""


def measure(make: Maker, student: Tensor, teacher: Tensor, *, repeats: int) -> Measured:
    """Bias and noise of a format; `repeats` signals of each token."""
    generator = torch.Generator().manual_seed(0)
    dense = gradient(student, teacher)
    sums = torch.zeros(3, len(student), dtype=student.dtype)  # |bias|^2, |noise|^2, entries
    for i in range(len(student)):
        z, y = student[i : i + 1].expand(repeats, -1), teacher[i : i + 1].expand(repeats, -1)
        signal = make(y, generator)
        each = gradient(z, signal)
        size, bias = dense[i].square().sum(), each.mean(0) - dense[i]
        sums[0, i] = bias.square().sum() / size
        sums[1, i] = (each - each.mean(0)).square().sum(-1).mean() / size
        sums[2, i] = (signal.log_probs > -math.inf).sum() / repeats
    bias, noise, entries = sums.mean(-1).tolist()
    chance = math.sqrt(noise / repeats)
    return Measured(bias=math.sqrt(bias), chance=chance, noise=math.sqrt(noise), entries=entries)


def example(classes: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher whose classes have Zipf's frequencies; float64."""
    generator = torch.Generator().manual_seed(seed)
    zipf = -torch.arange(1, classes + 1, dtype=torch.float64).log()

    def noise() -> Tensor:
        return torch.randn(tokens, classes, generator=generator, dtype=torch.float64)

    teacher = 1.2 * zipf + noise()
    return teacher + 0.5 * noise(), teacher


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    student, teacher = example(options.classes, options.tokens)
    print("| signal | entries a token | bias of the gradient | by chance | noise of one signal |")
    print("|---|---|---|---|---|")
    for name, make in FORMATS.items():
        random = "draws" in name
        found = measure(make, student, teacher, repeats=options.repeats if random else 1)
        chance, noise = (f"{found.chance:.3f}", f"{found.noise:.2f}") if random else ("0", "0")
        print(f"| {name} | {found.entries:.1f} | {found.bias:.3f} | {chance} | {noise} |", flush=True)


if __name__ == "__main__":
    main()
