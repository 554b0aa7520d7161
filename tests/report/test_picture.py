"""The picture: a PNG of the right shape with our mark, whatever the names and numbers."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ddkmix.records import read_lines
from ddkmix.report.output import destination
from ddkmix.report.picture import render_picture
from ddkmix.report.story import story_of_run
from tests.report.conftest import HOSTILE, many

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'ddkmix[plots]'")
Retold = Callable[..., Path]


def size(picture: bytes) -> tuple[int, int]:
    """Width and height in pixels, out of the header."""
    assert b"\x89PNG\r\n\x1a\n" == picture[:8]
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


@pytest.mark.parametrize("names", [HOSTILE, many(9)], ids=["3 hostile names", "9 domains"])
def test_a_run_is_drawn(retold: Retold, names: Sequence[str]) -> None:
    """1,500 pixels wide and higher with more domains; no warning (a $ is no formula), not finished either."""
    width, height = size(render_picture(story_of_run(retold(names, finished=False))))
    assert 1500 == width
    assert (1500 < height < 2000) if len(names) == 3 else (1900 < height < 2500)


def test_what_is_not_known_breaks_nothing(recorded_copy: Path) -> None:
    """A domain without any number, then one evaluation alone."""
    records = list(read_lines(recorded_copy / "intervals.jsonl"))
    for record in records:
        record["losses"]["code"] = dict.fromkeys(record["losses"]["code"])
    (recorded_copy / "intervals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert size(render_picture(story_of_run(recorded_copy)))[1] > 1500
    (recorded_copy / "intervals.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert size(render_picture(story_of_run(recorded_copy)))[1] < 500


def test_a_picture_of_ours_is_replaced_and_another_is_not(recorded_run: Path, tmp_path: Path) -> None:
    """The mark lies in its metadata."""
    path = tmp_path / "gaps.png"
    for _ in range(2):
        destination(None, path).send(lambda: story_of_run(recorded_run), words=lambda _: "")
    picture = path.read_bytes()
    path.write_bytes(picture.replace(b"ddkmix report", b"somebody else"))
    with pytest.raises(Exception, match="is no page or picture of ddkmix"):
        destination(None, path)
