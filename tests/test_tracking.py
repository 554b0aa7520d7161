"""What a run writes down: JSON lines that can be rewound, and a bar that only a terminal sees."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.errors import RunError
from ddkmix.records import read_lines
from ddkmix.tracking import JsonLines, progress_bar, weights_note


def steps_in(path):
    """The steps of a file of lines."""
    return [record["step"] for record in read_lines(path)]


def written(path, count):
    """A file of lines with the steps 0 .. count - 1."""
    lines = JsonLines(path)
    for step in range(count):
        lines.append({"step": step, "value": step / 3})
    return lines


def test_records_are_read_back_as_they_were_written(tmp_path):
    """One JSON object per line, in order, floats to the last bit, any script."""
    records = [{"step": 0, "loss": 1 / 3}, {"step": 1, "name": "日本 é", "nested": {"a": [1, None]}}]
    lines = JsonLines(tmp_path / "log.jsonl")
    for record in records:
        lines.append(record)
    assert records == list(read_lines(lines.path))
    assert 2 == len(lines.path.read_text().splitlines())


def test_a_line_is_in_the_file_when_append_returns(tmp_path):
    """Another reader sees it at once: nothing waits in a buffer for the end of the process."""
    lines = written(tmp_path / "log.jsonl", 1)
    assert b'{"step": 0, "value": 0.0}\n' == lines.path.read_bytes()


def test_rewinding_drops_the_lines_of_that_step_and_later(tmp_path):
    """A run that goes on from step 2 writes the lines 2, 3, ... again."""
    lines = written(tmp_path / "log.jsonl", 5)
    lines.rewind(2)
    assert [0, 1] == steps_in(lines.path)


def test_lines_that_stay_keep_their_bytes(tmp_path):
    """An interrupted run leaves the very bytes of an uninterrupted one."""
    lines, whole = written(tmp_path / "log.jsonl", 5), written(tmp_path / "whole.jsonl", 5)
    lines.rewind(3)
    for step in (3, 4):
        lines.append({"step": step, "value": step / 3})
    assert whole.path.read_bytes() == lines.path.read_bytes()


def test_a_torn_last_line_is_not_read(tmp_path):
    """What a killed process left unfinished is no record."""
    lines = written(tmp_path / "log.jsonl", 3)
    with lines.path.open("a") as file:
        file.write('{"step": 3, "val')
    assert [0, 1, 2] == steps_in(lines.path)


def test_a_torn_last_line_is_dropped_when_rewinding(tmp_path):
    """Even if no whole line has to go, the next record starts on a line of its own."""
    lines = written(tmp_path / "log.jsonl", 3)
    with lines.path.open("a") as file:
        file.write('{"step": 3, "val')
    lines.rewind(3)
    lines.append({"step": 3})
    assert [0, 1, 2, 3] == steps_in(lines.path)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 7), st.integers(0, 30))
def test_whatever_a_kill_cut_off_the_lines_before_it_are_whole(tmp_path_factory, count, step, cut):
    """For every length of the file that is left: all whole lines before `step`, and nothing else."""
    lines = written(tmp_path_factory.mktemp("log") / "log.jsonl", count)
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole[: max(len(whole) - cut, 0)])
    complete = lines.path.read_bytes().count(b"\n")
    lines.rewind(step)
    assert list(range(min(complete, step))) == steps_in(lines.path)


def test_rewinding_to_the_start_leaves_an_empty_file(tmp_path):
    """Everything is to be written again."""
    lines = written(tmp_path / "log.jsonl", 3)
    lines.rewind(0)
    assert b"" == lines.path.read_bytes()


def test_rewinding_what_was_never_written_does_nothing(tmp_path):
    """A run that starts has no log yet, and gets none from being rewound."""
    JsonLines(tmp_path / "log.jsonl").rewind(0)
    assert not (tmp_path / "log.jsonl").exists()


def test_rewinding_leaves_no_other_file(tmp_path):
    """The file is replaced in one move; its temporary twin is gone."""
    written(tmp_path / "log.jsonl", 3).rewind(1)
    assert ["log.jsonl"] == [path.name for path in tmp_path.iterdir()]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    """A folder in its place: the path, the reason and the way out."""
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunError, match=r"log.jsonl cannot be written \(.+\); free space") as error:
        JsonLines(tmp_path / "log.jsonl").append({"step": 0})
    assert "\n" not in str(error.value)


@pytest.fixture
def plain_terminal(monkeypatch):
    """No variable of the environment tells rich what stderr is."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def drive(shown):
    """Use a bar as a run does."""
    with progress_bar("train", total=10, shown=shown) as bar:
        for step in range(11):
            bar.update(step, total=10, note=f"loss {step}")


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_is_silent_where_stderr_is_no_terminal(shown, capfd, plain_terminal):
    """In a file or a pipe, where nobody watches, not one character is written."""
    drive(shown)
    assert ("", "") == capfd.readouterr()


def test_the_bar_shows_on_a_terminal(capfd, monkeypatch, plain_terminal):
    """The test above can fail: told that stderr is a terminal, it shows task, count and note."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    drive(True)
    out, err = capfd.readouterr()
    assert "" == out
    assert "train" in err
    assert "10/10" in err
    assert "loss 10" in err


def test_the_bar_of_other_ranks_is_silent_even_on_a_terminal(capfd, monkeypatch, plain_terminal):
    """Only the main rank shows one."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    drive(False)
    assert ("", "") == capfd.readouterr()


def test_weights_in_a_few_characters():
    """Two digits and no leading zero; a weight of 1 keeps its one."""
    assert "code .21 math .79 rest .00" == weights_note({"code": 0.2143, "math": 0.7857, "rest": 0.0})
    assert "code 1.00" == weights_note({"code": 1.0})


def test_lines_are_json_for_everybody(tmp_path):
    """Each line alone is a JSON object; other programs need nothing of ours."""
    lines = written(tmp_path / "log.jsonl", 3)
    assert [0, 1, 2] == [json.loads(line)["step"] for line in lines.path.read_text().splitlines()]


def test_the_last_line_is_the_last_whole_one(tmp_path):
    """None without a file or a line; a torn line does not count."""
    lines = JsonLines(tmp_path / "x.jsonl")
    assert lines.last() is None
    lines.append({"step": 1})
    lines.append({"step": 2})
    with lines.path.open("a") as file:
        file.write('{"step": 3')
    assert {"step": 2} == lines.last()


def test_a_warning_is_one_line_on_stderr_as_it_is(capsys):
    """Where there is no terminal, too: not folded, not coloured, brackets and colons untouched."""
    line = "code [bold] reaches :smile: its limit " + "x" * 200
    with progress_bar("train", total=3, shown=True) as bar:
        bar.warn(line)
    captured = capsys.readouterr()
    assert ("", f"ddkmix: warning: {line}\n") == (captured.out, captured.err)
