"""HTML and SVG as values: text is escaped where it enters, so nothing can be forgotten later.

`element` takes plain text and markup alike and tells them by their type. Only this module makes `Html` of
what it was given; everything else is put together from elements.
"""

import html
import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that HTML forbids or that turn the order of the text around them; shown by their number."""
_EMPTY = {"meta", "link", "path", "line", "circle", "rect", "col"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: str) -> Html:
    """Text as it is to be read, safe in an element and in a quoted attribute."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(value), quote=True))


def visible(value: str) -> str:
    """Plain text with control characters and those that turn the reading order shown by their number."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", value)


def element(_name: str, /, *children: str, **attributes: str | int | float | None) -> Html:
    """An element; plain text in it and in its attributes is escaped.

    Args:
        _name: of the element.
        children: markup, or text.
        attributes: `_` in a name stands for `-`, one at its end is left out (`class_`); those that are None
            are left out, numbers are written short.
    """
    head = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if _name in _EMPTY and not children:
        return Html(f"<{_name}{head}/>")
    return Html(f"<{_name}{head}>{''.join(map(text, children))}</{_name}>")


def join(*parts: str) -> Html:
    """Markup and text one after the other."""
    return Html("".join(map(text, parts)))


def raw_style(css: str) -> Html:
    """A style sheet; it must be ours, as what it holds is not escaped."""
    assert "<" not in css
    return Html(f"<style>{css}</style>")


def _short(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{round(value, 2):g}"
