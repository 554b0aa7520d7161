"""Reading: the signal of any rows in any order is what was captured; another store is refused."""

import math
from dataclasses import replace

import pytest
import torch

from ddkmix.batch import DenseSignal, Head, RoutedSignal
from ddkmix.errors import DataError, RowError
from ddkmix.logits_store.card import Kept, find_store, read_card, write_card
from ddkmix.logits_store.hidden import decode_hidden, encode_hidden, load_head, save_head
from ddkmix.logits_store.reader import LogitsStore
from ddkmix.logits_store.sidecar import SidecarWriter, sidecar_path
from tests.hand_made import write_rows
from tests.logits_store.stores import CLASSES, card_of, logits_of_row, write_store

TOP_K = Kept(keep="top_k", k=10, log_prob_bytes=2)
KINDS = {
    "top_p_k": Kept(keep="top_p_k", p=0.9, k=20, log_prob_bytes=1),
    "top_k": TOP_K,
    "drawn": Kept(keep="drawn", draws=8, log_prob_bytes=1),
    "top_k_drawn": Kept(keep="top_k_drawn", k=5, draws=4, log_prob_bytes=1),
}
ROWS = [[[1] * 8, [2] * 5], [[3] * 8, [0], [4] * 2]]
"""Two shards; the second has a row that is all padding but one token, which predicts nothing."""
PLACES = [("code", 0, 0), ("code", 0, 1), ("code", 1, 0), ("code", 1, 1), ("code", 1, 2)]


@pytest.fixture
def rows(tmp_path):
    """Packed rows of one domain."""
    return write_rows(tmp_path / "rows", "code", ROWS, seq_len=8)


def opened(tmp_path, rows, kept, **options):
    """A store of these rows, captured and opened."""
    card = card_of(kept)
    write_store(tmp_path / "logits", card, rows)
    return LogitsStore.open(tmp_path / "logits", {"code": card}, {"code": rows}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_in_the_order_asked_for(tmp_path, rows, kind):
    """True log-probabilities at the kept classes, within what one byte can hold; the scalars likewise."""
    store = opened(tmp_path, rows, KINDS[kind])
    order = [PLACES[i] for i in (4, 0, 2, 1, 3, 0)]
    signal = store.read(order)
    assert (6, 8) == signal.ids.shape[:2] == signal.entropy.shape
    for i, place in enumerate(order):
        n = rows.tokens_at(place[1], place[2]) - 1
        log_p = logits_of_row("code", place[1], place[2], n).log_softmax(-1)
        said = signal.at(i).at(slice(0, n))
        used = said.log_probs > -math.inf
        assert used.any(1).all()
        error = (log_p.gather(1, said.ids) - said.log_probs).abs()[used]
        assert error.max() < 0.1 if n else True
        torch.testing.assert_close((log_p / 2).logsumexp(-1), said.log_z[2.0], atol=1e-4, rtol=0)
        torch.testing.assert_close(-log_p[:, 0], said.teacher_nats, atol=2e-2, rtol=5e-4)
        torch.testing.assert_close(-(log_p.exp() * log_p).sum(-1), said.entropy, atol=1e-4, rtol=0)
        if KINDS[kind].draws:
            assert [KINDS[kind].draws] * n == said.draws.sum(1).tolist()
            assert KINDS[kind].draws == said.num_draws


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_predict_nothing_are_valid(tmp_path, rows, kind):
    """Padding and the last position: one class that is certain, so that no loss of them is NaN."""
    signal = opened(tmp_path, rows, KINDS[kind]).read(PLACES)
    for row, tokens in enumerate((8, 5, 8, 1, 2)):
        behind = signal.at(row).at(slice(tokens - 1, None))
        assert torch.equal(torch.ones(len(behind.ids)), behind.log_probs.exp().sum(-1))
        assert 0 == behind.entropy.sum() == behind.teacher_nats.sum() == behind.log_z[2.0].sum()
    assert not signal.log_probs.isnan().any()


def test_unused_places_repeat_the_first_class(tmp_path, rows):
    """As the contract of TruncatedSignal says: a gather of them never leaves the vocabulary."""
    signal = opened(tmp_path, rows, KINDS["top_p_k"]).read(PLACES)
    unused = signal.log_probs == -math.inf
    assert unused.any()
    assert torch.equal(signal.ids[..., :1].expand_as(signal.ids)[unused], signal.ids[unused])


def test_the_tail_is_chosen_when_reading(tmp_path, rows):
    """One store serves all three treatments of the mass outside."""
    store = opened(tmp_path, rows, TOP_K, tail="renormalize")
    assert "renormalize" == store.read(PLACES[:1]).tail


def test_shards_that_are_not_captured_are_known(tmp_path, rows):
    """So that a run can ask the live teacher, or refuse."""
    card = card_of(TOP_K)
    write_store(tmp_path / "logits", card, rows, shards=[1])
    store = LogitsStore.open(tmp_path / "logits", {"code": card}, {"code": rows})
    assert [False, True] == [store.has("code", shard) for shard in (0, 1)]
    assert {"code": 1} == store.missing()
    with pytest.raises(DataError, match="is missing; capture it"):
        store.read([("code", 0, 0)])


def test_rows_that_were_packed_anew_are_not_found(tmp_path, rows):
    """A shard is known by its content: other rows under the same name have no records."""
    store = opened(tmp_path, rows, TOP_K)
    other = write_rows(tmp_path / "other", "code", [[[9] * 8, [2] * 5], ROWS[1]], seq_len=8)
    again = LogitsStore.open(tmp_path / "logits", {"code": card_of(TOP_K)}, {"code": other})
    assert {"code": 1} == again.missing()
    assert {} == store.missing()


def test_a_sidecar_in_the_place_of_another_is_refused(tmp_path, rows):
    """A file that was renamed by hand says what it is of."""
    store = opened(tmp_path, rows, TOP_K)
    store.path("code", 1).replace(store.path("code", 0))
    with pytest.raises(DataError, match=r"has 3 rows of the shard .* the run has 2 of"):
        store.read([("code", 0, 0)])


def test_a_damaged_record_is_one_line_that_names_its_row(tmp_path, rows):
    """Others are served."""
    store = opened(tmp_path, rows, TOP_K)
    path = store.path("code", 0)
    data = bytearray(path.read_bytes())
    data[4096 + 30] ^= 1
    path.write_bytes(data)
    message = r"code/0\.tar#0: its record in .* is damaged: .* have changed.*capture again; .*--verify"
    with pytest.raises(RowError, match=message):
        store.read(PLACES)
    store.read(PLACES[1:])


# --- which store --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x" * 64}, r"teacher mmmmmmmmmmmm \(wanted: xxxxxxxxxxxx\)"),
        ({"tokenizer": "x" * 64}, r"tokenizer tttttttttttt \(wanted: xxxxxxxxxxxx\)"),
        ({"vocab_size": 290}, r"classes None \(wanted: 290\)"),
        ({"separator_id": 7}, r"separator between documents None \(wanted: 7\)"),
        ({"temperatures": (2.0, 4.0)}, r"temperatures \[2.0\] \(wanted: \[2.0, 4.0\]\)"),
        ({"kept": replace(TOP_K, k=11)}, r"k 10 \(wanted: 11\)"),
        ({"kept": KINDS["drawn"]}, r"keep top_k \(wanted: drawn\)"),
    ],
)
def test_a_store_of_anything_else_is_refused_with_what_differs(tmp_path, rows, changes, message):
    """In one line, with the way out."""
    write_store(tmp_path, card_of(TOP_K), rows)
    with pytest.raises(DataError, match=rf"the nearest, [0-9a-f]{{16}}, has .*{message}.*Capture again"):
        LogitsStore.open(tmp_path, {"code": replace(card_of(TOP_K), **changes)}, {"code": rows})


def test_no_store_at_all_names_the_command(tmp_path, rows):
    """An empty or absent folder."""
    with pytest.raises(DataError, match="holds no logits store; make one with `ddkmix capture CONFIG`"):
        LogitsStore.open(tmp_path / "none", {"code": card_of(TOP_K)}, {"code": rows})


def test_a_store_with_more_temperatures_serves(tmp_path, rows):
    """And so does the folder of the store itself; the teacher's name and folder do not matter."""
    store = write_store(tmp_path, card_of(TOP_K, temperatures=(1.5, 2.0)), rows)
    wanted = card_of(TOP_K, teacher="other name")
    assert store == find_store(tmp_path, wanted) == find_store(store, wanted)
    assert store == find_store(tmp_path, card_of(TOP_K, temperatures=()))


def test_a_card_is_read_as_it_was_written(tmp_path):
    """All fields, and the number of classes."""
    card = card_of(TOP_K, members=({"model": "a", "revision": None, "dtype": "float32", "share": 1.0},))
    write_card(tmp_path / "store", card, num_classes=7)
    assert (card, 7) == read_card(tmp_path / "store")
    write_card(tmp_path / "store", replace(card, teacher="renamed"), num_classes=7)
    assert (card, 7) == read_card(tmp_path / "store")
    with pytest.raises(DataError, match="describes another store"):
        write_card(tmp_path / "store", card, num_classes=8)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 99}', '{"format": 1, "num_classes": "7"}'])
def test_a_damaged_card_is_one_line(tmp_path, text):
    """Nothing that is not a card is taken for one."""
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(DataError, match=r"store\.json is (not a|of another)"):
        read_card(tmp_path)


def test_settings_without_effect_change_no_key():
    """p is nothing to `top_k`, k nothing to `drawn`."""
    from ddkmix.config import Capture
    from ddkmix.logits_store.card import kept_of

    assert kept_of(Capture(keep="top_k", p=0.5)) == kept_of(Capture(keep="top_k", p=0.9, draws=3))
    assert kept_of(Capture(keep="drawn", k=3)) == kept_of(Capture(keep="drawn", k=9, hidden_bytes=1))
    assert kept_of(Capture(keep="hidden", k=3)) == kept_of(Capture(keep="hidden", log_prob_bytes=2))
    keys = {card_of(kept).key for kept in KINDS.values()}
    assert 4 == len(keys)


# --- hidden states ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "dtype", "error"),
    [
        (4, torch.float32, 0.0),
        (2, torch.bfloat16, 0.0),
        (2, torch.float16, 0.0),
        (4, torch.bfloat16, 0.0),
        (2, torch.float32, 2**-11),
        (1, torch.float32, 1 / 254),
    ],
)
def test_hidden_states_come_back_within_the_stated_error(num_bytes, dtype, error):
    """Exactly, where their type has as many bytes; else relative to a token's largest number."""
    hidden = torch.randn(6, 16).to(dtype) * torch.tensor([[1.0], [10], [0.1], [1], [0], [3]]).to(dtype)
    nats = torch.rand(6).numpy()
    data = encode_hidden(hidden, nats, num_bytes)
    assert 6 * (2 + 16 * num_bytes + (4 if num_bytes == 1 else 0)) == len(data)
    found, found_nats = decode_hidden(data, 6, 16, num_bytes, dtype)
    assert dtype == found.dtype
    bound = error * hidden.float().abs().amax(1, keepdim=True) * 1.001
    assert ((found.float() - hidden.float()).abs() <= bound).all()
    assert nats == pytest.approx(found_nats, rel=5e-4)
    with pytest.raises(RowError, match="bytes where"):
        decode_hidden(data[:-1], 6, 16, num_bytes, dtype)


def test_an_output_layer_comes_back(tmp_path):
    """Cut to the classes that count, with bias, scale and soft cap."""
    head = Head(weight=torch.randn(9, 4), bias=torch.randn(9), scale=0.3, softcap=30.0, vocab_size=7)
    save_head(tmp_path, head)
    found = load_head(tmp_path)
    assert torch.equal(head.weight[:7], found.weight)
    assert torch.equal(head.bias[:7], found.bias)
    assert (0.3, 30.0, None) == (found.scale, found.softcap, found.vocab_size)
    (tmp_path / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"head\.safetensors cannot be read .*capture again"):
        load_head(tmp_path)


def hidden_store(folder, rows, value, dim=4):
    """A store of hidden states that all have one value."""
    card = card_of(Kept(keep="hidden", hidden_bytes=4), model=str(value) * 64, temperatures=())
    store = folder / card.key
    write_card(store, card, num_classes=CLASSES)
    save_head(store, Head(weight=torch.full((CLASSES, dim), float(value))))
    for number, shard in enumerate(rows.shards):
        with SidecarWriter(sidecar_path(store, rows.domain, shard)) as writer:
            for row in range(shard.num_rows):
                n = max(rows.tokens_at(number, row) - 1, 0)
                writer.append(encode_hidden(torch.full((n, dim), float(value)), torch.zeros(n).numpy(), 4))
            writer.finish({"shard": shard.sha256})
    return card


def test_hidden_states_are_a_dense_signal_and_two_teachers_a_routed_one(tmp_path, rows):
    """With the head that the store keeps; rows of each teacher go with its own."""
    math_rows = write_rows(tmp_path / "rows", "math", ROWS, seq_len=8)
    cards = {
        "code": hidden_store(tmp_path / "logits", rows, 1),
        "math": hidden_store(tmp_path / "logits", math_rows, 2),
    }
    store = LogitsStore.open(tmp_path / "logits", cards, {"code": rows, "math": math_rows})
    one = store.read([("code", 0, 1)])
    assert isinstance(one, DenseSignal)
    assert [1.0] * 4 + [0.0] * 4 == one.hidden[0, :, 0].tolist()
    both = store.read([("code", 0, 0), ("math", 0, 0), ("code", 1, 0)])
    assert isinstance(both, RoutedSignal)
    assert [[0, 2], [1]] == [rows.tolist() for rows in both.rows]
    assert [1.0, 2.0] == [said.hidden[0, 0, 0].item() for said in both.signals]
    assert [1.0, 2.0] == [said.head.weight[0, 0].item() for said in both.signals]


def test_classes_of_two_teachers_are_one_signal(tmp_path, rows):
    """Rows of two domains whose stores are two folders."""
    math_rows = write_rows(tmp_path / "rows", "math", ROWS, seq_len=8)
    cards = {"code": card_of(TOP_K), "math": card_of(TOP_K, model="x" * 64, temperatures=(2.0, 3.0))}
    write_store(tmp_path / "logits", cards["code"], rows)
    write_store(tmp_path / "logits", cards["math"], math_rows)
    wanted = {**cards, "math": replace(cards["math"], temperatures=(2.0,))}
    store = LogitsStore.open(tmp_path / "logits", wanted, {"code": rows, "math": math_rows})
    signal = store.read([("math", 0, 0), ("code", 1, 0)])
    assert {2.0} == set(signal.log_z)
    log_p = logits_of_row("math", 0, 0, 7).log_softmax(-1)
    torch.testing.assert_close(log_p.gather(1, signal.ids[0, :7]), signal.log_probs[0, :7], atol=6e-3, rtol=0)
