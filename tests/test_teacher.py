"""The live teacher: what it says about a batch is what the model says."""

import pytest
import torch
from torch.nn import functional as F

from ddkmix.config import Teacher
from ddkmix.errors import ModelError
from ddkmix.models import load_teacher
from ddkmix.teacher import DomainTeachers, EnsembleTeacher, LiveTeacher, label_nats
from tests.conftest import save_tiny_model

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


# --- several teachers -------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path, tokenizer_folder):
    """A second model for the same tokens, of another size."""
    folder = save_tiny_model(
        tmp_path / "other", tokenizer_folder, seed=3, hidden_size=16, num_key_value_heads=4
    )
    return load_teacher(Teacher(model=str(folder), dtype="float32"))


def test_the_members_of_an_ensemble_read_the_same_rows(model, other):
    """Each says what it says alone; the weights go along."""
    teachers = LiveTeacher(model), LiveTeacher(other)
    signal = EnsembleTeacher(teachers, (0.25, 0.75)).signal({"input_ids": IDS})
    assert (0.25, 0.75) == signal.weights
    for teacher, member in zip(teachers, signal.members, strict=True):
        assert torch.equal(teacher.signal({"input_ids": IDS}).hidden, member.hidden)


def test_rows_go_to_the_teacher_of_their_domain(model, other):
    """Five rows of three domains: the teacher of domains 0 and 2 reads three of them, the other the rest."""
    ids = torch.arange(20).reshape(5, 4)
    teachers = LiveTeacher(model), LiveTeacher(other)
    batch = {"input_ids": ids, "domain_ids": torch.tensor([0, 1, 2, 1, 0])}
    signal = DomainTeachers(teachers, (0, 1, 0)).signal(batch)
    assert [[0, 2, 4], [1, 3]] == [rows.tolist() for rows in signal.rows]
    for teacher, rows, said in zip(teachers, signal.rows, signal.signals, strict=True):
        assert torch.equal(teacher.signal({"input_ids": ids[rows]}).hidden, said.hidden)


def test_a_teacher_without_a_row_in_the_batch_is_not_asked(model):
    """Only work that somebody wants is done."""
    silent = LiveTeacher(model)
    silent.model = None
    teachers = DomainTeachers((LiveTeacher(model), silent), (0, 1))
    signal = teachers.signal({"input_ids": IDS, "domain_ids": torch.tensor([0, 0])})
    assert [[0, 1]] == [rows.tolist() for rows in signal.rows]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
def test_a_teachers_own_loss_is_its_cross_entropy(model, chunk_tokens):
    """-log p(label) from whole logits."""
    said = LiveTeacher(model, vocab_size=308).signal({"input_ids": IDS}).at(0)
    with torch.no_grad():
        expected = F.cross_entropy(model(IDS).logits[0, :, :308], IDS[1], reduction="none")
    torch.testing.assert_close(expected, label_nats(said, IDS[1], chunk_tokens=chunk_tokens))


def test_the_loss_of_an_ensemble_is_that_of_the_geometric_mean(model, other):
    """p = p_1^w_1 p_2^w_2 / Z, written out."""
    weights = (0.3, 0.7)
    said = EnsembleTeacher((LiveTeacher(model), LiveTeacher(other)), weights).signal({"input_ids": IDS}).at(0)
    with torch.no_grad():
        first, second = (each(IDS).logits[0].double().softmax(-1) for each in (model, other))
    product = first ** weights[0] * second ** weights[1]
    expected = -(product / product.sum(-1, keepdim=True))[torch.arange(4), IDS[1]].log()
    torch.testing.assert_close(
        expected.float(), label_nats(said, IDS[1], chunk_tokens=3), rtol=1e-5, atol=1e-5
    )
