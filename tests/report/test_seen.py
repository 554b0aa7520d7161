"""`ddkmix seen` against the truth: the batches that a trainer really got, step by step."""

import json
import shutil
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.config import parse_config
from ddkmix.errors import ConfigError, RunError
from ddkmix.loader import DomainMixture
from ddkmix.planner import plan_step
from ddkmix.records import read_lines
from ddkmix.replay import Replay
from ddkmix.report.seen import parse_steps, render_seen
from ddkmix.setup import train
from ddkmix.tracking import JsonLines
from tests.conftest import ConfigTree, write_domain

Make = Callable[..., ConfigTree]
Batches = dict[int, tuple[list[str], list[list[int]]]]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Names and tokens (without padding) of every batch that a loop in this process gets, by step."""
    batches: Batches = {}
    original = DomainMixture.__next__

    def recording(mixture: DomainMixture) -> dict[str, Any]:
        batch = original(mixture)
        assert mixture.last_plan is not None
        texts = [
            row[label != -100].tolist()
            for row, label in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        batches[mixture.last_plan.step + 1] = (mixture.row_names(mixture.last_plan), texts)
        return batch

    monkeypatch.setattr(DomainMixture, "__next__", recording)
    return batches


def run(tree: ConfigTree, *, resume: bool = False) -> Path:
    """Train; the run directory."""
    config = parse_config(tree, where="test")
    train(config, resume=resume)
    return config.run_dir


def check_every_step(run_dir: Path, batches: Batches) -> None:
    """Names, places, epochs and tokens of every step, asked for one by one and all together."""
    replay = Replay(run_dir)
    assert max(batches) == replay.last_step
    for step, (names, tokens) in batches.items():
        rows = list(replay.rows(step, step))
        assert names == [row.name for row in rows]
        assert list(range(len(names))) == [row.slot for row in rows]
        packed = replay.packed(step)
        assert tokens == [packed.tokens(row.domain, row.shard, row.row) for row in rows]
    together = [row.name for row in replay.rows(1, max(batches))]
    assert [name for step in sorted(batches) for name in batches[step][0]] == together
    replay.close()


POLICIES: dict[str, Any] = {
    "constant": {"name": "static"},
    "changing": {"name": "ddk"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_step_is_replayed_as_it_was(tiny_config: Make, record: Batches, policy: str) -> None:
    """Constant weights, and weights that change after every third step; several epochs of the smallest."""
    tree = tiny_config(
        trainer={"steps": 14, "batch_rows": 7, "log_steps": 5},
        mixture={"interval_steps": 3, "block_rows": 16},
        policy=POLICIES[policy],
    )
    check_every_step(run(tree), record)
    assert set(range(1, 15)) == set(record)


def test_every_step_is_replayed_after_caps(tiny_config: Make, record: Batches) -> None:
    """code reaches its cap in the middle of a step and the others take over; then weights change."""
    tree = tiny_config(
        trainer={"steps": 15, "batch_rows": 12},
        mixture={"interval_steps": 4, "max_epochs": 0.35},
        policy={"name": "ddk"},
    )
    run_dir = run(tree)
    last = list(read_lines(run_dir / "intervals.jsonl"))[-1]
    assert 0 < len(last["projected"]) < 3  # or nothing would be capped
    check_every_step(run_dir, record)


@pytest.mark.skipif(
    "tokens_of" not in signature(plan_step).parameters, reason="this planner knows no shares of tokens"
)
def test_every_step_is_replayed_where_weights_are_shares_of_tokens(
    tmp_path: Path, tiny_config: Make, record: Batches
) -> None:
    """Rows of many lengths decide who is served: their indices are needed, and are said to be when gone."""
    for name in ("code", "prose"):
        write_domain(tmp_path / "domains", name, shards=9, per_shard=1)
    tree = tiny_config(
        domains=[str(tmp_path / "domains")],
        cache_dir=str(tmp_path / "cache"),
        trainer={"steps": 9},
        mixture={"interval_steps": 4, "count": "tokens"},
        policy={"name": "ddk"},
    )
    run_dir = run(tree)
    check_every_step(run_dir, record)
    assert Replay(run_dir).block(1).row_sizes is not None
    shutil.rmtree(tmp_path / "cache" / "rows")
    with pytest.raises(RunError, match=r"weights are shares of tokens in this run, so its packed rows"):
        render_seen(run_dir, (3, 3), "table")


@pytest.mark.parametrize("kept", [2, 4, 7])
def test_every_step_is_replayed_after_a_resume(
    tmp_path: Path, tiny_config: Make, record: Batches, kept: int
) -> None:
    """A run that goes on from a checkpoint between, at and after weight updates."""
    sizes = {"steps": 9, "checkpoint_steps": 1, "keep_checkpoints": 99}
    tree = tiny_config(trainer=sizes, policy={"name": "ddk"})
    run_dir = run(tree)
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > kept:
            shutil.rmtree(path)
    before = (run_dir / "data.json").read_bytes()
    intervals = (run_dir / "intervals.jsonl").read_bytes()
    run(tree, resume=True)
    check_every_step(run_dir, record)
    assert before == (run_dir / "data.json").read_bytes()
    assert intervals == (run_dir / "intervals.jsonl").read_bytes()


# --- one run for everything else --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_domains: Path
) -> Iterator[Path]:
    """A folder with a finished run of 10 steps and a cache of its own."""
    folder = tmp_path_factory.mktemp("finished")
    tree = {
        "run_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "domains": [str(tiny_domains)],
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"init": "prune", "layers": [0]},
        "pack": {"seq_len": 32, "processes": 1},
        "mixture": {"interval_steps": 4},
        "trainer": {"steps": 10, "batch_rows": 6, "log_steps": 1},
        "evaluation": {"rows": 4},
    }
    run(tree)
    yield folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil; its rows are those of the original."""
    return Path(shutil.copytree(finished / "run", tmp_path / "copy"))


def records(run_dir: Path, step: int, **options: Any) -> list[dict[str, Any]]:
    """What `--format json` gives."""
    seen = render_seen(run_dir, (step, step), "json", **options)
    assert () == seen.notes
    parsed: list[dict[str, Any]] = json.loads(seen.text)
    return parsed


def test_json_has_place_and_whole_text(finished: Path, tiny_domains: Path) -> None:
    """Every field agrees with the others, and the text is that of the domain's documents."""
    rows = records(finished / "run", 10)
    assert [(10, slot) for slot in range(6)] == [(row["step"], row["slot"]) for row in rows]
    block = Replay(finished / "run").block(10)
    sizes = dict(zip(block.settings.domains, block.settings.num_rows, strict=True))
    for row in rows:
        assert f"{row['domain']}/{row['shard']}#{row['row']}" == row["name"]
        assert row["j"] // sizes[row["domain"]] == row["epoch"]
        assert row["instead_of"] is row["reason"] is None
    words = {"code": "import", "math": "lemma", "prose": "whale"}
    seen = json.loads(render_seen(finished / "run", (1, 10), "json").text)
    texts = {name: " ".join(row["text"] for row in seen if row["domain"] == name) for name in words}
    for name, text in texts.items():
        assert [word in text for word in words.values()] == [other == name for other in words]


def test_a_text_is_the_packed_documents(finished: Path, tiny_domains: Path) -> None:
    """The text of a row is a piece of the shard's documents, end to end with the separator between."""
    import tarfile

    for row in records(finished / "run", 1):
        with tarfile.open(tiny_domains / row["domain"] / row["shard"]) as tar:
            members = [tar.extractfile(member) for member in tar.getmembers()]
            whole = "".join(file.read().decode() + "<|endoftext|>" for file in members if file)
        assert row["text"] and row["text"] in whole


def test_the_table_has_a_line_per_row(finished: Path) -> None:
    """Title, header, and name, j, epoch and the beginning of the text of each row."""
    rows = records(finished / "run", 3)
    lines = render_seen(finished / "run", (3, 3), "table").text.splitlines()
    assert "step 3, 6 rows" == lines[0]
    assert ["slot", "domain", "row", "j", "epoch", "text"] == lines[2].split()
    for row, line in zip(rows, lines[4:], strict=False):
        cells = line.split(maxsplit=5)
        assert [str(row["slot"]), row["domain"], row["name"], str(row["j"]), str(row["epoch"])] == cells[:5]
        assert " ".join(row["text"][:80].split()) == cells[5].removesuffix("…").strip()
    several = render_seen(finished / "run", (3, 5), "table", chars=0).text.splitlines()
    assert "steps 3 to 5, 18 rows" == several[0]
    assert [str(step) for step in (3, 4, 5) for _ in range(6)] == [x.split()[0] for x in several[4:] if x]


def test_chars_cuts_and_zero_reads_nothing(copy: Path, finished: Path) -> None:
    """--chars 5 gives five characters and a mark; --chars 0 does not even look for the rows."""
    full = records(copy, 2)
    assert [row["text"][:5] + "…" for row in full] == [row["text"] for row in records(copy, 2, chars=5)]
    text = (copy / "data.json").read_text().replace(str(finished / "cache"), "/nowhere")
    (copy / "data.json").write_text(text)
    assert {None} == {row["text"] for row in records(copy, 2, chars=0)}


def test_one_domain_only(finished: Path) -> None:
    """--domain keeps the slots that the rows have in the whole batch."""
    rows = [row for row in records(finished / "run", 6) if row["domain"] == "math"]
    assert rows == records(finished / "run", 6, domain="math") and 0 < len(rows) < 6
    with pytest.raises(RunError, match="has no domain 'mathh'; did you mean 'math'"):
        render_seen(finished / "run", (6, 6), "table", domain="mathh")


def test_the_text_format_gives_whole_texts(finished: Path) -> None:
    """A heading for each row and its text as it is."""
    rows = records(finished / "run", 4)
    expected = "\n\n".join(
        f"=== step 4 slot {r['slot']}  {r['name']}  (j {r['j']}, epoch {r['epoch']})\n{r['text']}"
        for r in rows
    )
    assert expected == render_seen(finished / "run", (4, 4), "text").text


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "steps"), [("1", (1, 1)), ("12", (12, 12)), ("10:20", (10, 20))])
def test_steps_are_one_or_a_range(text: str, steps: tuple[int, int]) -> None:
    """Both ends of a range are included."""
    assert steps == parse_steps(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "1:", ":2", "1:2:3", "1.5"])
def test_what_is_no_step_is_one_line(text: str) -> None:
    """The value and the two forms."""
    with pytest.raises(ConfigError, match=r"must be a step, 12, or a range with both ends, 10:20"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 0), "step 0: steps count from 1, as in metrics.jsonl, and a range is FIRST:LAST"),
        ((4, 3), "step 4:3: steps count from 1, as in metrics.jsonl, and a range is FIRST:LAST"),
        ((11, 11), "step 11: {} has taken 10 of 10 steps."),
        ((9, 11), "step 11: {} has taken 10 of 10 steps."),
    ],
)
def test_wrong_steps_are_one_line(finished: Path, steps: tuple[int, int], message: str) -> None:
    """0, backwards, and beyond the last."""
    with pytest.raises(RunError) as error:
        render_seen(finished / "run", steps, "table")
    assert str(error.value).startswith(message.format(finished / "run"))
    assert "has taken 10" in str(error.value) and "\n" not in str(error.value)


def cut_off(run_dir: Path, step: int) -> None:
    """Leave a run as it is while it runs, after `step` steps."""
    for name in ("metrics.jsonl", "intervals.jsonl"):
        JsonLines(run_dir / name).rewind(step + 1)
    shutil.rmtree(run_dir / "checkpoints")


def test_a_step_that_failed_can_be_looked_at(copy: Path) -> None:
    """A run that died in step 7 has the weights of steps 5 to 8: their rows are decided, later ones not."""
    expected = {step: records(copy, step) for step in (6, 7, 8)}
    cut_off(copy, 6)
    assert expected[6] == records(copy, 6)
    for step in (7, 8):
        seen = render_seen(copy, (step, step), "json")
        assert expected[step] == json.loads(seen.text)
        (note,) = seen.notes
        assert f"step {step} is not recorded as taken (the last one is 6); these are the rows" in note
    with pytest.raises(RunError) as error:
        render_seen(copy, (9, 9), "json")
    expected_message = (
        f"step 9: {copy} has taken 6 of 10 steps, and rows are decided up to step 8, the next weight update."
    )
    assert expected_message == str(error.value)


def test_a_run_that_ended_early_says_why_there_are_no_more_rows(tiny_config: Make) -> None:
    """Its rows were used up: the step after the last has none."""
    tree = tiny_config(
        trainer={"steps": 500, "batch_rows": 12},
        mixture={"interval_steps": 500, "max_epochs": 0.25, "on_cap": "stop"},
        policy={"name": "static"},
    )
    run_dir = run(tree)
    last = Replay(run_dir).last_step
    assert 12 == len(records(run_dir, last))
    with pytest.raises(RunError, match=f"step {last + 1} has no rows: domain 'code' has served its limit"):
        render_seen(run_dir, (last + 1, last + 1), "table")


# --- what may be missing or wrong -------------------------------------------------------------------


def test_without_packed_rows_names_remain(copy: Path, finished: Path, tmp_path: Path) -> None:
    """Names as before, no text, and one line that says how to get it back."""
    expected = [{**row, "text": None} for row in records(copy, 5)]
    text = (copy / "data.json").read_text().replace(str(finished / "cache"), str(tmp_path / "gone"))
    (copy / "data.json").write_text(text)
    seen = render_seen(copy, (5, 5), "json")
    assert expected == json.loads(seen.text)
    (note,) = seen.notes
    assert note.startswith(f"no text: {tmp_path / 'gone'}/rows/") and " is gone" in note
    assert f"`ddkmix pack {copy / 'config.yaml'}` where the run was started" in note
    assert "\n" not in note
    assert expected[0]["name"] in render_seen(copy, (5, 5), "table").text


def test_packing_again_brings_the_text_back(copy: Path, finished: Path, tmp_path: Path) -> None:
    """The command that the note names makes the very same rows in the place where they were."""
    from ddkmix.cli import main

    expected = records(copy, 5)
    cache = tmp_path / "again"
    for name in ("data.json", "config.yaml"):
        text = (copy / name).read_text().replace(str(finished / "cache"), str(cache))
        (copy / name).write_text(text)
    assert render_seen(copy, (5, 5), "json").notes
    main(["pack", str(copy / "config.yaml")])
    assert expected == records(copy, 5)


def test_other_rows_in_the_same_place_are_not_shown(copy: Path) -> None:
    """A shard that is not the one of the run is refused by its digest."""
    tree = json.loads((copy / "data.json").read_text())
    for shard in tree[0]["domains"]["code"]["shards"]:
        shard["sha256"] = "0" * 64
    (copy / "data.json").write_text(json.dumps(tree))
    seen = render_seen(copy, (1, 1), "json", domain="code")
    assert {None} == {row["text"] for row in json.loads(seen.text)}
    assert "holds other rows than the run was served" in seen.notes[0]


def test_the_students_tokenizer_is_as_good(copy: Path) -> None:
    """The teacher's folder is gone; the copy beside the student decodes alike. Without both, one line."""
    expected = records(copy, 5)
    tree = json.loads((copy / "data.json").read_text())
    tree[0]["tokenizer"]["path"] = "/nowhere/tokenizer.json"
    (copy / "data.json").write_text(json.dumps(tree))
    assert expected == records(copy, 5)
    shutil.rmtree(copy / "student")
    seen = render_seen(copy, (5, 5), "json")
    assert {None} == {row["text"] for row in json.loads(seen.text)}
    (note,) = seen.notes
    assert "is neither at /nowhere/tokenizer.json nor in" in note


def test_a_replay_that_disagrees_with_the_records_is_refused(copy: Path) -> None:
    """An edited count of served rows would name wrong rows: the next record gives it away."""
    path = copy / "intervals.jsonl"
    lines = list(read_lines(path))
    lines[1]["planner"]["credit"][0] += 1 << 33
    lines[1]["planner"]["credit"][1] -= 1 << 33
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (2, 6):  # before the record, which the replay then does not reach, and after it
        with pytest.raises(
            RunError, match=r"again gives .* rows served after step (4|8) and intervals.jsonl"
        ):
            render_seen(copy, (step, step), "table")
    assert 6 == len(records(copy, 9))


def test_a_run_of_an_older_version_is_one_line(copy: Path) -> None:
    """Without the planner's states, and without data.json."""
    path = copy / "intervals.jsonl"
    lines = [{k: v for k, v in line.items() if k != "planner"} for line in read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = json.loads((copy / "data.json").read_text())
    tree[0]["planner"] = None
    (copy / "data.json").write_text(json.dumps(tree))
    with pytest.raises(RunError, match=r"has no planner state between step 0 and 1; an older ddkmix"):
        render_seen(copy, (1, 1), "table")
    (copy / "data.json").unlink()
    with pytest.raises(RunError, match=r"has no data.json, which says what data it is served"):
        render_seen(copy, (1, 1), "table")


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    """As for every command that reads a run."""
    with pytest.raises(RunError, match="is not a run directory"):
        render_seen(tmp_path, (1, 1), "table")


# --- substitutes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["name", "shard's name", "shard's number"])
def test_substitutes_are_shown_in_place(copy: Path, form: str) -> None:
    """The row that was really served, whose place it took, and why; the last attempt counts."""
    rows = records(copy, 5)
    damaged = rows[2]
    names = [shard.name for shard in Replay(copy).block(5).domains[0].shards]
    log = JsonLines(copy / "substitutions.jsonl")
    for attempt in (0, 1):
        place = {"substitute_shard": names[attempt] if form == "shard's name" else attempt}
        substitute = {**place, "substitute_row": 3 + attempt}
        if form == "name":
            substitute = {"substitute": f"{damaged['domain']}/{names[attempt]}#{3 + attempt}"}
        common = {key: damaged[key] for key in ("step", "domain", "j", "shard", "row")}
        log.append({**common, **substitute, "attempt": attempt, "reason": "checksum"})
    changed = records(copy, 5)
    assert rows[:2] + rows[3:] == changed[:2] + changed[3:]
    assert f"{damaged['domain']}/{names[1]}#4" == changed[2]["name"]
    assert (damaged["name"], "checksum", damaged["j"]) == tuple(
        changed[2][key] for key in ("instead_of", "reason", "j")
    )
    assert changed[2]["text"] and changed[2]["text"] != damaged["text"]
    table = render_seen(copy, (5, 5), "table").text
    assert f"{changed[2]['name']} instead of {damaged['name']} (checksum)" in table


# --- other data from some step on -------------------------------------------------------------------


def test_a_block_that_is_added_at_a_resume_is_in_force_from_there(
    tmp_path: Path, tiny_config: Make, tiny_teacher: Path, record: Batches
) -> None:
    """Steps 1 to 6 were served three domains, the steps from 7 on two of other files: each is replayed with
    its own, also where the change lies between two weight updates."""
    tree = tiny_config(trainer={"steps": 6, "checkpoint_steps": 1})
    run_dir = run(tree)
    first = dict(record)
    for name in ("code", "prose"):
        write_domain(tmp_path / "others", name, per_shard=17)
    other = tiny_config(
        run_dir=str(tmp_path / "other"),
        domains=[str(tmp_path / "others")],
        cache_dir=str(tmp_path / "cache"),
        trainer={"steps": 9, "batch_rows": 4},
    )
    record.clear()
    other_dir = run(other)
    spliced(run_dir, other_dir, 6)
    expected = {**first, **{step + 6: batch for step, batch in record.items()}}
    check_every_step(run_dir, expected)


def spliced(run_dir: Path, other_dir: Path, step: int) -> None:
    """Make a run go on, after `step`, with what another run served: what a resume with other data leaves."""

    def later(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "step": state["step"] + step}

    JsonLines(run_dir / "intervals.jsonl").rewind(step)
    for number, line in enumerate(read_lines(other_dir / "intervals.jsonl")):
        if number == 0:  # this weight update falls to the block's own state
            first = later(line["planner"])
            continue
        JsonLines(run_dir / "intervals.jsonl").append({**later(line), "planner": later(line["planner"])})
    for line in read_lines(other_dir / "metrics.jsonl"):
        JsonLines(run_dir / "metrics.jsonl").append(later(line))
    (block,) = json.loads((other_dir / "data.json").read_text())
    blocks = json.loads((run_dir / "data.json").read_text())
    (run_dir / "data.json").write_text(json.dumps([*blocks, {**block, "from_step": step, "planner": first}]))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["trainer"]["steps"] = 15
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


# --- what documents may hold ------------------------------------------------------------------------


def test_text_cannot_steer_a_terminal_or_break_a_table(tmp_path: Path, tiny_config: Make) -> None:
    """Escapes, bells and direction marks are shown as numbers; markdown and HTML are text."""
    from tests.conftest import write_shard

    for name in ("code", "math"):
        write_domain(tmp_path / "domains", name, per_shard=17)
    evil = "\x1b[31m\x07 | <b>x</b> \u202e \x9b2J"
    for shard in range(2):
        texts = [f"{shard} {i} {evil}" for i in range(80)]
        write_shard(tmp_path / "domains" / "code" / f"train-{shard:06d}.tar", texts)
    tree = tiny_config(
        domains=[str(tmp_path / "domains")], cache_dir=str(tmp_path / "cache"), trainer={"steps": 1}
    )
    run_dir = run(tree)
    for style in ("table", "markdown", "text", "json"):
        text = render_seen(run_dir, (1, 1), style, domain="code").text  # type: ignore[arg-type]
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
        assert "\\u001b[31m" in text
    table = render_seen(run_dir, (1, 1), "markdown", domain="code").text
    assert "\\| &lt;b&gt;x" in table
    assert all(8 == len(line.replace("\\|", "").split("|")) for line in table.splitlines())
