"""Held-out losses per domain: sums over ranks, standard errors, what the teacher lost, excess and KL."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Teacher
from ddkmix.distillation import DistillationModel
from ddkmix.evaluator import Evaluator, WithDivergence, row_nats, row_sums, summarise
from ddkmix.held_out import HeldOut, OpenRows, select_rows
from ddkmix.models import load_teacher
from ddkmix.nats_cache import NatsCache
from ddkmix.predicted_tokens import predicted
from ddkmix.rows import RowReader
from ddkmix.trainer import token_nats
from tests import hand_made
from tests.hand_made import random_rows
from tests.test_nats_cache import DAMAGES

CPU = torch.device("cpu")
SEQ_LEN, PADDING = 6, 0


def write_rows(folder, domain, shards, **options):
    """Packed rows from lists of lists of tokens, one list per shard."""
    return hand_made.write_rows(folder, domain, shards, seq_len=SEQ_LEN, padding=PADDING, **options)


def nats_of_labels(input_ids, labels):
    """A model whose loss of a token is a hundredth of its id: every sum can be checked by hand."""
    return labels[:, 1:][predicted(labels)].double() / 100


class Counted:
    """A model that counts how often it was asked."""

    def __init__(self, function=nats_of_labels):
        self.function, self.calls = function, 0

    def __call__(self, input_ids, labels):
        """The losses of the function."""
        self.calls += 1
        return self.function(input_ids, labels)


@pytest.fixture
def model_nats(tiny_teacher):
    """The losses of the tiny teacher, as the trainer measures them."""
    model = load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))
    return token_nats(DistillationModel(model))


# --- sums per row -----------------------------------------------------------------------------------


def test_sums_by_hand(tmp_path):
    """Tokens 2, 3 and 5 are predicted: 0.02 + 0.03 and 0.05 nats."""
    held_out = select_rows(write_rows(tmp_path, "code", [[[1, 2, 3], [4, 5]]]), 9)
    sums = row_nats(held_out, nats_of_labels, batch_rows=8, device=CPU)
    assert [0.05, 0.05] == pytest.approx(sums.tolist())
    assert torch.float64 == sums.dtype


def test_sums_do_not_depend_on_the_batch(tmp_path, model_nats):
    """One row at a time, a ragged last batch, all at once: the same sums within float32."""
    held_out = select_rows(random_rows(tmp_path), 9)
    expected = row_nats(held_out, model_nats, batch_rows=1, device=CPU)
    for batch_rows in (2, 4, 100):
        sums = row_nats(held_out, model_nats, batch_rows=batch_rows, device=CPU)
        torch.testing.assert_close(expected, sums, rtol=1e-5, atol=1e-5)


def test_sums_do_not_depend_on_the_padding(tmp_path, model_nats):
    """Whatever stands behind the text of a row is neither read into a loss nor attended to."""
    held_out = select_rows(random_rows(tmp_path), 9)
    expected = row_nats(held_out, model_nats, batch_rows=4, device=CPU)
    for index in held_out.rows.shards:
        tokens = np.fromfile(index.location, dtype="<u2").reshape(-1, SEQ_LEN)
        for row, length in enumerate(index.num_tokens):
            tokens[row, length:] = 299
        tokens.tofile(index.location)
    sums = row_nats(held_out, model_nats, batch_rows=4, device=CPU)
    torch.testing.assert_close(expected, sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_the_ranks_together_give_the_sums_of_one_rank(tmp_path, world_size):
    """Each row is measured by exactly one rank and is 0 on the others, even with more ranks than rows."""
    held_out = select_rows(random_rows(tmp_path), 9)
    alone = row_nats(held_out, nats_of_labels, batch_rows=2, device=CPU)
    ranks = [
        row_nats(held_out, nats_of_labels, batch_rows=2, device=CPU, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert torch.equal(alone, torch.stack(ranks).sum(dim=0))
    assert [1] * 9 == (torch.stack(ranks) != 0).sum(dim=0).tolist()


def test_nats_are_transformers_own_loss(tmp_path, tiny_teacher, model_nats):
    """Sum over a row = the model's own mean loss on that row x its predicted tokens."""
    model = load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))
    held_out = select_rows(random_rows(tmp_path), 9)
    reader, expected = RowReader(held_out.rows), []
    for (shard, row), count in zip(held_out.places, held_out.num_tokens.tolist(), strict=True):
        ids = torch.from_numpy(reader.read(shard, row).astype(np.int64))[None, : count + 1]
        with torch.no_grad():
            expected.append(count * model(ids, labels=ids).loss.item())
    sums = row_nats(held_out, model_nats, batch_rows=4, device=CPU)
    assert expected == pytest.approx(sums.tolist(), rel=1e-5)


# --- means and standard errors ----------------------------------------------------------------------


def held_out_of(counts, domain="code", num_bytes=None):
    """Held-out rows of which only the counts matter."""
    counts = np.array(counts, dtype=np.int64)
    rows = hand_made.unread_rows(domain, [[]], seq_len=SEQ_LEN)
    places = tuple((0, i) for i in range(len(counts)))
    own_bytes = 4 * counts if num_bytes is None else np.array(num_bytes)
    return HeldOut(rows=rows, places=places, num_tokens=counts, num_bytes=own_bytes)


def losses_of(counts, student, teacher=None, **options):
    """The losses of one domain from row sums."""
    student = np.array(student, dtype=np.float64)
    teacher = np.zeros(len(student)) if teacher is None else np.array(teacher, dtype=np.float64)
    return summarise({"code": held_out_of(counts, **options)}, {"code": student}, {"code": teacher})


def test_the_mean_is_over_tokens_and_not_over_rows():
    """3 nats over 1 token and 3 nats over 5 tokens are 6 nats over 6 tokens, not (3 + 0.6) / 2."""
    losses = losses_of([1, 5], [3.0, 3.0], [0.0, 6.0])
    assert ([1.0], [1.0], [6]) == (
        losses.student_loss.tolist(),
        losses.teacher_loss.tolist(),
        losses.num_tokens.tolist(),
    )


def test_the_standard_error_by_hand():
    """Sums 4 and 8 of 2 tokens each: m = 3, residuals -2 and 2, sqrt(2/1 x 8) / 4 = 1."""
    assert [1.0] == pytest.approx(losses_of([2, 2], [4.0, 8.0]).student_error.tolist())


def test_the_error_of_the_gap_pairs_the_rows():
    """A teacher that is exactly 1 nat per row better: the gap is certain though both losses vary."""
    losses = losses_of([2, 2, 2], [4.0, 8.0, 30.0], [3.0, 7.0, 29.0])
    assert losses.student_error[0] > 1
    assert [0.0] == pytest.approx(losses.gap_error.tolist(), abs=1e-12)
    assert [0.5] == pytest.approx(losses.loss_gap.tolist())


def test_one_row_has_no_standard_error():
    """Nothing is known about the spread: nan, and no warning."""
    losses = losses_of([5], [10.0], [5.0])
    assert [2.0] == losses.student_loss.tolist()
    assert math.isnan(losses.student_error[0])
    assert math.isnan(losses.gap_error[0])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 1e4), st.floats(0, 1e4)), min_size=2, max_size=30)
)
def test_means_and_errors_equal_a_literal_computation(rows):
    """Ratio estimator, written with plain Python sums."""

    def literal(sums, counts):
        total, size = sum(counts), len(counts)
        mean = math.fsum(sums) / total
        squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
        return mean, math.sqrt(size / (size - 1) * squares) / total

    counts, student, teacher = (list(column) for column in zip(*rows, strict=True))
    losses = losses_of(counts, student, teacher)
    gap = [s - t for s, t in zip(student, teacher, strict=True)]
    tight = {"rel": 1e-9, "abs": 1e-9}
    assert literal(student, counts) == pytest.approx(
        (losses.student_loss[0], losses.student_error[0]), **tight
    )
    assert literal(teacher, counts)[0] == pytest.approx(losses.teacher_loss[0], **tight)
    assert literal(gap, counts) == pytest.approx((losses.loss_gap[0], losses.gap_error[0]), **tight)


def simulated_rows(count=300, seed=0):
    """Rows of different length whose losses vary from row to row and, together, between the two models."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(20, 200, count)
    difficulty = generator.normal(3.0, 0.5, count)
    student = counts * (difficulty + generator.normal(0.4, 0.1, count))
    return counts, student, counts * difficulty


def bootstrap_errors(counts, student, teacher, draws=3000):
    """The spread of mean loss and gap when the rows themselves are drawn again."""
    generator = np.random.default_rng(1)
    chosen = generator.integers(0, len(counts), (draws, len(counts)))
    totals = counts[chosen].sum(axis=1)
    return [(sums[chosen].sum(axis=1) / totals).std() for sums in (student, student - teacher)]


def test_standard_errors_agree_with_a_bootstrap():
    """Drawing the rows again 3,000 times spreads loss and gap as the formula says, within 8 %."""
    counts, student, teacher = simulated_rows()
    losses = losses_of(counts, student, teacher)
    expected = bootstrap_errors(counts, student, teacher)
    assert expected == pytest.approx([losses.student_error[0], losses.gap_error[0]], rel=0.08)


def test_treating_tokens_as_independent_would_be_noticed():
    """The bootstrap tells a wrong formula: over tokens instead of rows the error is far too small."""
    counts, student, teacher = simulated_rows()
    spread_of_tokens = np.repeat(student / counts, counts).std() / math.sqrt(counts.sum())
    assert bootstrap_errors(counts, student, teacher)[0] > 5 * spread_of_tokens


def test_bits_per_byte_by_hand():
    """6 nats over 6 tokens that cover 12 bytes: 0.5 nats a byte, 0.5 / log 2 bits."""
    losses = losses_of([1, 5], [3.0, 3.0], num_bytes=[2, 10])
    assert ([12], [0.5 / math.log(2)]) == (
        losses.num_bytes.tolist(),
        pytest.approx(losses.student_bits_per_byte.tolist()),
    )


def test_domains_are_sorted_by_name():
    """Position i of every array belongs to the i-th name, in whatever order they came."""
    held_out = {name: held_out_of([1, 1], name) for name in ("prose", "code")}
    student = {"prose": np.array([9.0, 9.0]), "code": np.array([1.0, 1.0])}
    losses = summarise(held_out, student, student)
    assert (("code", "prose"), [1.0, 9.0]) == (losses.domains, losses.student_loss.tolist())


# --- the evaluator and the teacher's cache ----------------------------------------------------------


def evaluator_of(folder, **options):
    """An evaluator over two domains."""
    held_out = {
        name: select_rows(random_rows(folder, name, seed=i, fingerprint=name), 9)
        for i, name in enumerate(("code", "math"))
    }
    return Evaluator(**{"held_out": held_out, "batch_rows": 4, "device": CPU, **options})


def test_student_and_teacher_are_measured_on_the_same_rows(tmp_path):
    """A student that is everywhere 0.5 nats worse has a gap of 0.5 without error."""
    evaluator = evaluator_of(tmp_path)
    teacher = evaluator.sums(nats_of_labels)
    losses = evaluator.measure(lambda ids, labels: nats_of_labels(ids, labels) + 0.5, teacher)
    assert ("code", "math") == losses.domains
    assert [0.5, 0.5] == pytest.approx(losses.loss_gap.tolist())
    assert [0.0, 0.0] == pytest.approx(losses.gap_error.tolist(), abs=1e-12)


def test_a_teacher_measured_against_itself_has_no_gap(tmp_path, model_nats):
    """Bit for bit: the same rows in the same batches."""
    evaluator = evaluator_of(tmp_path)
    losses = evaluator.measure(model_nats, evaluator.sums(model_nats))
    assert [0.0, 0.0] == losses.loss_gap.tolist()


def test_the_reduction_over_ranks_is_applied(tmp_path):
    """Rank 0 reports its own sums plus those of rank 1, which are those of one rank alone."""
    alone = evaluator_of(tmp_path).sums(nats_of_labels)
    second = iter(evaluator_of(tmp_path, rank=1, world_size=2).sums(nats_of_labels).values())

    def reduce(tensor):
        return tensor if tensor.ndim == 0 else tensor + torch.from_numpy(next(second))

    together = evaluator_of(tmp_path, rank=0, world_size=2, reduce=reduce).sums(nats_of_labels)
    assert {name: sums.tolist() for name, sums in alone.items()} == {
        name: sums.tolist() for name, sums in together.items()
    }


def test_the_cache_spares_the_second_measurement(tmp_path):
    """The teacher never changes, so it is asked once per domain and then never again."""
    evaluator, cache, model = evaluator_of(tmp_path), NatsCache(tmp_path / "cache", "model"), Counted()
    first = evaluator.sums(model, cache)
    calls = model.calls
    second = evaluator.sums(model, NatsCache(tmp_path / "cache", "model"))
    assert calls == model.calls > 0
    assert {name: sums.tolist() for name, sums in first.items()} == {
        name: sums.tolist() for name, sums in second.items()
    }


def test_without_a_cache_nothing_is_kept(tmp_path):
    """A student changes from one evaluation to the next."""
    evaluator, model = evaluator_of(tmp_path), Counted()
    evaluator.sums(model)
    calls = model.calls
    evaluator.sums(model)
    assert 2 * calls == model.calls


def test_the_cache_is_keyed_by_model(tmp_path):
    """Another teacher, or the same one in another type, is measured anew."""
    evaluator, model = evaluator_of(tmp_path), Counted()
    evaluator.sums(model, NatsCache(tmp_path / "cache", "model a"))
    calls = model.calls
    evaluator.sums(model, NatsCache(tmp_path / "cache", "model b"))
    assert 2 * calls == model.calls


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_cache_file_is_measured_again(tmp_path, damage):
    """It is only a cache: the model is asked, the file is mended, the result is right."""
    evaluator, cache, model = evaluator_of(tmp_path), NatsCache(tmp_path / "cache", "model"), Counted()
    expected = {name: sums.tolist() for name, sums in evaluator.sums(model, cache).items()}
    for path in (tmp_path / "cache").iterdir():
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert path.read_bytes() != whole
    calls = model.calls
    assert expected == {name: sums.tolist() for name, sums in evaluator.sums(model, cache).items()}
    assert 2 * calls == model.calls
    evaluator.sums(model, cache)
    assert 2 * calls == model.calls


def test_only_the_main_rank_writes_the_cache(tmp_path):
    """The others would write the same file at the same time."""
    evaluator_of(tmp_path, rank=1, world_size=2).sums(nats_of_labels, NatsCache(tmp_path / "cache", "m"))
    assert not (tmp_path / "cache").exists()


def test_a_rank_that_sees_the_file_measures_with_one_that_does_not(tmp_path):
    """If any rank lacks the entry all measure, or that rank would wait for the others for ever."""
    cache, model = NatsCache(tmp_path / "cache", "m"), Counted()
    evaluator_of(tmp_path).sums(nats_of_labels, cache)
    absent_elsewhere = evaluator_of(
        tmp_path, reduce=lambda tensor: tensor + 1.0 if tensor.ndim == 0 else tensor
    )
    absent_elsewhere.sums(model, cache)
    assert model.calls > 0


def test_saving_leaves_one_file_per_domain_and_no_temporary_one(tmp_path):
    """Named by a hash: a domain's name may be any string."""
    evaluator_of(tmp_path).sums(nats_of_labels, NatsCache(tmp_path / "cache", "m"))
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert 2 == len(names) == sum(bool(re.fullmatch(r"[0-9a-f]{32}\.f8", name)) for name in names)


def test_what_is_cached_is_read_without_a_model(tmp_path):
    """All domains or none: a teacher is loaded if one of them is missing."""
    cache, evaluator = NatsCache(tmp_path / "cache", "m"), evaluator_of(tmp_path)
    assert evaluator.cached(cache) is None
    sums = evaluator.sums(nats_of_labels, cache)
    found = evaluator.cached(cache)
    assert {name: values.tolist() for name, values in sums.items()} == {
        name: values.tolist() for name, values in found.sums.items()
    }
    next((tmp_path / "cache").iterdir()).unlink()
    assert evaluator.cached(cache) is None


def test_what_another_rank_lacks_is_not_taken_from_the_cache(tmp_path):
    """All ranks load the teacher, or none."""
    cache = NatsCache(tmp_path / "cache", "m")
    evaluator_of(tmp_path).sums(nats_of_labels, cache)
    assert evaluator_of(tmp_path, reduce=lambda tensor: tensor + 1.0).cached(cache) is None


@pytest.mark.parametrize(("world_size", "batch_rows"), [(2, 1), (3, 2), (4, 5), (20, 2)])
def test_every_rank_calls_the_model_equally_often(tmp_path, world_size, batch_rows):
    """Wrapped models exchange data in their forward pass: a rank that calls once less hangs the others."""
    held_out, calls = select_rows(random_rows(tmp_path), 9), []
    for rank in range(world_size):
        model = Counted()
        row_nats(held_out, model, batch_rows=batch_rows, device=CPU, rank=rank, world_size=world_size)
        calls.append(model.calls)
    assert [math.ceil(math.ceil(9 / world_size) / batch_rows)] * world_size == calls


def test_files_are_closed_when_a_model_fails(tmp_path):
    """A measurement that is tried again and again would run out of them."""
    held_out, closed = select_rows(random_rows(tmp_path), 9), []

    class Watched:
        num_tokens = held_out.num_tokens

        def open(self, storage):
            rows = held_out.open(storage)
            return OpenRows(rows.read, lambda: (closed.append(1), rows.close())[1])

    def fails(rows, input_ids, labels):
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        row_sums.__wrapped__(Watched(), fails, 1, batch_rows=4, device=CPU)
    assert [1] == closed


# --- what is measured beside the losses -------------------------------------------------------------


def table_of(nats):
    """A model whose loss of each token is written down, by its id."""
    return lambda ids, labels: torch.tensor(
        [nats[label] for label in labels[:, 1:][predicted(labels)].tolist()], dtype=torch.float64
    )


STUDENT, TEACHER = {2: 0.5, 3: 0.75, 5: 1.25}, {2: 1.0, 3: 0.25, 5: 1.0}


def two_rows(folder, **options):
    """Two rows that predict the tokens 2 and 3, and 5."""
    held_out = {"code": select_rows(write_rows(folder, "code", [[[1, 2, 3], [4, 5]]]), 9)}
    return Evaluator(**{"held_out": held_out, "batch_rows": 1, "device": CPU, **options})


def test_the_excess_is_clipped_token_by_token(tmp_path):
    """max(0, -0.5), 0.5 and 0.25 are 0.75 nats over 3 tokens; the gap is 0.25 over 3 (DoReMi, Alg. 1)."""
    evaluator = two_rows(tmp_path)
    teacher = evaluator.frozen(table_of(TEACHER), tokens=True)
    assert [1.0, 0.25, 1.0] == teacher.tokens["code"].tolist()
    losses = evaluator.measure(table_of(STUDENT), teacher)
    assert ([0.25], [pytest.approx(0.25 / 3)]) == (losses.excess_loss.tolist(), losses.loss_gap.tolist())
    assert losses.forward_kl is None


def test_what_nobody_asked_for_is_not_measured(tmp_path):
    """Neither column, and no entry in what is written down."""
    evaluator = two_rows(tmp_path)
    losses = evaluator.measure(table_of(STUDENT), evaluator.sums(table_of(TEACHER)))
    assert (None, None) == (losses.excess_loss, losses.forward_kl)
    assert not {"excess_loss", "forward_kl"} & set(losses.to_json()["code"])


def test_a_divergence_is_averaged_over_tokens(tmp_path):
    """KL of 1, 2 and 6 nats at three tokens is 3; the domain is told, and the loss is as without it."""
    evaluator, asked = two_rows(tmp_path), []

    def values(domain, input_ids, labels):
        asked.append(domain)
        own = table_of(STUDENT)(input_ids, labels)
        return torch.stack([own, table_of({2: 1.0, 3: 2.0, 5: 6.0})(input_ids, labels)])

    teacher = evaluator.frozen(table_of(TEACHER), tokens=True)
    losses = evaluator.measure(WithDivergence(values), teacher)
    plain = evaluator.measure(table_of(STUDENT), teacher)
    assert ([3.0], ["code", "code"]) == (losses.forward_kl.tolist(), asked)
    for name in ("student_loss", "teacher_loss", "gap_error", "excess_loss"):
        assert getattr(plain, name).tolist() == getattr(losses, name).tolist()
    assert (3.0, 0.25) == tuple(losses.to_json()["code"][name] for name in ("forward_kl", "excess_loss"))


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 10_000))
def test_the_excess_is_never_below_the_gap(tmp_path_factory, seed):
    """Clipping takes away what is negative: at least max(0, gap), and the gap where nothing is."""
    generator = np.random.default_rng(seed)
    student, teacher = ({i: float(x) for i, x in enumerate(generator.random(300))} for _ in range(2))
    evaluator = evaluator_of(tmp_path_factory.mktemp("rows"))
    known = evaluator.frozen(table_of(teacher), tokens=True)
    losses = evaluator.measure(table_of(student), known)
    assert (losses.excess_loss >= np.maximum(losses.loss_gap, 0) - 1e-7).all()
    worse = evaluator.measure(table_of({i: x + 1 for i, x in teacher.items()}), known)
    assert worse.loss_gap.tolist() == pytest.approx(worse.excess_loss.tolist(), rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_tokens_of_all_ranks_are_those_of_one(tmp_path, world_size):
    """Each rank fills the places of its own rows; the table does not depend on batches."""
    evaluator = evaluator_of(tmp_path)
    alone = evaluator.frozen(nats_of_labels, tokens=True).tokens
    assert alone["math"].tolist() == pytest.approx(
        [label / 100 for label in labels_of(evaluator.held_out["math"])]
    )
    parts = [
        evaluator_of(tmp_path, rank=rank, world_size=world_size, batch_rows=2)
        .frozen(nats_of_labels, tokens=True)
        .tokens
        for rank in range(world_size)
    ]
    for name, table in alone.items():
        assert table.tolist() == np.stack([part[name] for part in parts]).sum(0).tolist()


def labels_of(held_out):
    """The predicted tokens, row after row."""
    rows = held_out.open(None)
    labels = [rows.read([i])[1][0, 1:] for i in range(len(held_out.num_tokens))]
    rows.close()
    return [label for row in labels for label in row.tolist() if label >= 0]


def test_an_old_cache_gains_tokens_and_keeps_its_sums(tmp_path):
    """What was measured before stays to the last bit, whatever the model says now; then nobody is asked."""
    evaluator, cache, model = evaluator_of(tmp_path), NatsCache(tmp_path / "cache", "m"), Counted()
    before = {name: np.arange(9.0) + 0.1 for name in ("code", "math")}
    for name, sums in before.items():
        cache.save(evaluator.held_out[name], sums)
    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert evaluator.cached(cache, tokens=True) is None
    first = evaluator.frozen(model, cache, tokens=True)
    calls = model.calls
    again, read = evaluator.frozen(model, cache, tokens=True), evaluator.cached(cache, tokens=True)
    assert calls == model.calls > 0
    for found in (first, again, read):
        assert {name: sums.tolist() for name, sums in before.items()} == {
            name: sums.tolist() for name, sums in found.sums.items()
        }
        assert all((first.tokens[name] == found.tokens[name]).all() for name in before)
    assert all(path.read_bytes() == content for path, content in files.items())
    assert evaluator.cached(cache).tokens is None


def test_a_rank_without_the_tokens_has_all_measure(tmp_path):
    """As for sums: none may wait alone."""
    evaluator, cache, model = evaluator_of(tmp_path), NatsCache(tmp_path / "cache", "m"), Counted()
    evaluator.frozen(nats_of_labels, cache, tokens=True)
    elsewhere = evaluator_of(tmp_path, reduce=lambda tensor: tensor + 1.0 if tensor.ndim == 0 else tensor)
    assert elsewhere.cached(cache, tokens=True) is None
    elsewhere.frozen(model, cache, tokens=True)
    assert model.calls > 0
