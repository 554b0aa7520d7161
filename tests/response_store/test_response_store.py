"""The response store: what was written comes back, and whatever is not that is one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddkmix.errors import DataError, RowError
from ddkmix.index import DomainRows
from ddkmix.logits_store.sidecar import GENERATE, HEADER_BYTES, SidecarWriter
from ddkmix.response_store.card import ResponseCard, find_store, read_card, write_card
from ddkmix.response_store.prompts import LeadingTokens, PromptRows, leading_prompts
from ddkmix.response_store.reader import (
    Response,
    ResponseStore,
    ResponseTotals,
    decode,
    encode,
    open_responses,
    prompts_key,
    response_path,
    totals_of,
    totals_of_file,
)
from tests.hand_made import write_rows

CARD = ResponseCard(
    by="teacher",
    name="models/teacher",
    model="m" * 64,
    tokenizer="t" * 64,
    num_classes=300,
    stop_ids=(0, 7),
    max_new_tokens=5,
    temperature=1.0,
    top_k=None,
    top_p=0.9,
    seed=0,
    block_rows=16,
)
ANSWERS = [[[11, 7], [12, 13, 14, 15, 16]], [[0], [299, 1, 2, 3, 0]]]
"""Of two shards with two rows each: ended, cut, ended at once, ended with the last token that was allowed."""


@pytest.fixture(params=["<u2", "<u4"])
def rows(tmp_path: Path, request: pytest.FixtureRequest) -> DomainRows:
    """Packed rows of one domain."""
    shards = [[[1, 2, 3, 4], [5, 6]], [[7], [8, 9, 10]]]
    return write_rows(tmp_path / "rows", "math", shards, seq_len=8, dtype=request.param)


@pytest.fixture
def prompts(rows: DomainRows) -> LeadingTokens:
    """Their first tokens."""
    return LeadingTokens(rows, [np.array([2, 2]), np.array([1, 1])])


def write(folder: Path, prompts: PromptRows, card: ResponseCard = CARD) -> Path:
    """A store with the answers above."""
    store = folder / card.key
    write_card(store, card)
    for shard, answers in enumerate(ANSWERS):
        with SidecarWriter(response_path(store, prompts, shard), GENERATE) as writer:
            for answer in answers:
                writer.append(encode(np.array(answer), prompts.shards[shard].dtype))
            totals = ResponseTotals(rows=2, tokens=7)
            facts = {"shard": prompts.shards[shard].sha256, "prompts": prompts_key(prompts, shard)}
            writer.finish({**facts, **totals.to_facts()})
    return store


def opened(folder: Path, prompts: PromptRows, card: ResponseCard = CARD) -> ResponseStore:
    """As a run opens it."""
    return ResponseStore.open(folder, {"math": card}, {"math": prompts})


def test_responses_come_back_with_how_they_ended(tmp_path: Path, prompts: LeadingTokens) -> None:
    """By domain, shard and row, in any order; in the type of the shard's tokens."""
    write(tmp_path / "responses", prompts)
    store = opened(tmp_path / "responses", prompts)
    assert {} == store.missing()
    found = {(s, r): store.read(("math", s, r)) for s, r in ((1, 1), (0, 0), (1, 0), (0, 1))}
    assert {
        (0, 0): ([11, 7], True),
        (0, 1): ([12, 13, 14, 15, 16], False),
        (1, 0): ([0], True),
        (1, 1): ([299, 1, 2, 3, 0], True),
    } == {place: (response.ids.tolist(), response.ended) for place, response in found.items()}


def test_prompts_are_the_first_tokens_of_rows(rows: DomainRows) -> None:
    """As many as the index says; none at all is a prompt that somebody else refuses."""
    prompts = LeadingTokens(rows, [np.array([3, 0]), np.array([1, 2])])
    assert isinstance(prompts, PromptRows)
    assert [[], [1, 2, 3]] == [ids.tolist() for ids in prompts.read(0, [1, 0])]
    assert [[7], [8, 9]] == [ids.tolist() for ids in prompts.read(1, [0, 1])]
    assert [1, 2] == prompts.num_tokens(1).tolist()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([[3, 3], [1, 1]], r"math/0\.tar#1: a prompt of 3 tokens in a row of 2; pack it again"),
        ([[1, 1], [1, -1]], r"math/1\.tar#1: a prompt of -1 tokens in a row of 3"),
        ([[1, 1], [1]], r"math/1\.tar has 2 rows and 1 lengths of prompts; pack it again"),
    ],
)
def test_lengths_that_do_not_fit_the_rows_are_refused(rows: DomainRows, lengths: Any, message: str) -> None:
    """One line with the row."""
    with pytest.raises(DataError, match=message):
        LeadingTokens(rows, [np.array(one) for one in lengths])


# --- stores are found by what they are ------------------------------------------------------------------


def test_whatever_changes_a_response_is_another_store() -> None:
    """Every field of the card but the names that are for people; and settings without effect change
    nothing."""
    changes: dict[str, Any] = {
        "model": "n" * 64,
        "tokenizer": "u" * 64,
        "num_classes": 299,
        "stop_ids": (0,),
        "max_new_tokens": 6,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
        "seed": 1,
        "block_rows": 8,
    }
    assert set(ResponseCard.__slots__) == {*changes, "by", "name"}
    keys = {replace(CARD, **{field: value}).key for field, value in changes.items()}
    assert len(changes) == len(keys - {CARD.key})
    assert CARD.key == replace(CARD, by="student", name="elsewhere").key
    greedy = replace(CARD, temperature=0.0)
    assert greedy.key == replace(greedy, top_k=9, top_p=0.1, seed=5).key != CARD.key


def test_a_store_of_something_else_is_refused_with_the_difference(
    tmp_path: Path, prompts: LeadingTokens
) -> None:
    """Of the nearest one, with both values and the way out; fingerprints are short."""
    write(tmp_path, prompts)
    write(tmp_path, prompts, replace(CARD, model="x" * 64, seed=4))
    with pytest.raises(DataError, match=rf"{CARD.key}, have seed 0 \(wanted: 1\)\. Generate .*--by teacher`"):
        opened(tmp_path, prompts, replace(CARD, seed=1))
    with pytest.raises(DataError, match=r"have model mmmmmmmmmmmm \(wanted: nnnnnnnnnnnn\)"):
        opened(tmp_path, prompts, replace(CARD, model="n" * 64))
    with pytest.raises(DataError, match=r"holds no responses; make them with `ddkmix generate CONFIG --by"):
        opened(tmp_path / "nothing", prompts)


def test_a_store_that_was_renamed_by_hand_is_not_taken(tmp_path: Path, prompts: LeadingTokens) -> None:
    """Under a wrong name nobody finds it; under another's name its card says what it is."""
    store = write(tmp_path, prompts, replace(CARD, seed=9))
    store.rename(tmp_path / CARD.key)
    with pytest.raises(DataError, match=r"have seed 9 \(wanted: 0\)"):
        find_store(tmp_path, CARD)
    with pytest.raises(DataError, match="describes another store than its folder's name; delete the folder"):
        write_card(tmp_path / CARD.key, CARD)
    (tmp_path / CARD.key).rename(tmp_path / "mine")
    with pytest.raises(DataError, match="the nearest, mine, have the right card, but not its name"):
        find_store(tmp_path, replace(CARD, seed=9))


def test_a_card_comes_back(tmp_path: Path) -> None:
    """And writing it twice is one card."""
    write_card(tmp_path / "store", CARD)
    write_card(tmp_path / "store", replace(CARD, by="student"))
    assert CARD == read_card(tmp_path / "store")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a store.json that ddkmix wrote"),
        ("[]", "is not a store.json that ddkmix wrote"),
        ('{"format": 2}', "is of another version of ddkmix"),
        ('{"format": 1, "stop_ids": [1]}', "is not a store.json that ddkmix wrote .*missing"),
    ],
)
def test_a_damaged_card_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    """With the way out."""
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(DataError, match=f"{message}.*generate again"):
        read_card(tmp_path)


# --- damage ---------------------------------------------------------------------------------------------


def test_a_shard_without_responses_is_counted_and_named(tmp_path: Path, prompts: LeadingTokens) -> None:
    """Before a run, and where it is read."""
    store = write(tmp_path, prompts)
    response_path(store, prompts, 1).unlink()
    found = opened(tmp_path, prompts)
    assert {"math": 1} == found.missing()
    with pytest.raises(DataError, match=r"1\.tar.*is missing; generate it with `ddkmix generate CONFIG`"):
        found.read(("math", 1, 0))
    assert found.read(("math", 0, 0)).ended


def test_a_damaged_file_is_found_with_those_that_are_missing(tmp_path: Path, prompts: LeadingTokens) -> None:
    """Not at its first row, hours later."""
    path = response_path(write(tmp_path, prompts), prompts, 1)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"1\.tar"):
        opened(tmp_path, prompts).missing()


def test_responses_to_other_prompts_of_the_same_rows_are_others(
    tmp_path: Path, rows: DomainRows, prompts: LeadingTokens
) -> None:
    """Where prompts end elsewhere nothing is there, and a file renamed by hand is found out."""
    store = write(tmp_path, prompts)
    other = LeadingTokens(rows, [np.array([1, 2]), np.array([1, 1])])
    assert {"math": 1} == opened(tmp_path, other).missing()
    response_path(store, prompts, 0).rename(response_path(store, other, 0))
    with pytest.raises(DataError, match=r"answers prompts of other lengths. Delete it and generate again"):
        open_responses(store, other, 0)


def test_responses_to_other_rows_are_refused(tmp_path: Path, prompts: LeadingTokens) -> None:
    """A file that says it is of another shard."""
    store = write(tmp_path, prompts)
    response_path(store, prompts, 1).replace(response_path(store, prompts, 0))
    with pytest.raises(DataError, match=r"has 2 rows of the shard .*Delete it and generate again"):
        opened(tmp_path, prompts).read(("math", 0, 0))


def test_a_damaged_response_names_its_row_and_others_are_served(
    tmp_path: Path, prompts: LeadingTokens
) -> None:
    """By its checksum."""
    path = response_path(write(tmp_path, prompts), prompts, 0)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 1] ^= 1
    path.write_bytes(data)
    store = opened(tmp_path, prompts)
    with pytest.raises(RowError, match=r"math/0\.tar#0: its response in .* is damaged: .*generate again"):
        store.read(("math", 0, 0))
    assert 5 == len(store.read(("math", 0, 1)).ids)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no tokens"),
        (b"\1\0\2", "3 bytes are no tokens"),
        (b"\1\0" * 6, "6 tokens up to 1, where 5 below 300 may be"),
        (b"\x2c\1", "1 tokens up to 300, where 5 below 300 may be"),
    ],
)
def test_bytes_that_no_response_has_are_refused(data: bytes, message: str) -> None:
    """Too many, too large, cut or nothing at all."""
    with pytest.raises(RowError, match=message):
        decode(data, CARD, "<u2")


def test_totals_count_rows_tokens_ends_and_silence() -> None:
    """A response is empty that has only tokens which end or pad; through a file's facts and back."""
    answers = [[11, 7], [3, 3, 3, 3, 3], [0], [3, 7], [12, 13, 14, 15, 16]]
    responses = [Response(ids=np.array(ids), ended=ids[-1] in (0, 7)) for ids in answers]
    totals = totals_of(responses, frozenset((0, 7, 3)))
    assert ResponseTotals(rows=5, tokens=15, ended=3, empty=3) == totals
    assert {"rows": "5", "tokens": "15", "ended": "3", "empty": "3"} == totals.to_facts()


def test_a_file_without_totals_is_refused(tmp_path: Path, prompts: LeadingTokens) -> None:
    """One line."""
    store = write(tmp_path, prompts)
    file = open_responses(store, prompts, 0)
    assert ResponseTotals(rows=2, tokens=7) == totals_of_file(file)
    with pytest.raises(DataError, match="lacks its totals; delete it and generate again"):
        totals_of_file(replace(file, facts={"rows": "2"}))


def test_cards_are_json_that_people_can_read(tmp_path: Path) -> None:
    """Whose responses they are stands in it."""
    write_card(tmp_path, CARD)
    tree = json.loads((tmp_path / "store.json").read_text())
    assert ("teacher", "models/teacher", [0, 7]) == (tree["by"], tree["name"], tree["stop_ids"])


# --- prompts of packed rows -------------------------------------------------------------------------


def with_prompts(rows: DomainRows, *lengths: list[int]) -> DomainRows:
    """Rows whose first tokens are prompts, so many in each row of each shard."""
    shards = zip(rows.shards, lengths, strict=True)
    own = tuple(replace(shard, num_prompt_tokens=np.array(counts)) for shard, counts in shards)
    return replace(rows, shards=own)


def test_the_prompts_of_rows_are_their_first_tokens(rows: DomainRows) -> None:
    """As many of each as its index says; of text there are none."""
    found = leading_prompts(with_prompts(rows, [2, 1], [1, 2]))
    assert found is not None
    assert ("math", [2, 1], [1, 2]) == (found.domain, *(found.num_tokens(i).tolist() for i in range(2)))
    assert [[5], [1, 2]] == [ids.tolist() for ids in found.read(0, [1, 0])]
    assert [[7], [8, 9]] == [ids.tolist() for ids in found.read(1, [0, 1])]
    assert leading_prompts(rows) is None


def test_a_prompt_longer_than_its_row_is_refused(rows: DomainRows) -> None:
    """The index is damaged, or somebody else's."""
    with pytest.raises(DataError, match="a prompt of 2 tokens in a row of 1; pack it again"):
        leading_prompts(with_prompts(rows, [2, 2], [2, 2]))
