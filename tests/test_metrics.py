"""The window of training losses: means by hand, over ranks, and across an interruption."""

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import RunError
from ddkmix.metrics import LossWindow

CPU = torch.device("cpu")
TERMS, DOMAINS = ("cross_entropy", "forward_kl"), ("code", "math", "prose")
WEIGHTS = (1.0, 0.2)


def alone(tensor):
    """The sum over the ranks of a run on one rank."""
    return tensor


def make_tokens(count, *, seed=0, domains=3):
    """(terms, n) float32 values and their (n,) domain ids."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 * torch.rand(2, count, generator=generator)
    return values, torch.randint(domains, (count,), generator=generator)


def filled(*batches):
    """A window that has been given these batches."""
    window = LossWindow(TERMS, DOMAINS, CPU)
    for values, domain_ids in batches:
        window.add(values, domain_ids, WEIGHTS)
    return window


def test_means_by_hand():
    """Two tokens of code and one of math: means over tokens, and the objective from the weighted terms."""
    values = torch.tensor([[1.0, 3.0, 8.0], [10.0, 20.0, 0.0]])
    record = filled((values, torch.tensor([0, 0, 1]))).close(alone)
    expected = {
        "train/objective": 1.0 * 4 + 0.2 * 10,
        "train/tokens": 3,
        "train/cross_entropy": 4.0,
        "train/cross_entropy/code": 2.0,
        "train/cross_entropy/math": 8.0,
        "train/forward_kl": 10.0,
        "train/forward_kl/code": 15.0,
        "train/forward_kl/math": 0.0,
    }
    assert expected == record


def test_the_objective_of_a_window_is_the_one_that_was_trained():
    """Weights that move within a window: one token at (1, 0), then two at (1/4, 3/4). With the last weights
    on the sums of all tokens it would be (5 x 1/4 + 6 x 3/4) / 3 = 1.92, and nobody trained that."""
    window = LossWindow(TERMS, DOMAINS, CPU)
    window.add(torch.tensor([[3.0], [4.0]]), torch.tensor([0]), (1.0, 0.0))
    window.add(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]), (0.25, 0.75))
    record = window.close(alone)
    assert (3.0 + 1.0 + 1.0) / 3 == pytest.approx(record["train/objective"])
    assert (5 / 3, 2.0) == pytest.approx((record["train/cross_entropy"], record["train/forward_kl"]))


def test_moving_weights_survive_a_checkpoint_within_the_window():
    """The sums that are saved know with which weights they were made."""
    whole, first, second = (LossWindow(TERMS, DOMAINS, CPU) for _ in range(3))
    for i, weights in enumerate([(1.0, 0.0), (0.5, 0.5), (0.1, 0.9)]):
        whole.add(*make_tokens(7, seed=i), weights)
        (first if i < 2 else second).add(*make_tokens(7, seed=i), weights)
        if i == 1:
            second.load_json(json.loads(json.dumps(first.to_json(alone))), is_main=True)
    assert whole.close(alone) == second.close(alone)


def test_sums_of_other_terms_are_refused():
    """A checkpoint of a version without the objective's own sum is not taken for one with it."""
    saved = filled(make_tokens(9)).to_json(alone)
    with pytest.raises(RunError, match=r"sums 3 losses where this run sums 4; another version of ddkmix"):
        filled().load_json(saved[:-1], is_main=True)


def test_a_domain_without_a_token_is_left_out():
    """No key says anything about prose, which had no token; the others keep theirs."""
    record = filled(make_tokens(50, domains=2)).close(alone)
    assert not any("prose" in key for key in record)
    assert {"train/cross_entropy/code", "train/forward_kl/math"} < set(record)


def test_every_token_counts_once_however_it_was_batched():
    """Means over tokens, not over batches of different size."""
    values, ids = make_tokens(60)
    batches = [(values[:, part], ids[part]) for part in (slice(0, 1), slice(1, 50), slice(50, 60))]
    assert filled((values, ids)).close(alone) == pytest.approx(filled(*batches).close(alone))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_means_equal_the_naive_ones(count, seed):
    """Against plain Python sums over all tokens."""
    values, ids = make_tokens(count, seed=seed)
    record = filled((values, ids)).close(alone)
    assert count == record["train/tokens"]
    for term, row in zip(TERMS, values.tolist(), strict=True):
        assert math.fsum(row) / count == pytest.approx(record[f"train/{term}"])
        for i, domain in enumerate(DOMAINS):
            own = [value for value, d in zip(row, ids.tolist(), strict=True) if d == i]
            if own:
                assert math.fsum(own) / len(own) == pytest.approx(record[f"train/{term}/{domain}"])
            else:
                assert f"train/{term}/{domain}" not in record


def test_closing_starts_anew():
    """The next line of the log knows nothing of the last one."""
    window = filled(make_tokens(9))
    window.close(alone)
    window.add(torch.tensor([[2.0], [4.0]]), torch.tensor([2]), WEIGHTS)
    record = window.close(alone)
    assert (1, 2.0, 4.0) == (
        record["train/tokens"],
        record["train/cross_entropy"],
        record["train/forward_kl"],
    )
    assert {"train/cross_entropy/prose", "train/forward_kl/prose"} == {k for k in record if k.count("/") == 2}


def test_an_empty_window_has_no_tokens_and_no_domains():
    """Nothing was predicted: zero tokens, zero losses, no division by zero."""
    record = LossWindow(TERMS, DOMAINS, CPU).close(alone)
    expected = {
        "train/objective": 0.0, "train/tokens": 0, "train/cross_entropy": 0.0, "train/forward_kl": 0.0
    }  # fmt: skip
    assert expected == record


def test_a_window_of_other_things_has_its_own_names():
    """Pairs by hand: a window beside `train`, whose keys cannot be mistaken for its."""
    window = LossWindow(("dpkd", "preferred"), DOMAINS, CPU, name="pairs", unit="pairs")
    values = torch.tensor([[0.5, 0.7, 0.9], [1.0, 0.0, 1.0]])
    window.add(values, torch.tensor([0, 0, 2]), (2.0, 0.0))
    expected = {
        "pairs/objective": 1.4,
        "pairs/pairs": 3,
        "pairs/dpkd": 0.7,
        "pairs/dpkd/code": 0.6,
        "pairs/dpkd/prose": 0.9,
        "pairs/preferred": 2 / 3,
        "pairs/preferred/code": 0.5,
        "pairs/preferred/prose": 1.0,
    }
    assert expected == pytest.approx(window.close(alone))


def test_a_window_without_a_term_counts_nothing():
    """`loss: []` beside an objective that stands alone."""
    window = LossWindow((), DOMAINS, CPU)
    assert {"train/objective": 0.0, "train/tokens": 0} == window.close(alone)
    window.load_json(window.to_json(alone), is_main=True)
    assert {"train/objective": 0.0, "train/tokens": 0} == window.close(alone)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 1000))
def test_a_window_split_by_a_checkpoint_is_the_unsplit_one_bit_for_bit(num_batches, cut, seed):
    """Sums saved as JSON and taken up again give the very record of a run that was never interrupted."""
    sizes = random.Random(seed)
    batches = [make_tokens(sizes.randint(1, 30), seed=seed + i) for i in range(num_batches)]
    before, after = batches[:cut], batches[cut:]
    saved = json.loads(json.dumps(filled(*before).to_json(alone)))
    resumed = LossWindow(TERMS, DOMAINS, CPU)
    resumed.load_json(saved, is_main=True)
    for values, ids in after:
        resumed.add(values, ids, WEIGHTS)
    assert filled(*batches).close(alone) == resumed.close(alone)


def test_a_checkpoint_leaves_the_window_as_it_is():
    """Saving in the middle of a window changes no later line."""
    window, same = filled(make_tokens(9)), filled(make_tokens(9))
    window.to_json(alone)
    assert same.close(alone) == window.close(alone)


def test_means_are_over_the_tokens_of_all_ranks():
    """Two ranks with different numbers of tokens report what one rank with all of them would."""
    first, second = make_tokens(10, seed=1), make_tokens(3, seed=2)
    other = torch.tensor(filled(second).to_json(alone), dtype=torch.float64)
    record = filled(first).close(lambda tensor: tensor + other)
    assert filled(first, second).close(alone) == pytest.approx(record)


def test_saved_sums_are_taken_up_by_one_rank_only():
    """The sums of a checkpoint are already over all ranks: the second rank must not add them again."""
    saved = filled(make_tokens(9)).to_json(alone)
    main, second = (LossWindow(TERMS, DOMAINS, CPU) for _ in range(2))
    main.load_json(saved, is_main=True)
    second.load_json(saved, is_main=False)
    assert saved == main.to_json(alone)
    assert 0.0 == sum(map(sum, second.to_json(alone)))


def test_a_million_small_losses_are_summed_without_drift():
    """Float32 values are added in float64: the mean of equal values is that value to 1e-12."""
    values = torch.full((2, 1_000_000), 0.1)
    record = filled((values, torch.zeros(1_000_000, dtype=torch.int64))).close(alone)
    assert values[0, 0].item() == pytest.approx(record["train/cross_entropy"], rel=1e-12)
