"""Tables of a page: they scroll in a box of their own, so that the page never does."""

from collections.abc import Mapping, Sequence

from ddkmix.report.markup import Html, element, join


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    classes: Mapping[int, str] | None = None,
) -> Html:
    """A table whose first cell in a row is that row's heading.

    Args:
        caption: what it holds; stands above, and is the name of the box for those who reach it by keyboard.
        header: a title for each column.
        rows: cells, as text or markup.
        classes: of whole columns, by their number: "text" is left-aligned, "bar" is wide.
    """
    kind = (classes or {}).get
    head = [element("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(header)]
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row", title=row[0]),
            *(element("td", cell, class_=kind(i)) for i, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    ]
    whole = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *lines),
    )
    box = element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")
    # not a <caption>: it would be as wide as the table, and be cut off with it
    return join(element("p", caption, class_="caption"), box)
