"""The page opened by a real browser: nothing runs, nothing is asked for, nothing runs over the edge."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ddkmix.report.page import render_page
from ddkmix.report.story import story_of_run
from ddkmix.types import DomainLosses
from tests.report.browser import NAMES, Browser, find_chromium
from tests.report.conftest import HOSTILE, many

Retold = Callable[..., Path]
CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)}, and DDKMIX_CHROMIUM is not set"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    assert CHROMIUM is not None
    found = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def page_of(run: Path) -> Path:
    """Its page, in a file beside it."""
    path = run / "report.html"
    path.write_text(render_page(story_of_run(run)), encoding="utf-8")
    return path


TEXTS = """
[...document.querySelectorAll('svg.chart, svg.small')].map(svg => ({
  box: svg.getBoundingClientRect().toJSON(),
  texts: [...svg.querySelectorAll('text')].map(x => [x.textContent, x.getBoundingClientRect().toJSON()]),
})).filter(drawn => drawn.box.width > 0)
"""
Box = dict[str, float]


def overlap(a: Box, b: Box) -> bool:
    """Whether two texts lie over each other; letters do not fill the two pixels at the edges of their box."""
    across = min(a["right"], b["right"]) - max(a["left"], b["left"])
    return across > 0 and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 4


def check_texts(browser: Browser) -> None:
    """Within their drawing, and none over another."""
    drawings = browser.ask(TEXTS)
    assert drawings
    for drawn in drawings:
        frame = drawn["box"]
        for i, (words, box) in enumerate(drawn["texts"]):
            assert frame["left"] - 1 <= box["left"], words
            assert box["right"] <= frame["right"] + 1, words
            assert frame["top"] - 3 <= box["top"], words
            assert box["bottom"] <= frame["bottom"] + 3, words
            assert [] == [other for other, place in drawn["texts"][:i] if overlap(box, place)], words


def opened(browser: Browser, path: Path, *, width: int, dark: bool = False) -> None:
    """Open a page and check what must hold of every one."""
    browser.open(path, width=width, dark=dark)
    assert [] == browser.complaints()
    assert [path.as_uri()] == [url for url in browser.requests() if not url.startswith("data:")]
    assert 0 == browser.ask("document.scripts.length")
    assert width >= browser.ask("document.documentElement.scrollWidth")


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "in progress"])
@pytest.mark.parametrize("names", [HOSTILE, many(60)], ids=["3 hostile names", "60 domains"])
def test_a_page_opens_on_a_phone_and_on_a_screen(
    browser: Browser, retold: Retold, names: Sequence[str], finished: bool
) -> None:
    """In light and dark: no error, no dialog, no request, no sideways scrolling; charts are as wide as their
    place, and every name stands in the table as it is."""
    path = page_of(retold(names, finished=finished))
    for width, dark in ((390, False), (1200, True)):
        opened(browser, path, width=width, dark=dark)
        background = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert ("rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)") == background
    shown = browser.ask("[...document.querySelector('table').querySelectorAll('tbody th')].map(x => x.title)")
    assert sorted(name.replace("\u202e", "\\u202e") for name in names) == sorted(shown)
    status = browser.ask("document.querySelector('header p').textContent")
    assert ("Finished: 12 steps." if finished else "Not finished: step 10 of 12") in status
    widths = "[...document.querySelectorAll('svg.chart')].map(x => x.getBoundingClientRect().width)"
    assert min(browser.ask(widths)) > 300


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("names", [HOSTILE, many(9)], ids=["3 hostile names", "9 domains"])
def test_numbers_and_names_in_charts_lie_beside_each_other(
    browser: Browser, retold: Retold, names: Sequence[str], width: int
) -> None:
    """Of a long run as well, whose steps are numbers of four digits and more."""
    run = retold(names)
    for file in ("intervals.jsonl", "metrics.jsonl"):
        records = [json.loads(line) for line in (run / file).read_text().splitlines()]
        lines = [json.dumps({**record, "step": record["step"] * 2500 // 3}) for record in records]
        (run / file).write_text("\n".join(lines) + "\n")
    opened(browser, page_of(run), width=width)
    check_texts(browser)


@pytest.mark.parametrize("width", [390, 1200])
def test_whiskers_are_as_long_as_the_intervals(browser: Browser, retold: Retold, width: int) -> None:
    """On the screen: bars and whiskers in pixels are to each other as gaps and intervals."""
    run = retold(many(3))
    story = story_of_run(run)
    opened(browser, page_of(run), width=width)
    measured = browser.ask(
        "[...document.querySelectorAll('tbody svg.gap')].map(svg => ["
        "svg.querySelector('.bar').getBoundingClientRect().width,"
        "svg.querySelector('.whisker').getBoundingClientRect().width])"
    )
    gaps = np.abs(story.now("loss_gap"))
    low, high = DomainLosses.from_json(story.last.losses).gap_interval()
    intervals = sorted((high - low).tolist())  # by name there, by gap here
    assert not browser.ask("document.querySelectorAll('.arrow').length")
    scale = measured[0][0] / gaps[0]
    assert [bar for bar, _ in measured] == pytest.approx((scale * gaps).tolist(), abs=1)
    assert sorted(whisker for _, whisker in measured) == pytest.approx(
        [scale * whole for whole in intervals], abs=1.5
    )


def test_a_table_that_goes_on_says_so(browser: Browser, retold: Retold) -> None:
    """On a phone: three numbers and a shadow at the edge, which paper does not need."""
    opened(browser, page_of(retold(many(3))), width=390)
    shadow = "getComputedStyle(document.querySelector('.scroll')).backgroundAttachment"
    assert "local, local, scroll, scroll" == browser.ask(shadow)
    shown = "[...document.querySelector('tbody tr').children].map(x => x.getBoundingClientRect().right)"
    assert 4 <= sum(right <= 390 for right in browser.ask(shown))


def test_a_page_prints(browser: Browser, retold: Retold) -> None:
    """As a PDF of several pages, in the colours of paper although the screen is dark, closed parts open."""
    path = page_of(retold(many(60)))
    opened(browser, path, width=1200, dark=True)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF-")
    assert 3 < pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") < 40
    browser.call("Emulation.setEmulatedMedia", {"media": "print"})
    assert "rgb(255, 255, 255)" == browser.ask("getComputedStyle(document.body).backgroundColor")
    assert browser.ask("document.querySelector('pre').checkVisibility({contentVisibilityAuto: true})")
    browser.call("Emulation.setEmulatedMedia", {"media": ""})


def test_one_evaluation_opens(browser: Browser, recorded_copy: Path) -> None:
    """A run that has only begun, and numbers that are not known."""
    path = recorded_copy / "intervals.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(first + "\n")
    (recorded_copy / "metrics.jsonl").unlink()
    opened(browser, page_of(recorded_copy), width=390)
    assert "One evaluation so far" in browser.ask("document.body.textContent")


def test_a_page_that_misbehaves_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    """The checks can fail: a script that speaks, an image from elsewhere, a box that is too wide."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta name=viewport content='width=device-width'><script>console.log(1)</script>"
        "<img src='http://example.invalid/x.png'><div style='width:900px'>x</div>"
    )
    browser.open(path, width=390)
    assert browser.complaints()
    assert "http://example.invalid/x.png" in browser.requests()
    assert 1 == browser.ask("document.scripts.length")
    assert 390 < browser.ask("document.documentElement.scrollWidth")


def test_the_pages_own_policy_stops_what_would_get_in(browser: Browser, recorded_copy: Path) -> None:
    """Were a name ever to become markup, the browser would still refuse its script and its style."""
    path = page_of(recorded_copy)
    whole = path.read_text(encoding="utf-8")
    path.write_text(
        whole.replace("<main>", "<main><script>document.title = 'x'</script><p style='color:red'>")
    )
    browser.open(path, width=390)
    assert browser.ask("document.title").endswith("ddkmix")
    assert 2 == sum("Content Security Policy" in str(event) for event in browser.complaints())
