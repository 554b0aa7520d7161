"""The objective inside the student's forward pass, against the models' own full logits."""

import pytest
import torch
from torch.nn import functional as F

from ddkmix.batch import DenseSignal, Head, RoutedSignal
from ddkmix.config import Named, Student, Teacher
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ModelError
from ddkmix.hub import common_vocab
from ddkmix.losses import build_terms
from ddkmix.models import build_student, load_model, load_teacher
from ddkmix.predicted_tokens import predicted
from ddkmix.teacher import LiveTeacher
from tests.conftest import save_tiny_model

GAMMA, IGNORE = 0.2, -100
TERMS = build_terms(
    [
        Named.model_validate({"name": "cross_entropy", "weight": 1.0}),
        Named.model_validate({"name": "forward_kl", "weight": GAMMA}),
    ]
)
CROSS_ENTROPY = TERMS[:1]
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture
def teacher(tiny_teacher):
    """The frozen teacher in float32."""
    return load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))


@pytest.fixture
def student(tiny_teacher):
    """The teacher's second layer."""
    return build_student(Student(init="prune", layers=(1,)), Teacher(model=str(tiny_teacher)), seed=0)


def make_batch(lengths=(8, 5, 2), seq_len=8, seed=0):
    """Rows of random tokens; labels end where the text ends."""
    ids = torch.randint(300, (len(lengths), seq_len), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE
    return ids, labels


def literal(student, teacher, ids, labels, vocab_size=None):
    """CE + 0.2 KL(teacher || student), mean over predicted tokens, from full logits; and the values."""
    z = student(ids).logits[..., :vocab_size].double()
    with torch.no_grad():
        y = teacher(ids).logits[..., :vocab_size].double()
    cross_entropies, divergences = [], []
    for row in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            if labels[row, t + 1] != IGNORE:
                log_q, log_p = torch.log_softmax(z[row, t], 0), torch.log_softmax(y[row, t], 0)
                cross_entropies.append(-log_q[labels[row, t + 1]])
                divergences.append((log_p.exp() * (log_p - log_q)).sum())
    values = torch.stack([torch.stack(cross_entropies), torch.stack(divergences)])
    return (values[0] + GAMMA * values[1]).mean(), values.detach()


def ours(student, teacher, ids, labels, **options):
    """Objective and values of the DistillationModel, normalised by the number of predicted tokens."""
    vocab_size = options.get("vocab_size")
    model = DistillationModel(student, **{"chunk_tokens": 4, **options})
    signal = LiveTeacher(teacher, vocab_size=vocab_size).signal({"input_ids": ids})
    return model(ids, labels, 1 / int(predicted(labels).sum()), TERMS, signal)


def test_the_objective_is_the_literal_one(student, teacher):
    """Value of the objective and of each term at each token, in row order."""
    batch = make_batch()
    expected, expected_values = literal(student, teacher, *batch)
    objective, values = ours(student, teacher, *batch)
    assert (2, 7 + 4 + 1) == values.shape
    assert expected.item() == pytest.approx(objective.item(), rel=1e-5)
    torch.testing.assert_close(expected_values, values.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [None, 300])
def test_the_gradients_are_the_literal_ones(student, teacher, vocab_size):
    """Every parameter of the student, tied embeddings included, with and without padding classes cut."""
    batch = make_batch()
    literal(student, teacher, *batch, vocab_size=vocab_size)[0].backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    ours(student, teacher, *batch, vocab_size=vocab_size)[0].backward()
    assert len(expected) > 5
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(expected[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_objective_without_the_divergence_would_be_noticed(student, teacher):
    """The comparison can fail: gamma = 0 is further from the literal objective than its tolerance."""
    batch = make_batch()
    expected, values = literal(student, teacher, *batch)
    assert expected.item() != pytest.approx(values[0].mean().item(), rel=1e-3)


def test_a_student_with_another_vocabulary_padding_learns_from_the_shared_classes(
    teacher, tmp_path, tokenizer_folder
):
    """320 classes in the teacher, 308 in the student, 300 tokens: both are cut to what both have."""
    other = save_tiny_model(tmp_path / "other", tokenizer_folder, seed=1, vocab_size=308)
    config = Student(init="load", model=str(other))
    student = build_student(config, Teacher(model="unused"), seed=0)
    batch = make_batch()
    expected, _ = literal(student, teacher, *batch, vocab_size=308)
    objective, _ = ours(student, teacher, *batch, vocab_size=308)
    assert expected.item() == pytest.approx(objective.item(), rel=1e-5)


def test_a_token_is_predicted_by_the_state_before_it():
    """Position t is valid where label t + 1 is text; the first label predicts nothing."""
    labels = torch.tensor([[5, 6, IGNORE, IGNORE], [IGNORE, 7, IGNORE, 8], [1, IGNORE, IGNORE, IGNORE]])
    expected = [[True, False, False], [True, False, True], [False, False, False]]
    assert expected == predicted(labels).tolist()


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_the_chunk_size_changes_nothing(student, teacher, chunk_tokens):
    """Only memory depends on it."""
    batch = make_batch()
    expected, values = ours(student, teacher, *batch)
    objective, same = ours(student, teacher, *batch, chunk_tokens=chunk_tokens)
    assert expected.item() == pytest.approx(objective.item(), rel=1e-6)
    torch.testing.assert_close(values, same, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_token_does_not_depend_on_the_padding(student, teacher):
    """Whatever ids stand behind the text, and however much of them: values and gradients are the same."""
    short_ids, short_labels = make_batch((5, 3), seq_len=6)
    results = []
    for filler, width in ((0, 6), (299, 6), (7, 12)):
        ids = torch.full((2, width), filler)
        labels = torch.full((2, width), IGNORE)
        ids[:, :6], labels[:, :6] = short_ids, short_labels
        ids[labels == IGNORE] = filler
        student.zero_grad()
        objective, values = ours(student, teacher, ids, labels)
        objective.backward()
        results.append((values, [parameter.grad.clone() for parameter in student.parameters()]))
    for values, gradients in results[1:]:
        torch.testing.assert_close(results[0][0], values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[0][1], gradients, rtol=1e-3, atol=1e-6)


def test_text_before_a_token_does_matter(student, teacher):
    """The test above can fail: another token inside the text changes the losses after it."""
    ids, labels = make_batch((8,))
    other = ids.clone()
    other[0, 3] = (other[0, 3] + 1) % 300
    before, after = (ours(student, teacher, x, labels)[1][1] for x in (ids, other))
    torch.testing.assert_close(before[:3], after[:3], rtol=1e-5, atol=1e-5)
    assert (before[3:] - after[3:]).abs().min() > 1e-4


def test_rows_do_not_see_each_other(student, teacher):
    """A row has the same losses alone and in a batch."""
    ids, labels = make_batch((8, 8, 8))
    together = ours(student, teacher, ids, labels)[1].reshape(2, 3, 7)
    for row in range(3):
        alone = ours(student, teacher, ids[row : row + 1], labels[row : row + 1])[1]
        torch.testing.assert_close(together[:, row], alone, rtol=1e-5, atol=1e-5)


def test_the_weight_of_a_token_scales_the_objective(student, teacher):
    """A number or a tensor: the sum over tokens of weight x losses; values are not weighted."""
    ids, labels = make_batch()
    model, signal = DistillationModel(student), LiveTeacher(teacher).signal({"input_ids": ids})
    objective, values = model(ids, labels, 1.0, TERMS, signal)
    half, same = model(ids, labels, torch.tensor(0.5), TERMS, signal)
    assert objective.item() == pytest.approx(2 * half.item())
    assert (values[0] + GAMMA * values[1]).sum().item() == pytest.approx(objective.item(), rel=1e-5)
    assert torch.equal(values, same)


def test_without_a_divergence_no_teacher_is_needed(student):
    """Plain training is cross-entropy, as transformers computes it."""
    ids, labels = make_batch()
    objective, _ = DistillationModel(student)(ids, labels, 1 / 12, CROSS_ENTROPY)
    expected = student(ids, labels=labels).loss
    assert expected.item() == pytest.approx(objective.item(), rel=1e-5)


def test_a_batch_of_padding_alone_is_no_loss(student, teacher):
    """Nothing is predicted: objective 0, no values, and gradients of 0 that DDP can still reduce."""
    ids = torch.zeros(2, 8, dtype=torch.int64)
    labels = torch.full((2, 8), IGNORE)
    model = DistillationModel(student)
    objective, values = model(ids, labels, 1.0, TERMS, LiveTeacher(teacher).signal({"input_ids": ids}))
    objective.backward()
    assert (0.0, (2, 0)) == (objective.item(), tuple(values.shape))
    assert all(not parameter.grad.any() for parameter in student.parameters())


def test_only_the_student_is_trained(student, teacher):
    """The wrapped model has the student's parameters and no others; a step on them lowers the objective."""
    ids, labels = make_batch()
    model = DistillationModel(student)
    assert list(student.parameters()) == list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        objective, _ = model(ids, labels, 1 / 12, TERMS, LiveTeacher(teacher).signal({"input_ids": ids}))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        losses.append(objective.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


def test_a_teacher_distilled_into_itself_has_no_divergence(teacher):
    """Student and teacher are one model: every KL is 0."""
    ids, labels = make_batch()
    _, values = ours(teacher, teacher, ids, labels)
    assert values[1].abs().max() < 1e-6


def test_bfloat16_autocast_is_close_to_float32(student, teacher):
    """Mixed precision computes in bfloat16 and keeps losses in float32, within bfloat16's precision."""
    ids, labels = make_batch()
    expected, _ = ours(student, teacher, ids, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective, values = ours(student, teacher, ids, labels)
    objective.backward()
    assert (torch.float32, torch.float32) == (objective.dtype, values.dtype)
    assert {torch.float32} == {parameter.grad.dtype for parameter in student.parameters()}
    assert expected.item() == pytest.approx(objective.item(), rel=2e-2)
    assert expected.item() != objective.item()


def test_a_student_that_cannot_be_split_is_refused_when_it_is_wrapped(student):
    """Before training starts."""
    student.config.logit_scale = 0.5
    with pytest.raises(ModelError, match="logits that differ"):
        DistillationModel(student)


def test_gradient_checkpointing_changes_no_gradient(student, teacher):
    """Activations are recomputed in the backward pass; the result is the same."""
    batch = make_batch()
    ours(student, teacher, *batch)[0].backward()
    expected = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    student.activation_checkpointing_enable()
    ours(student, teacher, *batch)[0].backward()
    torch.testing.assert_close(expected, [parameter.grad for parameter in student.parameters()])


def test_the_literal_objective_of_one_token_by_hand(student, teacher):
    """A row of two tokens has one prediction: its cross-entropy is transformers' own."""
    ids, labels = make_batch((2,), seq_len=2)
    objective, values = ours(student, teacher, ids, labels)
    logits = student(ids).logits[0, 0]
    assert F.cross_entropy(logits, ids[0, 1]).item() == pytest.approx(values[0, 0].item(), rel=1e-5)
    assert (values[0, 0] + GAMMA * values[1, 0]).item() == pytest.approx(objective.item(), rel=1e-6)


@pytest.mark.parametrize(("own", "theirs"), [(308, 320), (320, 308), (300, 352), (352, 300)])
def test_padding_of_either_vocabulary_has_no_part(tmp_path, tokenizer_folder, own, theirs):
    """Whoever has more classes than the other: value and every gradient are literal for the shared ones, and
    no class behind them has mass or learns, whatever its weights are."""
    names = {"student": own, "teacher": theirs}
    student, teacher = (
        load_model(
            str(save_tiny_model(tmp_path / name, tokenizer_folder, seed=size, vocab_size=size, **UNTIED))
        )
        for name, size in names.items()
    )
    student, teacher, shared = (
        student.double(),
        teacher.double().eval().requires_grad_(False),
        min(own, theirs),
    )
    assert shared == common_vocab(names, 300)
    ids, labels = make_batch()
    expected, values = literal(student, teacher, ids, labels, vocab_size=shared)
    expected.backward()
    truth = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    for model in (student, teacher):  # padding that would take all the mass
        with torch.no_grad():
            model.get_output_embeddings().weight[shared:] = 1e3
    student.zero_grad()
    objective, actual = ours(student, teacher, ids, labels, vocab_size=shared)
    objective.backward()
    assert expected.item() == pytest.approx(objective.item(), rel=1e-6)
    torch.testing.assert_close(values, actual.double(), rtol=1e-6, atol=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(truth[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert not student.get_output_embeddings().weight.grad[shared:].any()


# --- a teacher for each row -------------------------------------------------------------------------


def random_signals():
    """What two teachers of different size say about five rows, in float64."""
    signals = []
    for size in (32, 16):
        generator = torch.Generator().manual_seed(size)
        hidden = torch.randn(5, 8, size, generator=generator, dtype=torch.float64)
        weight = torch.randn(320, size, generator=generator, dtype=torch.float64)
        signals.append(DenseSignal(hidden=hidden, head=Head(weight=weight)))
    return signals


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_each_row_is_compared_with_its_own_teacher(student, chunk_tokens):
    """Value of every token and gradient of every parameter, in float64: as row by row with its teacher."""
    student, (ids, labels), signals = student.double(), make_batch((8, 5, 2, 7, 8)), random_signals()
    model, rows = DistillationModel(student, chunk_tokens=chunk_tokens), ([1, 4], [0, 2, 3])
    expected = torch.zeros((), dtype=torch.float64)
    values = []
    for row in range(5):
        said = signals[0 if row in rows[0] else 1].at(slice(row, row + 1))
        objective, own = model(ids[row : row + 1], labels[row : row + 1], 0.1, TERMS, said)
        objective.backward()
        expected = expected + objective.detach()
        values.append(own)
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    routed = RoutedSignal(
        rows=tuple(torch.tensor(own) for own in rows),
        signals=tuple(said.at(own) for said, own in zip(signals, rows, strict=True)),
    )
    objective, actual = model(ids, labels, 0.1, TERMS, routed)
    objective.backward()
    assert expected.item() == pytest.approx(objective.item(), rel=1e-7)  # weights are float32
    torch.testing.assert_close(torch.cat(values, dim=1), actual, rtol=1e-9, atol=1e-12)
    for truth, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(truth, parameter.grad, rtol=1e-6, atol=1e-9)


def test_swapped_teachers_would_be_noticed(student):
    """The comparison can fail: the two signals differ at every token."""
    ids, labels = make_batch((8, 8))
    one, two = (said.at([0, 1]) for said in random_signals())
    model = DistillationModel(student.double())
    first, second = (model(ids, labels, 1.0, TERMS, said)[1][1] for said in (one, two))
    assert (first - second).abs().min() > 1e-3
