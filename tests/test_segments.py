"""Positions of tokens in their documents' segments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix import segments
from ddkmix.segments import document_positions

SEP = 9
rows = st.integers(1, 12).flatmap(
    lambda seq_len: st.lists(
        st.lists(st.sampled_from([1, 2, SEP]), min_size=seq_len, max_size=seq_len), min_size=1, max_size=4
    )
)


def test_positions_by_hand() -> None:
    """A separator is the first token of the segment behind it, and padding is segments of one token."""
    ids = np.array(
        [[1, 1, 1, SEP, 2, 2, SEP, 3, 3, 3, SEP, SEP], [SEP, 1, SEP, SEP, 2, 2, 2, 2, 2, 2, 2, SEP]]
    )
    expected = [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]]
    assert expected == document_positions(ids, SEP).tolist()


def test_a_row_without_separators_is_one_segment() -> None:
    """A document that is cut where its row begins goes on from position 0."""
    assert [[0, 1, 2]] == document_positions(np.array([[5, 6, 7]], dtype=np.uint16), SEP).tolist()


def check(ids: list[list[int]]) -> None:
    """Counted with the finger: back to 0 at each separator, else one more."""
    expected = []
    for row in ids:
        positions: list[int] = []
        for token in row:
            positions.append(0 if token == SEP or not positions else positions[-1] + 1)
        expected.append(positions)
    assert expected == document_positions(np.array(ids), SEP).tolist()


@settings(derandomize=True)
@given(rows)
def test_positions_count_from_the_separator(ids: list[list[int]]) -> None:
    """Any rows, also of separators only."""
    check(ids)


def test_segments_that_end_with_their_separator_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other convention, in which a document would be predicted from nothing."""
    check([[1, SEP, 2]])
    monkeypatch.setattr(
        segments.np, "maximum", type("", (), {"accumulate": staticmethod(lambda a, axis: np.roll(a, 1))})
    )
    with pytest.raises(AssertionError):
        check([[1, SEP, 2]])
