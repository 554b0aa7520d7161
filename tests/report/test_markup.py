"""Text becomes markup in one place, escaped."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddkmix.report.markup import Html, element, join, raw_style, text
from tests.report.conftest import HOSTILE


class Reader(HTMLParser):
    """What a browser would make of it: tags with their attributes, and the text."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Remember it."""
        self.words += data


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_text_in_elements_and_attributes(name: str) -> None:
    """One element comes out, with the name in it and in its attribute; only the character that turns the
    reading order is shown by its number."""
    shown = name.replace("\u202e", "\\u202e")
    read = Reader(element("td", name, title=name))
    assert [("td", {"title": shown})] == read.tags
    assert shown == read.words


@given(st.text(), st.text())
def test_whatever_the_text_there_is_one_element(words: str, title: str) -> None:
    """No text closes its element or opens another, and all can be encoded."""
    markup = element("p", words, title=title)
    markup.encode()
    assert ["p"] == [tag for tag, _ in Reader(markup).tags]


def test_markup_is_taken_as_it_is_and_text_is_not() -> None:
    """The type tells them apart; joining keeps it."""
    inner = element("b", "a < b")
    assert "<p><b>a &lt; b</b>&amp;</p>" == element("p", inner, "&")
    assert "<b>a &lt; b</b>&lt;i&gt;" == join(inner, "<i>")
    assert Html is type(join("x"))
    assert inner is text(inner)


def test_attributes_are_named_and_numbered_as_svg_wants_them() -> None:
    """Underscores are hyphens, one at the end is only Python's; numbers are short; None is nothing."""
    expected = '<path class="a" stroke-width="1.33" viewBox="0 0 1 1"/>'
    assert expected == element("path", class_="a", stroke_width=4 / 3, viewBox="0 0 1 1", d=None)
    assert "<td></td>" == element("td")


def test_a_style_sheet_cannot_close_itself() -> None:
    """It is ours, and asserted to be harmless."""
    assert "<style>a > b {}</style>" == raw_style("a > b {}")
    with pytest.raises(AssertionError):
        raw_style("</style>")
