"""The commands as a user types them: output, exit codes, and one line for every mistake."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.cli import main
from tests.conftest import ConfigTree, documents, save_tiny_model, write_domain, write_shard

Make = Callable[..., ConfigTree]
Write = Callable[[ConfigTree], Path]


def ddkmix(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The single line that a mistake gives, with exit code 2 and nothing on stdout."""
    capsys.readouterr()
    assert ddkmix(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


def test_the_commands_from_documents_to_history(
    tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """pack, lint, plan, train, show and gaps work one after the other and agree."""
    tree = tiny_config(trainer={"steps": 8})
    config = write_config(tree)
    assert ddkmix("pack", config) == 0
    assert "documents" in capsys.readouterr().out
    assert ddkmix("lint", config) == 0
    assert "fine. 3 domains, 9 shards" in capsys.readouterr().out
    assert ddkmix("plan", config) == 0
    assert "8 steps x 6 rows x 32 tokens = 1,536 tokens" in capsys.readouterr().out
    assert ddkmix("plan", config, "--format", "json") == 0
    assert 8 == json.loads(capsys.readouterr().out)["end_step"]
    assert ddkmix("train", config) == 0
    out = capsys.readouterr().out
    assert "step 0" in out and "step 8" in out and "student:" in out
    assert ddkmix("show", tree["run_dir"], "--format", "json") == 0
    history = json.loads(capsys.readouterr().out)
    assert [0, 4, 8] == [record["step"] for record in history]
    assert ddkmix("plan", tree["run_dir"], "--format", "json") == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    assert history[-1]["served"] == {name: row["served"] for name, row in domains.items()}
    assert ddkmix("seen", tree["run_dir"], "--step", "7:8", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [7] * 6 + [8] * 6 == [row["step"] for row in rows] and all(row["text"] for row in rows)
    student = Path(tree["run_dir"]) / "student"
    assert ddkmix("gaps", config, "--student", student, "--format", "json") == 0
    report = json.loads(capsys.readouterr().out)
    for domain, losses in history[-1]["losses"].items():
        assert report[domain]["loss_gap"] == pytest.approx(losses["loss_gap"], abs=1e-5)
    assert 1 == pytest.approx(sum(row["weight"] for row in report.values()))


def test_pack_reports_in_every_format(
    tiny_config: Make, write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Per domain and split and in total, with the same numbers in the table, JSON and Markdown."""
    config = write_config(tiny_config(cache_dir=str(tmp_path / "cache")))
    assert ddkmix("pack", config, "--format", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert ["code", "math", "prose", "total"] == list(report)
    assert 20 + 32 + 44 == report["total"]["train"]["documents"]
    assert ddkmix("pack", config) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert ddkmix("pack", config, "--format", "markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line.split() for line in table[-1:]] == [cells[-1]]
    assert 2 + 4 * 2 == len(lines)
    assert f"{report['total']['held_out']['tokens']:,}" in cells[-1]


def test_pack_by_parts_and_publish(
    tiny_config: Make, write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts say what waits for others; published rows are a card's `rows`, and plans stay the same."""
    config = write_config(tiny_config(cache_dir=str(tmp_path / "cache")))
    assert ddkmix("pack", config, "--part", "1/2") == 0
    assert "part 1/2 is done; other parts are not, of code, math, prose." in capsys.readouterr().err
    assert ddkmix("pack", config, "--part", "2/2", "--out", tmp_path / "out") == 0
    assert f"rows: {tmp_path}/out/code" in capsys.readouterr().err
    assert "--part 3/2: must be" in refused(capsys, "pack", config, "--part", "3/2")
    assert ddkmix("plan", config) == 0
    expected = capsys.readouterr().out
    for name in ("code", "math", "prose"):
        card = {"name": name, "license": "CC0-1.0", "rows": f"out/{name}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(card))
    cards = f"domains=[{tmp_path}/code.yaml, {tmp_path}/math.yaml, {tmp_path}/prose.yaml]"
    assert ddkmix("lint", config, cards) == 0
    assert "3 domains (3 packed), 0 shards" in capsys.readouterr().out
    assert ddkmix("plan", config, cards, f"cache_dir={tmp_path}/other") == 0
    assert expected == capsys.readouterr().out
    assert "set it to 32" in refused(capsys, "lint", config, cards, "pack.seq_len=16")


def test_index_makes_rows_of_others_usable(
    tiny_config: Make, write_config: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed tars without their indices, as another program might have written them, are rows."""
    tree = tiny_config(cache_dir=str(tmp_path / "cache"))
    config = write_config(tree)
    assert ddkmix("pack", config, "--out", tmp_path / "out") == 0
    for path in [*(tmp_path / "out").rglob("*.npz"), *(tmp_path / "out").rglob("rows.json")]:
        path.unlink()
    arguments = ["--tokenizer", tree["teacher"]["model"], "--license", "CC0-1.0"]
    capsys.readouterr()
    folder = tmp_path / "out" / "code"
    assert "a row has 1 to --seq-len = 8" in refused(capsys, "index", folder, *arguments, "--seq-len", 8)
    assert ddkmix("index", folder, *arguments, "--seq-len", 32, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["code"]["train"]["rows"] > 0
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump({"name": "code", "license": "CC0-1.0", "rows": str(folder)}))
    assert ddkmix("plan", config, f"domains=[{card}]") == 0


def test_plan_follows_the_settings_of_the_mixture(
    tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong block_rows would be the run's mistake, so `plan` sees it; the seed changes no count."""
    config = write_config(tiny_config())
    assert ddkmix("plan", config) == 0
    expected = capsys.readouterr().out
    assert ddkmix("plan", config, "seed=7", "mixture.block_rows=3", "loader.workers=2") == 0
    assert expected == capsys.readouterr().out


def test_lint_asks_no_store_unless_told(
    tmp_path: Path, tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --remote a dead server is no mistake; with it, it is one line."""
    write_domain(tmp_path, "code", train="http://127.0.0.1:9/0.tar")
    config = write_config(tiny_config(domains=[str(tmp_path / "code.yaml")], storage={"attempts": 1}))
    assert ddkmix("lint", config) == 0
    assert "http://127.0.0.1:9/0.tar" in refused(capsys, "lint", config, "--remote")


def test_gaps_without_a_config_takes_a_student_a_teacher_and_domains(
    tiny_teacher: Path, tiny_domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model against itself has a gap of zero in every domain, and DDK would weigh all alike."""
    arguments = ["--student", tiny_teacher, "--teacher", tiny_teacher, "--domains", tiny_domains]
    overrides = ["pack.seq_len=32", "teacher.dtype=float32", f"cache_dir={tmp_path}", "evaluation.rows=4"]
    assert ddkmix("gaps", *overrides, *arguments, "--format", "markdown") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 3 + 1
    assert all("| 0.000 | 0.000 | 1 |" in line and line.endswith("| 0.333 |") for line in lines[2:5])


def test_overrides_reach_the_config_and_its_policy(
    tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dotted keys change sections, list entries and plug-in parameters."""
    config = write_config(tiny_config(policy={"name": "ddk"}))
    assert ddkmix("plan", config, "trainer.steps=3", "policy.name=static", "policy.weights=natural") == 0
    assert "3 steps x 6 rows" in capsys.readouterr().out
    assert "uniform_mix = 1.5" in refused(capsys, "lint", config, "policy.uniform_mix=1.5")
    assert "loss.1.weight = -1" in refused(capsys, "lint", config, "loss.1.weight=-1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.uniform_mix=1.5", "uniform_mix = 1.5: Input should be less than or equal to 1"),
        ("policy.name=dkd", "policy.name = 'dkd' is unknown; did you mean 'ddk'?"),
        ("policy.alpha=0.5", "policy (ddk) has no parameter 'alpha'"),
        ("mixture.interval_steps=0", "mixture.interval_steps = 0"),
        ("trainer.stpes=3", "unknown key trainer.stpes"),
        ("trainer.stpes=3", "did you mean 'trainer.steps'?"),
        ("trainer.steps=many", "trainer.steps = 'many'"),
        ("loss.0.name=cros_entropy", "did you mean 'cross_entropy'?"),
        ("student.layers=[0,7]", "student.layers = [0, 7]; the teacher has layers 0 to 1"),
        ("pack.seq_len=512", "pack.seq_len = 512; the teacher has 256 positions"),
        ("pack.separator=<eos>", "pack.separator = '<eos>' is not a token"),
        ("teacher.model=/nowhere/model", "/nowhere/model: no such folder"),
        ("domains=[/nowhere/*.yaml]", "matches no card"),
        ("tracking.trackers=[no_such_tracker]", "'no_such_tracker' is unknown; known: aim, clearml"),
        ("mixture.max_epochs=0", "mixture.max_epochs = 0"),
        ("policy={name: static, weights: {code: 1}}", "missing domains ['math', 'prose']"),
        ("trainer.steps", "override 'trainer.steps' must be key=value"),
    ],
)
def test_a_wrong_value_is_one_line_from_every_command(
    tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    """lint, plan and train say the same, and train leaves no run directory behind."""
    tree = tiny_config()
    config = write_config(tree)
    for command in ("lint", "plan", "train"):
        assert message in refused(capsys, command, config, override)
    assert not Path(tree["run_dir"]).exists()


def broken_domains(folder: Path, kind: str) -> str:
    """Make domains with one fault; the message that it must give."""
    write_domain(folder, "math")
    card = write_domain(folder, "code")
    shard = folder / "code" / "train-000001.tar"
    if kind == "missing shard":
        shard.unlink()
        return f"train shard {shard} does not exist"
    if kind == "empty shard":
        shard.write_bytes(b"")
        return f"train shard {shard} is empty (0 bytes)"
    if kind == "truncated tar":
        shard.write_bytes(shard.read_bytes()[:5000])
        return f"{shard} has no tar end mark"
    if kind == "no documents":
        with tarfile.open(shard, "w"):
            pass
        return "has no .txt member"
    if kind == "no held-out":
        tree = yaml.safe_load(card.read_text())
        card.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "held_out"}))
        return "domain 'code' has no held_out shards"
    if kind == "shared shard":
        tree = yaml.safe_load(card.read_text())
        card.write_text(yaml.safe_dump({**tree, "train": "math/train-000000.tar"}))
        return "a shard belongs to one split of one domain"
    assert kind == "same content"
    shutil.copyfile(folder / "math" / "train-000000.tar", shard)
    return "has the same content as"


@pytest.mark.parametrize(
    "kind",
    [
        "missing shard",
        "empty shard",
        "truncated tar",
        "no documents",
        "no held-out",
        "shared shard",
        "same content",
    ],
)
def test_broken_domains_are_one_line(
    tmp_path: Path,
    tiny_config: Make,
    write_config: Write,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """Every fault of cards and shards stops `train` before a model is loaded; nothing half-written stays."""
    message = broken_domains(tmp_path / "domains", kind)
    tree = tiny_config(domains=[str(tmp_path / "domains")], cache_dir=str(tmp_path / "cache"))
    assert message in refused(capsys, "train", write_config(tree))
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    assert not (Path(tree["run_dir"]) / "metrics.jsonl").exists()


def test_a_fault_mended_lets_the_same_command_go_on(
    tmp_path: Path, tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a truncated shard is replaced, `train` runs: the failed attempt left no claim on run_dir."""
    broken_domains(tmp_path / "domains", "truncated tar")
    tree = tiny_config(
        domains=[str(tmp_path / "domains")], cache_dir=str(tmp_path / "cache"), trainer={"steps": 1}
    )
    config = write_config(tree)
    refused(capsys, "train", config)
    write_shard(tmp_path / "domains" / "code" / "train-000001.tar", documents("code", 9, seed=7))
    assert ddkmix("train", config) == 0


def test_a_student_with_another_tokenizer_is_refused(
    tmp_path: Path,
    tiny_config: Make,
    write_config: Write,
    tiny_teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line names both and says why it matters."""
    student = tmp_path / "student"
    shutil.copytree(tiny_teacher, student)
    tree = json.loads((student / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    (student / "tokenizer.json").write_text(json.dumps(tree))
    config = write_config(tiny_config(student={"init": "load", "layers": None, "model": str(student)}))
    assert "have different tokenizers" in refused(capsys, "lint", config)


def test_padded_vocabularies_of_different_length_are_cut_to_the_shorter(
    tmp_path: Path,
    tiny_config: Make,
    write_config: Write,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Output classes behind the tokenizer's last token are padding: a run trains and reports finite gaps. A
    head smaller than the tokenizer is refused."""
    student = save_tiny_model(tmp_path / "student", tokenizer_folder, seed=3, vocab_size=352)
    load: dict[str, Any] = {"init": "load", "layers": None, "model": str(student)}
    assert ddkmix("train", write_config(tiny_config(student=load, trainer={"steps": 2}))) == 0
    shutil.rmtree(student)
    save_tiny_model(student, tokenizer_folder, vocab_size=299)
    message = refused(capsys, "train", write_config(tiny_config(student=load)))
    assert "the student has 299 output classes and the tokenizer 300 tokens" in message


def test_unknown_commands_and_options_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Typing errors are answered with the nearest command."""
    assert ddkmix("trian") == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert "must be table, json, markdown, html or png" in refused(capsys, "show", "x", "--format", "yaml")
    assert "is not a run directory" in refused(capsys, "show", "/nowhere")
    assert "is not a run directory" in refused(capsys, "seen", "/nowhere", "--step", "1")
    assert "table, json, markdown or text" in refused(capsys, "seen", "x", "--step", "1", "--format", "yaml")
    assert "--step x: must be a step, 12, or a range" in refused(capsys, "seen", "x", "--step", "x")
    assert "gaps needs a CONFIG, or --domains as well." in refused(capsys, "gaps", "--student", "x")
    assert "no such config" in refused(capsys, "lint", "/nowhere.yaml")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`ddkmix --help` names what there is, with exit code 0."""
    assert ddkmix("--help") == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in ("pack", "lint", "plan", "train", "generate", "gaps", "rouge", "show", "seen")
    )


def test_notes_about_missing_text_leave_the_output_clean(
    tmp_path: Path, tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """`seen` prints records on stdout and why there is no text on stderr, with exit code 0."""
    tree = tiny_config(trainer={"steps": 1}, cache_dir=str(tmp_path / "cache"))
    assert ddkmix("train", write_config(tree)) == 0
    shutil.rmtree(tmp_path / "cache" / "rows")
    capsys.readouterr()
    assert ddkmix("seen", tree["run_dir"], "--step", 1, "--format", "json") == 0
    captured = capsys.readouterr()
    assert [None] * 6 == [row["text"] for row in json.loads(captured.out)]
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("ddkmix: no text: ") and "ddkmix pack" in line


def test_a_run_directory_has_a_config_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan RUN` takes no overrides, and a folder that is no run is refused."""
    message = refused(capsys, "plan", tmp_path, "trainer.steps=3")
    assert message.endswith(f"trainer.steps=3: {tmp_path} is a run directory; its config is fixed.")
    assert "is not a run directory (no config.yaml)" in refused(capsys, "plan", tmp_path)


def test_a_run_dir_that_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_config: Make, write_config: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the place of the folder is refused."""
    (tmp_path / "run").write_text("a file")
    assert "exists and is not a run" in refused(capsys, "train", write_config(tiny_config()))
    assert "a file" == (tmp_path / "run").read_text()
