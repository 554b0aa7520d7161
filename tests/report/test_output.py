"""Where reports go, and what they never write over."""

import sys
from pathlib import Path

import pytest

from ddkmix.cli import main
from ddkmix.errors import ConfigError, RunError
from ddkmix.report.output import destination
from ddkmix.report.page import render_page
from ddkmix.report.story import story_of_run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert 2 == end.value.code
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n")), err
    return err


def test_a_page_goes_to_standard_output_or_to_a_file(
    recorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes; the file's name goes to stderr, so that pipes stay clean."""
    expected = render_page(story_of_run(recorded_run))
    main(["show", str(recorded_run), "--format", "html"])
    assert (expected, "") == tuple(capsys.readouterr())
    path = tmp_path / "deep" / "gaps.html"
    main(["show", str(recorded_run), "--output", str(path)])
    assert ("", f"report: {path}\n") == tuple(capsys.readouterr())
    assert expected == path.read_text(encoding="utf-8")
    assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.json", '[\n {\n  "step": 0'), ("a.md", "**loss gap"), ("a.txt", "loss gap (nats per token)\n")],
)
def test_the_ending_says_the_format(recorded_run: Path, tmp_path: Path, name: str, start: str) -> None:
    """Where --format does not."""
    main(["show", str(recorded_run), "-o", str(tmp_path / name)])
    assert (tmp_path / name).read_text().startswith(start)


def test_the_format_that_is_said_wins_over_the_ending(recorded_run: Path, tmp_path: Path) -> None:
    """A page may have any name."""
    main(["show", str(recorded_run), "--format", "html", "-o", str(tmp_path / "page.txt")])
    assert (tmp_path / "page.txt").read_text().startswith("<!doctype html>")


def test_a_page_of_ours_is_replaced_and_nothing_else_is(
    recorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's file stays as it is, and the command says so before it does anything."""
    path = tmp_path / "report.html"
    for _ in range(2):
        main(["show", str(recorded_run), "-o", str(path)])
    capsys.readouterr()
    path.write_text("<!doctype html><title>my thesis</title>")
    message = f"--output {path} exists and is no page or picture of ddkmix; replace it with --force, "
    assert message in refused(capsys, "show", str(recorded_run), "-o", str(path))
    assert "my thesis" in path.read_text()


def test_text_is_replaced_where_that_is_said(
    recorded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON bears no mark of ours; a folder is never replaced."""
    path = tmp_path / "report.json"
    main(["show", str(recorded_run), "-o", str(path)])
    first = path.read_text()
    capsys.readouterr()
    assert "--force" in refused(capsys, "show", str(recorded_run), "-o", str(path))
    path.write_text("old")
    main(["show", str(recorded_run), "-o", str(path), "--force"])
    assert first == path.read_text()
    capsys.readouterr()
    with_format = ("--format", "json", "--force")
    assert "is a folder" in refused(capsys, "show", str(recorded_run), "-o", str(tmp_path), *with_format)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "pdf"), "--format pdf: must be table, json, markdown, html or png."),
        (("--output", "gaps.pdf"), "--output gaps.pdf: say the --format, or end the name in .html, "),
        (("--format", "png"), "--format png: a picture goes to a file; add --output FILE.png."),
        (("--output", "."), "--output . is a folder; name a file in it."),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """The run does not exist either; `gaps` would have measured for minutes."""
    extra = ("--format", "html") if arguments == ("--output", ".") else ()
    assert message in refused(capsys, "show", "/nowhere", *arguments, *extra)
    assert message in refused(capsys, "gaps", "/nowhere.yaml", *arguments, *extra)


def test_a_page_is_not_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred kilobytes of markup help nobody there."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(
        ConfigError, match=r"a page is not for a terminal; add --output FILE.html, or redirect"
    ):
        destination("html", None)
    assert "table" == destination(None, None).style


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is missing, and how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as error:
        destination("png", tmp_path / "a.png")
    expected = "--format png: matplotlib is not installed; pip install 'ddkmix[plots]'."
    assert expected == str(error.value)


def test_a_full_disk_leaves_nothing_behind(recorded_run: Path, tmp_path: Path) -> None:
    """The folder has become a file in the meantime: one line, and no half page."""
    target = destination("html", tmp_path / "later" / "a.html")
    (tmp_path / "later").write_text("")
    with pytest.raises(RunError, match=r"a.html cannot be written \(File exists\); choose another --output."):
        target.send(lambda: story_of_run(recorded_run), words=lambda _: "")
    assert [tmp_path / "later"] == list(tmp_path.iterdir())
