"""Layouts: every token once, documents whole where they fit, and as few rows as best fit promises."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddkmix import row_layout as module
from ddkmix.row_layout import RowLayout, Strategy, best_fit_decreasing, row_layout

documents = st.lists(st.integers(1, 40), max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int64))
Pack = Callable[[np.ndarray, int], np.ndarray]
STRATEGIES: tuple[Strategy, ...] = ("concatenate", "best_fit")


def table(layout: RowLayout, lengths: np.ndarray) -> list[list[tuple[int, int]]]:
    """Each row as a list of (document, token of it), in the order of the row."""
    owner = [(doc, token) for doc, length in enumerate(lengths.tolist()) for token in range(length)]
    rows: list[dict[int, tuple[int, int]]] = [{} for _ in range(layout.num_rows)]
    slices = zip(layout.start.tolist(), layout.length.tolist(), layout.place.tolist(), strict=True)
    for start, length, place in slices:
        for i in range(length):
            row, column = divmod(place + i, layout.seq_len)
            assert column not in rows[row], "two tokens in one place"
            rows[row][column] = owner[start + i]
    for row in rows:
        assert set(range(len(row))) == set(row), "padding inside a row"
    return [[row[column] for column in range(len(row))] for row in rows]


def rows_of(lengths: list[int], seq_len: int, strategy: Strategy = "best_fit") -> list[list[str]]:
    """Each row as its pieces: "b" a whole document, "b0" and "b1" the parts of a cut one."""
    array = np.array(lengths, dtype=np.int64)
    found = []
    for row in table(row_layout(array, seq_len, strategy), array):
        pieces: list[str] = []
        for doc, token in row:
            part = "" if lengths[doc] <= seq_len else str(token // seq_len)
            name = f"{chr(ord('a') + doc)}{part}"
            pieces += [] if name in pieces else [name]
        found.append(pieces)
    return found


# --- by hand ----------------------------------------------------------------------------------------


def test_the_example_of_the_paper() -> None:
    """Figure 1 of arXiv 2404.10830: rows of 8, documents of 14, 7, 5, 2 and 3 tokens.

    The first is a full row and 6 more, which the document of 2 fills up; 5 and 3 make a row. Four rows, as
    many as concatenation needs for 31 tokens, and only the document that fits nowhere is cut.
    """
    assert [["a0"], ["a1", "d"], ["b"], ["c", "e"]] == rows_of([14, 7, 5, 2, 3], 8)


def test_the_tightest_row_is_taken() -> None:
    """When the 1 comes, a has 2 left and b with c has 1: first fit would take a, best fit leaves it."""
    assert [["a"], ["b", "c", "d"]] == rows_of([8, 6, 3, 1], 10)


def test_a_document_that_fits_exactly_is_whole() -> None:
    """Rows of 8 hold 8; with 9 one token goes on in another row, before the document that it shares with."""
    assert [["a"]] == rows_of([8], 8)
    assert [["a0"], ["a1", "b"]] == rows_of([9, 3], 8)


def test_a_remainder_begins_its_row() -> None:
    """The 3 tokens left of c come before a, whose row it is: nothing says that c begins there."""
    assert [["c1", "a", "d"], ["b"], ["c0"]] == rows_of([4, 7, 11, 1], 8)


def test_rows_follow_the_documents() -> None:
    """Not the order in which best fit opens them, which is by length."""
    assert [["a"], ["b"], ["c"], ["d"]] == rows_of([5, 8, 6, 7], 8)


def test_concatenation_by_hand() -> None:
    """31 tokens in rows of 8: documents are cut wherever a row ends."""
    assert [0, 8, 16, 24] == row_layout(np.array([14, 7, 5, 2, 3]), 8, "concatenate").place.tolist()
    assert [8, 8, 8, 7] == row_layout(np.array([14, 7, 5, 2, 3]), 8, "concatenate").num_tokens().tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_documents_make_no_rows(strategy: Strategy) -> None:
    """A shard whose documents were all dropped."""
    layout = row_layout(np.zeros(0, dtype=np.int64), 8, strategy)
    assert 0 == layout.num_rows == len(layout.num_tokens())
    assert 0 == layout.num_truncated(np.zeros(0, dtype=np.int64))


def test_cut_documents_by_hand() -> None:
    """Concatenated, 14 | 7 | 5 | 2 | 3 lie in rows 0-1, 1-2, 2-3, 3, 3: three are cut. Best fit: the 14."""
    lengths = np.array([14, 7, 5, 2, 3])
    assert 3 == row_layout(lengths, 8, "concatenate").num_truncated(lengths)
    assert 1 == row_layout(lengths, 8, "best_fit").num_truncated(lengths)


# --- for all documents ------------------------------------------------------------------------------


def check(lengths: np.ndarray, seq_len: int, strategy: Strategy) -> None:
    """Every promise of a layout."""
    layout = row_layout(lengths, seq_len, strategy)
    rows = table(layout, lengths)
    everything = [place for row in rows for place in row]
    assert sorted(everything) == [(d, t) for d, n in enumerate(lengths.tolist()) for t in range(n)]
    assert [len(row) for row in rows] == layout.num_tokens().tolist()
    assert all(0 < len(row) <= seq_len for row in rows)
    assert layout.num_rows * seq_len - int(lengths.sum()) == sum(seq_len - len(row) for row in rows)
    rows_with = [{i for i, row in enumerate(rows) for doc, _ in row if doc == d} for d in range(len(lengths))]
    assert sum(len(where) > 1 for where in rows_with) == layout.num_truncated(lengths)
    if strategy == "concatenate":
        assert everything == sorted(everything)
        assert layout.num_rows == -(-int(lengths.sum()) // seq_len)
        return
    for doc, length in enumerate(lengths.tolist()):
        assert -(-length // seq_len) == len(rows_with[doc]), "a document is cut more often than it must be"
    assert [min(row) for row in rows] == sorted(min(row) for row in rows)
    for row in rows:
        pieces = [place for i, place in enumerate(row) if i == 0 or row[i - 1][0] != place[0]]
        assert pieces == sorted(pieces, key=lambda piece: (piece[1] == 0, piece[0])), "order in the row"
        assert len(pieces) == len({doc for doc, _ in pieces}), "a piece is not contiguous"
        assert all(b == a + 1 for (p, a), (q, b) in itertools.pairwise(row) if p == q)
    emptiest = sorted(layout.num_tokens().tolist())[:2]
    assert len(rows) < 2 or sum(emptiest) > seq_len, "two rows could be one"


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None, derandomize=True, max_examples=200)
@given(lengths=documents, seq_len=st.integers(1, 24))
@example(lengths=np.array([25]), seq_len=24)
@example(lengths=np.array([24, 48, 1]), seq_len=24)
def test_every_token_has_one_place(strategy: Strategy, lengths: np.ndarray, seq_len: int) -> None:
    """Tokens once each, documents contiguous and whole where they can be, rows filled from the front."""
    check(lengths, seq_len, strategy)


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook: what is left in each bin, by looking at all of them for every piece."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


def check_is_best_fit(pack: Pack, lengths: np.ndarray, capacity: int) -> None:
    """The bins are as full as those of the textbook, and hold no more than they can."""
    filled = np.bincount(pack(lengths, capacity), weights=lengths)
    assert plain_best_fit_decreasing(lengths.tolist(), capacity) == sorted(capacity - filled)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(1, 30), max_size=60).map(np.array), st.integers(30, 90))
def test_it_is_best_fit_decreasing(lengths: np.ndarray, capacity: int) -> None:
    """Whatever bin is taken among equals, the bins end equally full."""
    check_is_best_fit(best_fit_decreasing, lengths.astype(np.int64), capacity)


def test_equals_go_to_bins_in_their_order() -> None:
    """Deterministic to the last tie: four of 4 into bins of 8, the first two together."""
    assert [0, 0, 1, 1] == best_fit_decreasing(np.array([4, 4, 4, 4]), 8).tolist()


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Decreasing, but into the first bin with space."""
    left: list[int] = []
    bins = np.zeros(len(lengths), dtype=np.int64)
    for i in np.argsort(-lengths, kind="stable").tolist():
        fitting = [b for b, space in enumerate(left) if space >= lengths[i]] or [len(left)]
        left += [capacity] if fitting[0] == len(left) else []
        left[fitting[0]] -= int(lengths[i])
        bins[i] = fitting[0]
    return bins


def increasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best fit, but the shortest first: the documents turned round."""
    order = np.argsort(lengths, kind="stable")
    bins = np.zeros(len(lengths), dtype=np.int64)
    left: list[int] = []
    for i in order.tolist():
        fitting = [b for b, space in enumerate(left) if space >= lengths[i]]
        chosen = min(fitting, key=lambda b: left[b]) if fitting else len(left)
        left += [] if fitting else [capacity]
        left[chosen] -= int(lengths[i])
        bins[i] = chosen
    return bins


@pytest.mark.parametrize(
    ("sabotage", "lengths"), [(first_fit, [8, 6, 3, 1]), (increasing, [6, 7, 3, 3, 4, 2, 2, 1])]
)
def test_the_check_notices_another_rule(sabotage: Pack, lengths: list[int]) -> None:
    """The two nearest neighbours of the algorithm give bins that are filled otherwise."""
    check_is_best_fit(best_fit_decreasing, np.array(lengths), 10)
    with pytest.raises(AssertionError):
        check_is_best_fit(sabotage, np.array(lengths), 10)


def one_bin_each(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """No packing at all."""
    return np.arange(len(lengths))


def overfull(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bins with room for one token more than they have."""
    return best_fit_decreasing(lengths, capacity + 1)


@pytest.mark.parametrize("sabotage", [one_bin_each, overfull])
def test_the_check_notices_bad_rows(monkeypatch: pytest.MonkeyPatch, sabotage: Pack) -> None:
    """Rows that could be one, and rows that run into the next."""
    lengths = np.array([3, 2, 4, 11, 5])
    check(lengths, 8, "best_fit")
    monkeypatch.setattr(module, "best_fit_decreasing", sabotage)
    with pytest.raises(AssertionError):
        check(lengths, 8, "best_fit")


def test_a_large_shard_is_packed_tightly() -> None:
    """A hundred thousand documents of all lengths leave less than a hundredth of the rows empty."""
    lengths = np.random.default_rng(0).integers(1, 4096, size=100_000)
    layout = row_layout(lengths, 2048, "best_fit")
    assert layout.num_rows < 1.01 * lengths.sum() / 2048
