"""A teacher that reads in tokens of its own: what it says about the student's rows."""

import math

import numpy as np
import pytest
import torch

from ddkmix.batch import CrossSignal
from ddkmix.config import Named, Student, Teacher, parse_config
from ddkmix.cross_vocabulary import CrossVocabularyTeacher
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.held_out import select_rows
from ddkmix.losses import build_terms
from ddkmix.models import build_student, load_teacher
from ddkmix.predicted_tokens import predicted
from ddkmix.preflight import check
from ddkmix.prepare import open_rows, store_cards
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import EOS, WORDS, documents

TERMS = build_terms(
    [Named.model_validate(term) for term in ({"name": "gold"}, {"name": "cross_entropy"}, {"name": "uld"})]
)


@pytest.fixture(scope="module")
def other(other_teacher):
    """A teacher with a byte-level tokenizer of its own."""
    return other_teacher


@pytest.fixture
def readers(tokenizer_folder, other):
    """The student's tokenizer and the teacher's."""
    return read_tokenizer(str(tokenizer_folder)), read_tokenizer(str(other))


@pytest.fixture
def teacher(readers, other):
    """The teacher, in float32."""
    model = load_teacher(Teacher(model=str(other), dtype="float32"))
    return CrossVocabularyTeacher(model, student=readers[0], teacher=readers[1])


@pytest.fixture
def student(tiny_teacher):
    """A small student of the first vocabulary."""
    return build_student(Student(init="prune", layers=(1,)), Teacher(model=str(tiny_teacher)), seed=0).eval()


@pytest.fixture
def batch(readers):
    """Three rows of text: two whole ones of two documents, cut anywhere, and one half full."""
    from tokenizers import Tokenizer

    tokenizer, separator = Tokenizer.from_file(str(readers[0].path)), readers[0].separator_id
    rows = []
    for i, domain in enumerate(WORDS):
        texts = documents(domain, 2, seed=i, words=12)
        rows.append([t for text in texts for t in [*tokenizer.encode(text).ids, separator]])
    rows = [rows[0][3:43], rows[1][:40], rows[2][-20:]]
    ids = torch.tensor([row + [separator] * (40 - len(row)) for row in rows])
    labels = ids.clone()
    labels[2, 20:] = -100
    return {"input_ids": ids, "labels": labels}


def text_of(folder, ids):
    """What tokens stand for, with "|" for the separator of either."""
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    return text.replace(EOS, "|").replace("</s>", "|")


def test_every_span_is_the_same_text_on_both_sides(teacher, batch, tokenizer_folder, other):
    """In rows of several documents and with padding, of predicted tokens only; most of the text is in one."""
    signal = teacher.signal(batch)
    assert isinstance(signal, CrossSignal)
    labels = batch["labels"][:, 1:][predicted(batch["labels"])]
    covered = 0
    for start, stop, their_start, their_stop in signal.spans.tolist():
        ours = text_of(tokenizer_folder, labels[start:stop].tolist())
        assert ours == text_of(other, signal.labels[their_start:their_stop].tolist())
        covered += stop - start
    assert covered > 0.8 * len(labels)
    assert (signal.spans[1:, 0] >= signal.spans[:-1, 1]).all()
    assert "|" in {text_of(tokenizer_folder, labels[a:b].tolist()) for a, b, _, _ in signal.spans.tolist()}


def test_the_teacher_says_what_it_says_to_its_own_tokens(teacher, batch, readers, other):
    """The states before each of its tokens are those of the row as it would read it."""
    from tokenizers import Tokenizer

    signal = teacher.signal({name: tensor[1:2] for name, tensor in batch.items()})
    own = Tokenizer.from_file(str(readers[0].path))
    text = own.decode(batch["input_ids"][1].tolist(), skip_special_tokens=False)
    encode = Tokenizer.from_file(str(other / "tokenizer.json")).encode
    parts = [encode(part).ids for part in text.split(EOS)]
    ids = [t for part in parts for t in [*part, readers[1].separator_id]][:-1]
    assert ids[1:] == signal.labels.tolist()
    model = load_teacher(Teacher(model=str(other), dtype="float32"))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, :-1]
    actual = signal.teacher.hidden @ signal.teacher.head.weight.T
    torch.testing.assert_close(expected, actual, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other(teacher, batch):
    """A row alone and in a batch of longer ones: the same spans and states, wherever they lie."""
    whole, alone = teacher.signal(batch), teacher.signal({name: t[2:] for name, t in batch.items()})
    spans = whole.spans[-len(alone.spans) :]
    assert (spans - spans[0] == alone.spans - alone.spans[0]).all()
    size = len(alone.labels)
    torch.testing.assert_close(whole.teacher.hidden[-size:], alone.teacher.hidden, rtol=1e-4, atol=1e-5)


def test_rows_with_a_prompt_are_refused(teacher, batch):
    """Their labels do not tell how long the text is, and the teacher has a chat template of its own."""
    labels = batch["labels"].clone()
    labels[1, :7] = -100
    with pytest.raises(DataError, match="a row's first labels are ignored, as those of a prompt are"):
        teacher.signal({**batch, "labels": labels})
    labels[1] = -100  # nothing is predicted: there is no such row, and nothing to say about it
    teacher.signal({**batch, "labels": labels})


def test_pairs_are_the_same_strings_and_the_separators(teacher, batch, tokenizer_folder, other):
    """All bytes are tokens of both; the ends of a document are one token, though their names differ."""
    pairs = teacher.signal(batch).pairs.tolist()
    texts = {(text_of(tokenizer_folder, [a]), text_of(other, [b])) for a, b in pairs}
    assert all(ours == theirs for ours, theirs in texts)
    assert ("|", "|") in texts
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 257


def test_what_lies_behind_the_teachers_last_position_is_not_compared(teacher, batch):
    """A teacher of 8 positions reads 8 tokens of each row, and spans end there."""
    whole = teacher.signal(batch)
    teacher._longest = 8
    short = teacher.signal(batch)
    assert 3 * 7 == len(short.labels)
    assert short.spans[:, 3].max() <= 21
    assert 0 < len(short.spans) < len(whole.spans)


def test_a_row_of_nothing_is_no_loss(teacher, student, batch):
    """Only padding: no span, an objective of 0."""
    empty = {"input_ids": batch["input_ids"][:1], "labels": torch.full((1, 40), -100)}
    signal = teacher.signal(empty)
    assert (0, 4) == signal.spans.shape
    objective, values = DistillationModel(student)(*empty.values(), 1.0, TERMS, signal)
    assert (0.0, (3, 0)) == (objective.item(), tuple(values.shape))


def test_the_objective_adds_what_both_kinds_of_losses_say(teacher, student, batch):
    """Cross-entropy of every token and the losses of spans, each in its line; gradients reach the student."""
    model, signal = DistillationModel(student, chunk_tokens=16), teacher.signal(batch)
    objective, values = model(*batch.values(), 0.01, TERMS, signal)
    plain, nats = model(*batch.values(), 0.01, TERMS[1:2], None)
    assert (3, 39 + 39 + 19) == values.shape
    torch.testing.assert_close(nats[0], values[1])
    assert objective.item() == pytest.approx(0.01 * values.sum().item(), rel=1e-5)
    starts = signal.spans[:, 0].tolist()
    assert starts == values[2].nonzero()[:, 0].tolist()
    assert 0 < values[2].max() <= 2
    objective.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert plain.item() < objective.item()


def test_a_student_learns_from_a_teacher_it_shares_no_token_ids_with(teacher, student, batch):
    """Steps on GOLD alone lower it."""
    model, signal = DistillationModel(student), teacher.signal(batch)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    losses = []
    for _ in range(6):
        objective, _ = model(*batch.values(), 1 / 97, TERMS[:1], signal)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        losses.append(objective.item())
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert np.argmin(losses) > 0


# --- a whole run ------------------------------------------------------------------------------------


@pytest.fixture
def tree(tiny_config, tiny_teacher, other, tmp_path):
    """A run whose student has the small tokenizer and whose teacher the other one."""
    return tiny_config(
        teacher={"model": str(other), "dtype": "float32"},
        student={"init": "load", "layers": None, "model": str(tiny_teacher)},
        loss=[{"name": "cross_entropy"}, {"name": "gold", "weight": 2.0}],
        cache_dir=str(tmp_path / "cache"),
        trainer={"steps": 4},
        evaluation={"rows": 4},
    )


def test_a_run_packs_with_the_students_tokenizer_and_learns(tree, tokenizer_folder):
    """Trained on cross-entropy and GOLD; the student is saved with its own tokenizer."""
    config = parse_config(tree, where="test")
    prepared = check(config)
    assert str(config.student.model) == prepared.tokenizer.name
    assert (None, "</s>") == (prepared.vocab_size, prepared.teacher_tokenizer.separator)
    train(config)
    lines = list(read_lines(config.run_dir / "metrics.jsonl"))
    assert 4 == len(lines)
    for line in lines:
        parts = line["train/cross_entropy"] + 2 * line["train/gold"]
        assert line["train/objective"] == pytest.approx(parts, rel=1e-5)
        assert 0 < line["train/gold"]
    assert (config.run_dir / "student" / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()


def test_held_out_losses_are_of_the_same_bytes(tree):
    """The teacher's nats on its own tokens of each row, per byte, are its loss in bits per byte."""
    config = parse_config(tree, where="test")
    train(config)
    losses = next(iter(read_lines(config.run_dir / "intervals.jsonl")))["losses"]["math"]
    prepared = check(config)
    rows = open_rows(prepared, shown=False)["math"].held_out
    read, count = select_rows(rows, 4).open(None), select_rows(rows, 4).num_tokens
    ids, labels = read.read(range(len(count)))
    read.close()
    model = load_teacher(config.teacher)
    teacher = CrossVocabularyTeacher(model, student=prepared.tokenizer, teacher=prepared.teacher_tokenizer)
    expected = 0.0
    for row in range(len(ids)):
        signal = teacher.signal({"input_ids": ids[row : row + 1], "labels": labels[row : row + 1]})
        with torch.no_grad():
            log_p = (signal.teacher.hidden @ signal.teacher.head.weight.T).double().log_softmax(-1)
        nats = -log_p[torch.arange(len(signal.labels)), signal.labels]
        spans = signal.spans.tolist()
        inside = sum(stop - start for start, stop, _, _ in spans)
        expected += sum(nats[a:b].sum().item() for _, _, a, b in spans) * count[row] / inside
    assert expected / count.sum() == pytest.approx(losses["teacher_loss"], rel=1e-5)
    bits = losses["teacher_loss"] * losses["num_tokens"] / losses["num_bytes"] / math.log(2)
    assert bits == pytest.approx(losses["teacher_bits_per_byte"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": [{"name": "gold"}, {"name": "forward_kl"}]},
            "loss forward_kl compares distributions over one vocabulary, and student",
        ),
        ({"loss": [{"name": "forward_kl"}]}, "have different tokenizers"),
        ({"teachers": {"x": {"model": "y"}}, "default_teacher": "x"}, "only the one `teacher` can be used"),
        (
            {"evaluation": {"measures": ["excess_loss"]}},
            "excess_loss compares student and teacher token by token, and the teacher",
        ),
    ],
)
def test_what_needs_one_vocabulary_is_refused(tree, changes, message):
    """One line, before a model is loaded."""
    with pytest.raises((ConfigError, ModelError), match=message):
        check(parse_config({**tree, **changes}, where="test"))


def test_a_store_of_such_a_teacher_is_refused(tree):
    """It would speak of tokens that the rows do not have."""
    with pytest.raises(
        ConfigError, match=r"a logits store .* have different tokenizers; set signal.source to live"
    ):
        store_cards(check(parse_config(tree, where="test")))


def test_a_shared_tokenizer_is_one_vocabulary(tiny_config, tiny_teacher):
    """GOLD between models that read alike is the generalised JSD, and other losses may stand beside it."""
    student = {"init": "load", "layers": None, "model": str(tiny_teacher)}
    tree = tiny_config(student=student, loss=[{"name": "gold"}, {"name": "forward_kl"}])
    assert check(parse_config(tree, where="test")).teacher_tokenizer is None
