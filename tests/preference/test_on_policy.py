"""The schedules of data: GKD's share and DistiLLM's state machine, against its authors' lines."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import ConfigError, NumericsError
from ddkmix.plugins import build
from ddkmix.preference.on_policy import AdaptiveOffPolicy, OnPolicyShare

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100)
UNIFORM = st.floats(0, 1, exclude_max=True)


class Authors:
    """The lines of jongwooko/distillm's finetune.py; steps counted from 0 here."""

    def __init__(self, init_threshold, loss_eps, capacity, replay_ratio, first):
        self.adaptive_threshold, self.prev_avg_loss = init_threshold, first
        self.loss_eps, self.capacity, self.replay_ratio = loss_eps, capacity, replay_ratio

    def evaluate(self, curr_avg_loss):
        """After `eval_interval` steps."""
        if curr_avg_loss >= self.prev_avg_loss + self.loss_eps:
            self.adaptive_threshold += 0.1
            self.adaptive_threshold = min(self.adaptive_threshold, 1.0)
            self.prev_avg_loss = curr_avg_loss

    def choose(self, r, global_step, total_iters, buffer):
        """Which branch a step takes."""
        if self.replay_ratio == "constant":
            samp_threshold = self.adaptive_threshold * 0.5
        elif self.replay_ratio == "increasing":
            samp_threshold = self.adaptive_threshold * (global_step / total_iters)
        else:
            samp_threshold = self.adaptive_threshold * (1 - global_step / total_iters)
        if r < samp_threshold or (r < self.adaptive_threshold and buffer < self.capacity):
            return "generate"
        if r < self.adaptive_threshold:
            return "replay"
        return "dataset"


@SETTINGS
@given(
    events=st.lists(st.tuples(st.floats(0, 5), UNIFORM, st.integers(0, 12)), min_size=1, max_size=30),
    start=st.sampled_from([0.0, 0.2, 1.0]),
    fresh=st.sampled_from(["decreasing", "constant", "increasing"]),
)
def test_it_decides_as_the_authors_code(events, start, fresh):
    """Whatever the losses, the draws and the buffer; the state survives JSON at every step."""
    ours = AdaptiveOffPolicy(start=start, capacity=10, fresh=fresh)
    theirs = Authors(start, 0.1, 10, fresh, 2.0)
    state = ours.init(2.0)
    for step, (loss, uniform, stored) in enumerate(events):
        found = ours.decide(state, step=step, steps=len(events), uniform=uniform, stored=stored)
        assert theirs.choose(uniform, step, len(events), stored) == found
        theirs.evaluate(loss)
        state = json.loads(json.dumps(ours.update(state, loss)))
        assert (theirs.adaptive_threshold, theirs.prev_avg_loss) == (state["threshold"], state["last_loss"])


def test_phi_rises_only_with_the_loss_and_stops_at_1():
    """By 0.1 for a rise of 0.1 above the loss of the last rise; a lower loss between does not count."""
    policy, state, seen = AdaptiveOffPolicy(), AdaptiveOffPolicy().init(2.0), []
    for loss in (1.5, 2.05, 2.1, 2.15, 2.2):
        state = policy.update(state, loss)
        seen.append(round(state["threshold"], 1))
    assert [0.0, 0.0, 0.1, 0.1, 0.2] == seen
    for loss in range(3, 20):
        state = policy.update(state, float(loss))
    assert 1.0 == state["threshold"]


def test_decisions_by_hand():
    """phi = 0.4 at half of the run: fresh below 0.2, replay up to 0.4; fresh instead while there is room."""
    policy, state = AdaptiveOffPolicy(capacity=5), {"threshold": 0.4, "last_loss": 1.0}

    def decide(uniform, stored=5, step=50):
        return policy.decide(state, step=step, steps=100, uniform=uniform, stored=stored)

    assert ["generate", "replay", "dataset"] == [decide(u) for u in (0.19, 0.2, 0.4)]
    assert ["generate", "generate", "dataset"] == [decide(u, stored=4) for u in (0.19, 0.2, 0.4)]
    assert ["generate", "replay"] == [decide(0.39, step=step) for step in (0, 99)]


@SETTINGS
@given(start=st.floats(0, 1), step=st.integers(0, 99), stored=st.integers(0, 9))
def test_the_share_of_steps_off_the_data_is_phi(start, step, stored):
    """Over all draws; and nothing is replayed before the buffer is full."""
    policy = AdaptiveOffPolicy(start=start, capacity=10)
    state = policy.init(1.0)
    draws = [i / 200 for i in range(200)]
    taken = [policy.decide(state, step=step, steps=100, uniform=u, stored=stored) for u in draws]
    assert sum(u < start for u in draws) == taken.count("generate")
    assert 0 == taken.count("replay")
    full = [policy.decide(state, step=step, steps=100, uniform=u, stored=10) for u in draws]
    assert taken.count("dataset") == full.count("dataset")


def test_the_state_is_a_value():
    """`update` gives a new one, also where nothing changes."""
    policy = AdaptiveOffPolicy()
    first = policy.init(1.0)
    second = policy.update(first, 1.0)
    assert first == second and first is not second
    policy.update(first, 9.0)
    assert {"threshold": 0.0, "last_loss": 1.0} == first


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_one_line(loss):
    """A comparison with nan would silently never rise again."""
    policy = AdaptiveOffPolicy()
    with pytest.raises(
        NumericsError, match=r"the validation loss is (nan|inf); the share of student samples"
    ):
        policy.init(loss)
    with pytest.raises(NumericsError, match="the validation loss is"):
        policy.update(policy.init(1.0), loss)


@SETTINGS
@given(share=st.floats(0, 1), uniform=UNIFORM)
def test_a_fixed_share(share, uniform):
    """GKD: on its samples with probability lambda; never at 0, always at 1."""
    assert ("generate" if uniform < share else "dataset") == OnPolicyShare(share=share).decide(uniform)
    assert "dataset" == OnPolicyShare(share=0.0).decide(uniform)
    assert "generate" == OnPolicyShare(share=1.0).decide(uniform)


def test_wrong_settings_are_one_line():
    """As those of policies and losses."""
    with pytest.raises(ConfigError, match=r"data.share = 1.5: Input should be less than or equal to 1."):
        build({"name": "gkd", "share": 1.5}, {"gkd": OnPolicyShare}, where="data")
    with pytest.raises(ConfigError, match=r"data.fresh = 'linear': Input should be 'decreasing', 'constant'"):
        build({"name": "distillm", "fresh": "linear"}, {"distillm": AdaptiveOffPolicy}, where="data")
