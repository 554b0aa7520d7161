"""Choosing a token: the stated distribution, the sets of transformers, one number a token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ddkmix.generation.sampling import Sampling, choose, truncated

DRAWS = 40_000


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    """Random numbers."""
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def logits_of(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Logits as a model has them, without ties."""
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers makes of logits."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    result: torch.Tensor = warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)
    return result


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(top_p=0.8),
    Sampling(temperature=0.9, top_k=8, top_p=0.7),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_frequencies_are_those_of_the_tempered_and_truncated_softmax(sampling: Sampling) -> None:
    """A chi-square test against the softmax of what transformers keeps; what it removes never comes."""
    logits = logits_of(1, 30, seed=3)
    probs = theirs(logits.double(), sampling).softmax(-1)[0].numpy()
    chosen = choose(logits.expand(DRAWS, -1), uniforms(DRAWS), sampling).numpy()
    counts = np.bincount(chosen, minlength=30)
    assert 0 == counts[probs == 0].sum()
    possible = probs > 0
    assert 1e-3 < chisquare(counts[possible], probs[possible] * DRAWS).pvalue


def test_another_temperature_would_be_noticed() -> None:
    """The chi-square test can fail."""
    logits = logits_of(1, 30, seed=3)
    counts = np.bincount(choose(logits.expand(DRAWS, -1), uniforms(DRAWS), Sampling()).numpy(), minlength=30)
    wrong = theirs(logits.double(), Sampling(temperature=1.1)).softmax(-1)[0].numpy()
    assert 1e-6 > chisquare(counts, wrong * DRAWS).pvalue


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3),
    st.one_of(st.none(), st.integers(1, 700)),
    st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)
def test_the_classes_that_stay_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    """With any settings, over a vocabulary that needs a second look for its nucleus; float64, so that no mass
    lies at the very edge."""
    logits = logits_of(3, 600, seed)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    expected, actual = theirs(logits.double(), sampling), truncated(logits, sampling)
    differ = (expected > -torch.inf) != (actual > -torch.inf)
    if (
        differ.any()
    ):  # float32 and float64 may see the edge differently: one class a row, of the mass at the edge
        assert differ.sum(-1).max() <= 1
    both = (expected > -torch.inf) & (actual > -torch.inf)
    torch.testing.assert_close(expected[both].float(), actual[both])
    assert (actual > -torch.inf).any(-1).all()


def test_the_order_is_temperature_then_k_then_p() -> None:
    """Masses 0.5, 0.3, 0.2: top_k 2 leaves 0.625 and 0.375, of which top_p 0.6 keeps one; p first would keep
    two. Temperature 0.5 squares them before: 0.735 and 0.265."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = truncated(logits, Sampling(top_k=2, top_p=0.6)) > -torch.inf
    assert [True, False, False] == kept[0].tolist()
    assert [True, True, False] == (truncated(logits, Sampling(top_p=0.6)) > -torch.inf)[0].tolist()
    both = truncated(logits, Sampling(top_k=2, top_p=0.7)) > -torch.inf
    assert [True, True, False] == both[0].tolist()
    cold = truncated(logits, Sampling(temperature=0.5, top_k=2, top_p=0.7)) > -torch.inf
    assert [True, False, False] == cold[0].tolist()


def test_ties_stay_together() -> None:
    """Equal logits at the edge are all kept, whatever their ids."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert [True, True, True, True, False] == (truncated(logits, Sampling(top_k=2)) > -torch.inf)[0].tolist()
    assert [True, True, True, True, False] == (truncated(logits, Sampling(top_p=0.6)) > -torch.inf)[
        0
    ].tolist()


def test_one_class_always_stays() -> None:
    """However small the share."""
    kept = truncated(logits_of(4, 9), Sampling(top_p=1e-9)) > -torch.inf
    assert [1, 1, 1, 1] == kept.sum(-1).tolist()


def test_at_temperature_0_the_likeliest_is_chosen_whatever_the_number() -> None:
    """Of equal ones the first."""
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    for number in (0.0, 0.5, 1 - 2**-53):
        both = torch.full((2,), number, dtype=torch.float64)
        assert [1, 0] == choose(logits, both, Sampling(temperature=0.0, top_k=1, top_p=0.1)).tolist()


def test_the_number_picks_by_the_distribution_function_in_the_order_of_ids() -> None:
    """Masses 0.2, 0, 0.5, 0.3: below 0.2 the first, from there to 0.7 the third, then the last."""
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, -1)
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert [0, 0, 2, 2, 3, 3] == choose(logits, numbers, Sampling()).tolist()


@pytest.mark.parametrize("sampling", SETTINGS)
def test_a_row_is_chosen_the_same_in_any_batch(sampling: Sampling) -> None:
    """Alone, among others, in any order."""
    logits, numbers = logits_of(23, 500), uniforms(23, seed=1)
    together = choose(logits, numbers, sampling)
    assert together.tolist() == [
        int(choose(logits[i : i + 1], numbers[i : i + 1], sampling)) for i in range(23)
    ]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert together[order].tolist() == choose(logits[order], numbers[order], sampling).tolist()


def test_rounding_of_logits_hardly_ever_changes_a_choice() -> None:
    """One number a token: of 20,000 tokens with errors of 1e-5 in every logit, a few change; with noise of
    its own for every class, or in the order of likelihood, it would not be more often right."""
    logits, numbers = logits_of(20_000, 50), uniforms(20_000)
    errors = 1e-5 * logits_of(20_000, 50, seed=9)
    changed = choose(logits, numbers, Sampling()) != choose(logits + errors, numbers, Sampling())
    assert changed.sum() <= 5
