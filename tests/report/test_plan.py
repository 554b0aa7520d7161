"""What `ddkmix plan` says before anything runs: rows, epochs, tokens, warnings, memory, all by hand."""

import json
import re
import shutil
import struct

import pytest

from ddkmix.config import parse_config
from ddkmix.domains import load_domains
from ddkmix.errors import RunError
from ddkmix.loader import DomainMixture
from ddkmix.pack import pack_domains
from ddkmix.provenance import read_blocks
from ddkmix.records import read_lines
from ddkmix.report.history import read_intervals, render_history
from ddkmix.report.plan import render_plan, render_run_plan
from ddkmix.setup import train
from ddkmix.tokenizer import read_tokenizer
from ddkmix.tracking import JsonLines
from tests.conftest import write_domain


@pytest.fixture
def make_plan(tmp_path, tiny_config, tiny_teacher):
    """A function that renders the plan of two small domains under given weights and sections."""
    for name, per_shard in (("code", 8), ("math", 16)):
        write_domain(tmp_path / "domains", name, per_shard=per_shard)

    def make(weights, *, teacher=tiny_teacher, style="table", **sections):
        sections = {"domains": [str(tmp_path / "domains")], "cache_dir": str(tmp_path / "cache"), **sections}
        config = parse_config(
            tiny_config(teacher={"model": str(teacher), "dtype": "bfloat16"}, **sections), where="test"
        )
        packed = pack_domains(
            load_domains(config.domains),
            read_tokenizer(str(tiny_teacher)),
            seq_len=config.pack.seq_len,
            cache_dir=config.cache_dir,
            processes=1,
        )
        mixture = DomainMixture(
            {name: domain.train for name, domain in packed.items()},
            batch_rows=config.trainer.batch_rows,
            weights=weights,
            max_epochs=config.mixture.max_epochs,
            on_cap=config.mixture.on_cap,
        )
        return render_plan(config, packed, mixture, style), packed

    return make


@pytest.fixture
def teacher(tmp_path):
    """A teacher of which only config and the headers of the parameters are here, as on a login node."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 50_000, "num_hidden_layers": 3}))
    shapes = {
        "model.embed_tokens.weight": [50_000, 1000],  # 50 million
        **{f"model.layers.{i}.mlp.weight": [10_000, 1000] for i in range(3)},  # 10 million each
        "model.norm.weight": [1000],
    }
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            **{k: {"dtype": "BF16", "shape": v, "data_offsets": [0, 0]} for k, v in shapes.items()},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def row_of(text, domain):
    """The cells of a domain."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [domain])


def test_rows_served_and_epochs_by_hand(make_plan):
    """10 steps x 6 rows at weights 3/4 and 1/4 are 45 and 15 rows; epochs are those over the rows."""
    text, packed = make_plan({"code": 3.0, "math": 1.0})
    for name, weight, rows in (("code", 0.75, 45), ("math", 0.25, 15)):
        train, held_out = packed[name].train, packed[name].held_out
        expected = [
            name,
            str(train.num_rows),
            f"{train.num_tokens:,}",
            str(min(held_out.num_rows, 8)),
            f"{weight:.3f}",
            str(rows),
            f"{rows / train.num_rows:.2f}",
            "-",
            "-",
        ]
        assert expected == row_of(text, name)


def test_tokens_and_updates_by_hand(make_plan):
    """10 steps x 6 rows x 32 tokens; with an update every 4 steps there are 2 after the first interval."""
    text, _ = make_plan({"code": 1.0, "math": 1.0})
    expected = (
        "10 steps x 6 rows x 32 tokens = 1,920 tokens (192 a step); 2 weight updates after the first "
        "interval (4 steps each)."
    )
    assert expected in text.splitlines()


@pytest.mark.parametrize(
    ("steps", "interval", "updates"), [(10, 4, 2), (8, 4, 1), (9, 4, 2), (4, 4, 0), (3, 4, 0)]
)
def test_an_update_at_the_last_step_would_serve_nobody(make_plan, steps, interval, updates):
    """Updates happen at multiples of the interval before the end, not at the end."""
    trainer = {"steps": steps, "batch_rows": 6}
    text, _ = make_plan({"code": 1.0, "math": 1.0}, trainer=trainer, mixture={"interval_steps": interval})
    assert f"; {updates} weight updates after the first" in text


def test_held_out_rows_are_those_that_are_measured(make_plan):
    """A domain with fewer held-out rows than asked for shows what it has."""
    text, packed = make_plan({"code": 1.0, "math": 1.0}, evaluation={"rows": 10_000})
    assert str(packed["code"].held_out.num_rows) == row_of(text, "code")[3]


def test_a_domain_that_will_reach_its_limit_is_a_warning_with_the_step(make_plan):
    """A quarter of an epoch of code is served 4.5 rows a step: the run stops before the step that would pass
    it, and rows are those of the steps before."""
    text, packed = make_plan({"code": 3.0, "math": 1.0}, mixture={"max_epochs": 0.25, "on_cap": "stop"})
    rows = packed["code"].train.num_rows
    cap = rows // 4
    assert cap < 45  # or nothing would be capped
    last = int(cap / 4.5)
    expected = [
        f"warning: code reaches its limit of {cap / rows:g} epochs ({cap} rows) at step {last + 1} of 10; "
        "then the run ends (mixture.on_cap: stop).",
        f"warning: under these weights the run ends after step {last} of 10, when no row may be served "
        "(mixture.on_cap: stop); raise mixture.max_epochs or lower trainer.steps.",
    ]
    assert expected == [line for line in text.splitlines() if line.startswith("warning")]
    cells = [f"{4.5 * last:.0f}", f"{4.5 * last / rows:.2f}", f"{cap / rows:g}", str(last + 1)]
    assert cells == row_of(text, "code")[5:]


def test_what_a_capped_domain_leaves_goes_to_the_others(make_plan):
    """Under `renormalize` math gets the rest of the 60 rows."""
    text, packed = make_plan({"code": 3.0, "math": 1.0}, mixture={"max_epochs": 0.25})
    cap = packed["code"].train.num_rows // 4
    assert [str(cap), str(60 - cap)] == [row_of(text, name)[5] for name in ("code", "math")]
    assert "then the other domains share its weight (mixture.on_cap: renormalize)." in text


def test_json_and_markdown_say_the_same(make_plan):
    """The numbers of the table, unrounded, and as a table for issues; warnings and memory with them."""
    options = {"mixture": {"max_epochs": 0.25}}
    text, _ = make_plan({"code": 3.0, "math": 1.0}, **options)
    tree = json.loads(make_plan({"code": 3.0, "math": 1.0}, style="json", **options)[0])
    for name, row in tree["domains"].items():
        cells = row_of(text, name)
        assert [str(row["train_rows"]), f"{row['weight']:.3f}", f"{row['rows']:.0f}"] == [
            cells[i] for i in (1, 4, 5)
        ]
        assert (str(row["cap_step"]) if row["cap_step"] else "-") == cells[8]
    assert [f"warning: {line}" for line in tree["warnings"]] == [
        line for line in text.splitlines() if line.startswith("warning")
    ]
    assert (0, 10, 10, 1920, 2) == tuple(
        tree[key] for key in ("step", "steps", "end_step", "tokens", "weight_updates")
    )
    assert tree["memory"].startswith("memory: teacher")
    markdown = make_plan({"code": 3.0, "math": 1.0}, style="markdown", **options)[0]
    for name in tree["domains"]:
        (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
        assert row_of(text, name) == [cell.strip() for cell in line.split("|")[1:-1]]


# --- from a run directory ---------------------------------------------------------------------------


@pytest.fixture
def capped_run(tmp_path, tiny_config):
    """A run of 10 steps of 12 rows: 0.8 code, which reaches its limit on the way."""
    write_domain(tmp_path / "domains", "code", per_shard=8)
    write_domain(tmp_path / "domains", "math", per_shard=24)
    tree = tiny_config(
        domains=[str(tmp_path / "domains")],
        cache_dir=str(tmp_path / "cache"),
        trainer={"steps": 10, "batch_rows": 12, "keep_checkpoints": 99},
        mixture={"interval_steps": 3, "max_epochs": 0.7},
        policy={"name": "static", "weights": {"code": 0.8, "math": 0.2}},
    )
    return parse_config(tree, where="test")


def cut_after(run_dir, step):
    """Leave the records up to `step`, as if the run were there."""
    JsonLines(run_dir / "intervals.jsonl").rewind(step + 1)


def test_a_run_says_where_it_is_heading_and_gets_there(capped_run, capfd):
    """From every weight update on: rows so far, the same end, and the step of the cap until it is there; the
    run itself says it once on stderr, once more when it is there, and in intervals.jsonl."""
    train(capped_run)
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("ddkmix: warning")]
    run_dir, records = capped_run.run_dir, read_intervals(capped_run.run_dir)
    settings = read_blocks(run_dir)[0].settings
    cap, end = settings.cap_rows[0], records[-1]["served"]
    assert {"code": cap, "math": 120 - cap} == end  # the run is long enough
    step = -(-cap // 9.6)  # 0.8 of 12 rows a step
    assert 3 < step < 10
    assert 2 == len(errors)
    assert f"code reaches its limit of {cap / settings.num_rows[0]:g} epochs ({cap} rows) at" in errors[0]
    assert f"code is at its limit of {cap / settings.num_rows[0]:g} epochs since step" in errors[1]
    for record in reversed(records):
        tree = json.loads(render_run_plan(run_dir, "json"))
        assert (record["step"], 10, 10) == (tree["step"], tree["steps"], tree["end_step"])
        for name, row in tree["domains"].items():
            assert record["served"][name] == row["served"]
            assert end[name] == pytest.approx(row["rows"], abs=1)
        reached = tree["domains"]["code"]["cap_step"]
        assert step == pytest.approx(reached, abs=1) or record["step"] == reached > step
        assert {"code": {"epochs": cap / settings.num_rows[0], "cap_step": reached}} == record["projected"]
        cut_after(run_dir, record["step"] - 1)


def test_the_table_of_a_run_shows_then_and_now(capped_run):
    """A line per domain: rows and epochs so far and at the end; `show` has the same epochs per evaluation."""
    train(capped_run)
    run_dir = capped_run.run_dir
    shown = render_history(run_dir, "table").split("epochs at the end if the weights stayed")[1]
    cut_after(run_dir, 3)
    text, tree = render_run_plan(run_dir), json.loads(render_run_plan(run_dir, "json"))
    assert "after step 3 of 10, under the weights since then" == text.splitlines()[0]
    for name, row in tree["domains"].items():
        expected = [
            name,
            str(row["train_rows"]),
            f"{row['weight']:.3f}",
            str(row["served"]),
            f"{row['epochs_served']:.2f}",
            f"{row['rows']:.0f}",
            f"{row['epochs']:.2f}",
            f"{row['max_epochs']:g}",
            str(row["cap_step"] or "-"),
        ]
        assert expected == row_of(text, name)
    assert any(line.startswith("warning: code reaches its limit") for line in text.splitlines())
    ends = [row["epochs"] for row in tree["domains"].values()]
    assert ["3", f"{ends[0]:.2f}*", f"{ends[1]:.2f}"] in [line.split() for line in shown.splitlines()]


def test_warnings_are_not_said_again_after_a_resume(capped_run, capfd):
    """The outlook of the last record counts, whichever process wrote it."""
    train(capped_run)
    for path in (capped_run.run_dir / "checkpoints").glob("step-*"):
        if path.name > "step-000003":
            shutil.rmtree(path)
    before = (capped_run.run_dir / "intervals.jsonl").read_bytes()
    capfd.readouterr()
    train(capped_run, resume=True)
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("ddkmix: warning")]
    assert 1 == len(errors) and "code is at its limit" in errors[0]
    assert before == (capped_run.run_dir / "intervals.jsonl").read_bytes()


def test_a_run_without_a_planner_state_is_one_line(capped_run):
    """Written by an older version: nothing to project from, and `show` leaves that section out."""
    train(capped_run)
    path = capped_run.run_dir / "intervals.jsonl"
    lines = [{k: v for k, v in line.items() if k != "planner"} for line in read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r"has no planner state at step 10; an older ddkmix wrote it"):
        render_run_plan(capped_run.run_dir)
    assert "epochs at the end" not in render_history(capped_run.run_dir, "table")


def test_without_a_limit_there_is_no_warning(make_plan):
    """Nothing to warn of."""
    assert "warning" not in make_plan({"code": 1.0, "math": 1.0})[0]


@pytest.mark.parametrize(("logits", "trainer"), [("1.20", {}), ("0.80", {"mixed_precision": "bf16"})])
def test_memory_of_a_pruned_student_by_hand(make_plan, teacher, logits, trainer):
    """80 million parameters in bf16; layers 0 and 2 kept: 70 million x 16 bytes; logits of 4000 tokens, of
    the teacher in bf16 and of the student in float32 or bf16."""
    text, _ = make_plan(
        {"code": 1.0, "math": 1.0},
        teacher=teacher,
        student={"init": "prune", "layers": [0, 2]},
        trainer={"logits_chunk_tokens": 4000, **trainer},
    )
    # 2 x 80.001e6, 16 x 70.001e6, (2 + 4 or 2 + 2) x 4000 x 50,000 bytes
    expected = (
        "memory: teacher 0.16 GB (80M parameters), student 1.12 GB (70M parameters with gradients and AdamW "
        f"moments, 16 bytes each), logits {logits} GB; activations come on top."
    )
    assert expected == text.splitlines()[-1]


def test_memory_for_logits_is_the_budget_where_no_chunk_is_named(make_plan, teacher):
    """`trainer.logits_memory_mb`, 512 MB."""
    text, _ = make_plan({"code": 1.0, "math": 1.0}, teacher=teacher, trainer={"logits_chunk_tokens": None})
    assert ", logits 0.51 GB;" in text.splitlines()[-1]


def test_memory_of_a_student_that_is_not_built_yet(make_plan, teacher):
    """A student from a config has no size before it is built; the rest is told."""
    student = {"init": "config", "layers": None}
    text, _ = make_plan({"code": 1.0, "math": 1.0}, teacher=teacher, student=student)
    last = text.splitlines()[-1]
    assert re.fullmatch(
        r"memory: teacher 0.16 GB, logits \d\.\d\d GB; the student's size is known only .*", last
    )


def test_without_the_teachers_parameters_there_is_no_estimate(make_plan, teacher):
    """Config here, parameters not: the plan says so and is a plan all the same."""
    (teacher / "model.safetensors").unlink()
    text, _ = make_plan({"code": 1.0, "math": 1.0}, teacher=teacher)
    assert "memory: the teacher's parameters are not on this machine yet, so no estimate." in text
