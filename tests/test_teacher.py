"""The live teacher: what it says about a batch is what the model says."""

import pytest
import torch
from torch.nn import functional as F

from ddkmix.config import Teacher
from ddkmix.errors import ModelError
from ddkmix.models import load_teacher
from ddkmix.teacher import LiveTeacher

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture
def model(tiny_teacher):
    """A frozen teacher in float32."""
    return load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))


def test_the_signal_holds_the_models_own_logits(model):
    """Hidden states of every position and the head that makes the logits of any of them."""
    signal = LiveTeacher(model).signal({"input_ids": IDS})
    assert (2, 4, 32) == signal.hidden.shape
    logits = signal.head.finish(F.linear(signal.hidden[1], signal.head.weight, signal.head.bias))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits[1], logits)


def test_nothing_of_the_teacher_asks_for_a_gradient(model):
    """The signal is data: no graph of the teacher is kept."""
    signal = LiveTeacher(model).signal({"input_ids": IDS})
    assert not signal.hidden.requires_grad
    assert not signal.head.weight.requires_grad


def test_a_teacher_that_could_learn_says_the_same_without_a_graph(model):
    """Even with parameters that ask for gradients none is tracked."""
    expected = LiveTeacher(model).signal({"input_ids": IDS}).hidden
    actual = LiveTeacher(model.requires_grad_(True)).signal({"input_ids": IDS}).hidden
    assert not actual.requires_grad
    assert torch.equal(expected, actual)


def test_the_number_of_classes_is_that_of_both_models(model):
    """Where student and teacher pad their vocabularies differently, the signal is cut to what both have."""
    assert 300 == LiveTeacher(model, vocab_size=300).signal({"input_ids": IDS}).head.vocab_size


def test_the_same_tokens_always_get_the_same_signal(model):
    """Bit for bit: nothing random is left on in the teacher."""
    teacher = LiveTeacher(model)
    assert torch.equal(teacher.signal({"input_ids": IDS}).hidden, teacher.signal({"input_ids": IDS}).hidden)


def test_a_teacher_that_cannot_be_split_is_refused_at_once(model):
    """Before the first batch, not in the middle of a run."""
    model.config.logit_scale = 0.5
    with pytest.raises(ModelError, match="logits that differ"):
        LiveTeacher(model)
