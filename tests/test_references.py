"""Reference losses: what a card may say, when they are used, and what they are in nats of a row."""

import math

import numpy as np
import pytest

from ddkmix.card import ReferenceLoss, read_card
from ddkmix.config import parse_config
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError
from ddkmix.gaps import measure_and_tell, measure_gaps
from ddkmix.held_out import select_rows
from ddkmix.own_held_out import select_items
from ddkmix.preflight import check
from ddkmix.references import card_references, reference_sums, wanted_references
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import write_domain
from tests.hand_made import write_rows

BITS = {"model": "big", "bits_per_byte": 0.75}


@pytest.fixture
def held_out(tmp_path):
    """Rows that predict 2 tokens in 6 bytes, and 1 in 3."""
    return {"code": select_rows(write_rows(tmp_path, "code", [[[1, 2, 3], [4, 5]]], seq_len=6), 9)}


@pytest.mark.parametrize(
    ("expected", "loss"),
    [
        ([6 * 0.75 * math.log(2), 3 * 0.75 * math.log(2)], BITS),
        ([3.0, 1.5], {"model": "big", "nats_per_byte": 0.5}),
        ([2.5, 1.25], {"model": "big", "nats_per_token": 1.25, "tokenizer": "x"}),
        ([2.5, 1.25], 1.25),
    ],
)
def test_a_row_by_hand(held_out, expected, loss):
    """Bytes or tokens of the row, in nats."""
    given = ReferenceLoss.model_validate(loss) if isinstance(loss, dict) else loss
    assert expected == pytest.approx(reference_sums(held_out, {"code": given})["code"].tolist())


def test_bytes_that_nobody_counted_are_one_line():
    """A user's own items have tokens alone."""
    rows = {"code": select_items("code", [{"input_ids": [1, 2, 3]}], 5)}
    assert [2.0] == reference_sums(rows, {"code": 1.0})["code"].tolist()
    with pytest.raises(DataError, match="domain 'code': its reference loss is per byte of text"):
        reference_sums(rows, {"code": ReferenceLoss.model_validate(BITS)})


@pytest.mark.parametrize(
    ("expected", "entry"),
    [
        ("reference_loss.model is missing", {"bits_per_byte": 1.0}),
        ("give one of bits_per_byte, nats_per_byte, nats_per_token, and there is none", {"model": "big"}),
        ("and there is bits_per_byte and nats_per_byte", {**BITS, "nats_per_byte": 1.0}),
        ("nats_per_token and tokenizer, whose tokens they are", {"model": "big", "nats_per_token": 2.0}),
        ("nats_per_token and tokenizer, whose tokens they are", {**BITS, "tokenizer": "x"}),
        ("reference_loss.bits_per_byte = 0; Input should be greater than 0", {**BITS, "bits_per_byte": 0}),
        ("reference_loss.bits_per_byte = nan; Input should be", {**BITS, "bits_per_byte": float("nan")}),
        ("unknown key 'reference_loss.bits_byte'; did you mean 'bits_per_byte'?", {**BITS, "bits_byte": 1}),
    ],
)
def test_a_wrong_entry_of_a_card_is_refused(tmp_path, expected, entry):
    """One line with the key and the rule."""
    path = write_domain(tmp_path, "code", reference_loss=entry)
    with pytest.raises(DataError) as error:
        read_card(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_all_cards_or_none(tmp_path, tokenizer_folder):
    """A mix is refused, whoever asks; without any there is nothing to ask for."""
    fingerprint = read_tokenizer(str(tokenizer_folder)).fingerprint
    write_domain(tmp_path, "code")
    without = write_domain(tmp_path, "math")
    domains = load_domains([str(tmp_path)])
    assert card_references(domains, fingerprint) is None
    with pytest.raises(ConfigError, match="no card has a reference_loss; add"):
        wanted_references(domains, fingerprint)
    write_domain(tmp_path, "code", reference_loss=BITS)
    with pytest.raises(DataError, match=r"has no reference_loss, and 1 of 2 cards have one") as error:
        card_references(load_domains([str(tmp_path)]), fingerprint)
    assert str(without) in str(error.value)
    write_domain(tmp_path, "math", reference_loss={"model": "b", "nats_per_byte": 0.5})
    found = wanted_references(load_domains([str(tmp_path)]), fingerprint)
    assert (0.75, 0.5) == (found["code"].bits_per_byte, found["math"].nats_per_byte)


def test_losses_per_token_are_of_one_tokenizer(tmp_path, tokenizer_folder, other_teacher):
    """Taken where the rows have the same tokens, refused elsewhere."""
    entry = {"model": "big", "nats_per_token": 2.0, "tokenizer": str(tokenizer_folder)}
    write_domain(tmp_path, "code", reference_loss=entry)
    domains = load_domains([str(tmp_path)])
    assert card_references(domains, read_tokenizer(str(tokenizer_folder)).fingerprint)
    with pytest.raises(DataError, match="the rows are packed with another tokenizer; give bits_per_byte"):
        card_references(domains, read_tokenizer(str(other_teacher)).fingerprint)


def test_gaps_are_to_the_cards_where_that_is_asked(tmp_path, tiny_config):
    """The reference in bits per byte comes back as such, and no teacher is read; the student is as ever."""
    cards = {"code": BITS, "math": {"model": "big", "nats_per_byte": 0.5}}
    for name, entry in cards.items():
        write_domain(tmp_path, name, reference_loss=entry)
    tree = tiny_config(domains=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    to_teacher, _ = measure_gaps(parse_config(tree, where="test"))
    tree["evaluation"]["reference"] = "cards"
    config = parse_config(tree, where="test")
    found = measure_and_tell(config)
    losses = found.losses
    assert ("big",) == found.references
    assert ("Teacher: the reference losses on the domains' cards, of big.",) == found.notes
    assert to_teacher.student_loss.tolist() == losses.student_loss.tolist()
    assert [0.75, 0.5 / math.log(2)] == pytest.approx(losses.teacher_bits_per_byte.tolist())
    assert np.isfinite(losses.gap_error).all()
    prepared = check(config)
    assert prepared.gap_fingerprint("code") != prepared.teacher_fingerprint("code")
