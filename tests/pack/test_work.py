"""Sharing the work: parts on any machines, killed and started again, give the bytes of one process."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Storage
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError
from ddkmix.pack import missing_shards, pack_domains, parse_part, plan_all
from ddkmix.pack import work as work_module
from ddkmix.pack.work import Part, run_packing
from ddkmix.tokenizer import TokenizerCard
from tests.conftest import REPO, documents, write_domain
from tests.pack.rows import SEQ_LEN, domain_of, files_of

PACK_A_PART = """
import sys, time
from pathlib import Path
from ddkmix.domains import load_domains
from ddkmix.pack import pack_domains, parse_part
from ddkmix.tokenizer import read_tokenizer

cards, tokenizer, cache, part = sys.argv[1:]
if __name__ == "__main__":
    print("begun", flush=True)
    packed = pack_domains(
        load_domains([cards]),
        read_tokenizer(tokenizer),
        seq_len=16,
        cache_dir=Path(cache),
        processes=1,
        part=parse_part(part) if part else None,
        on_shard=lambda done, total: (print(done, flush=True), time.sleep(0.05)),
    )
    print("packed", *packed, flush=True)
"""


@pytest.mark.parametrize(("number", "of", "text"), [(3, 16, "3/16"), (1, 1, "1/1"), (16, 16, "16/16")])
def test_a_part_is_read(number: int, of: int, text: str) -> None:
    """NUMBER/OF."""
    assert Part(number=number, of=of) == parse_part(text)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "1/2/3", "-1/4", "1.0/4", "٣/١٦"])
def test_what_is_no_part_is_refused(text: str) -> None:
    """One line with the rule."""
    with pytest.raises(ConfigError) as info:
        parse_part(text)
    assert f"--part {text}: must be NUMBER/OF with NUMBER from 1 to OF, for example 3/16." == str(info.value)


@given(st.integers(1, 40), st.integers(0, 200))
def test_every_shard_belongs_to_one_part(of: int, index: int) -> None:
    """None is left over and none is taken twice."""
    takers = [number for number in range(1, of + 1) if Part(number=number, of=of).takes(index)]
    assert 1 == len(takers)


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """Two domains: one with held-out shards, duplicates among them, one with a held-out share."""
    held_out = documents("code", 6, seed=99)
    train = [[*documents("code", 5, seed=i), held_out[i]] for i in range(4)]
    domain_of(tmp_path / "cards", "code", train, held_out)
    write_domain(tmp_path / "cards", "math", shards=3, per_shard=8, held_out={"share_of_train": 0.3})
    return tmp_path / "cards"


def expected_files(cards: Path, tokenizer: TokenizerCard, cache: Path) -> dict[str, bytes]:
    """What one process packs, undisturbed."""
    pack_domains(load_domains([str(cards)]), tokenizer, seq_len=SEQ_LEN, cache_dir=cache, processes=1)
    return files_of(cache / "rows")


@settings(deadline=None, derandomize=True, max_examples=8)
@given(st.integers(1, 9), st.randoms(use_true_random=False), st.integers(0, 3))
def test_any_split_of_the_work_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: TokenizerCard,
    of: int,
    order: random.Random,
    again: int,
) -> None:
    """Any number of parts in any order, some of them twice; the last one completes the domains."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("code", "math"):
        write_domain(folder / "cards", name, shards=2, per_shard=2)
    expected = expected_files(folder / "cards", tokenizer, folder / "one")
    numbers = list(range(1, of + 1)) + order.choices(range(1, of + 1), k=again)
    order.shuffle(numbers)
    for number in numbers:
        packed = pack_domains(
            load_domains([str(folder / "cards")]),
            tokenizer,
            seq_len=SEQ_LEN,
            cache_dir=folder / "parts",
            processes=1,
            part=Part(number=number, of=of),
        )
    assert ["code", "math"] == sorted(packed)
    assert expected == files_of(folder / "parts" / "rows")


def test_parts_that_leave_out_a_shard_fail_the_check(
    cards: Path, tokenizer: TokenizerCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part taken from what is missing now, not from the whole list, moves when others finish."""

    def of_what_is_missing(plans: list[work_module.PackingPlan], *, part: Part | None, **_: object) -> None:
        jobs = [job for plan in plans for job in plan.jobs if not job.done]
        for i, job in enumerate(jobs):
            if part is None or part.takes(i):
                for held_out in plans[0].jobs:
                    if held_out.split == "held_out":
                        work_module.read_held_out(held_out)
                work_module.pack_shard(job)

    expected = expected_files(cards, tokenizer, tmp_path / "one")
    monkeypatch.setattr("ddkmix.pack.run_packing", of_what_is_missing)
    for number in (1, 2):
        pack_domains(
            load_domains([str(cards)]),
            tokenizer,
            seq_len=SEQ_LEN,
            cache_dir=tmp_path / "parts",
            part=Part(number=number, of=2),
        )
    assert expected != files_of(tmp_path / "parts" / "rows")


def start(cards: Path, tokenizer: TokenizerCard, cache: Path, part: str) -> subprocess.Popen[str]:
    """A process that packs a part and says how far it is."""
    return subprocess.Popen(
        [sys.executable, "-c", PACK_A_PART, str(cards), str(tokenizer.path.parent), str(cache), part],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )


def test_processes_share_a_folder_and_one_is_killed(
    cards: Path, tokenizer: TokenizerCard, tmp_path: Path
) -> None:
    """Two parts and a job for everything work at the same time; one is killed with SIGKILL and started again.

    The files are those of one undisturbed process, byte for byte, with rows.json and without leftovers.
    """
    expected = expected_files(cards, tokenizer, tmp_path / "one")
    shared = tmp_path / "shared"
    victim = start(cards, tokenizer, shared, "2/2")
    others = [start(cards, tokenizer, shared, part) for part in ("1/2", "")]
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.strip() == "1":  # has packed one shard
            break
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert -signal.SIGKILL == victim.returncode
    victim.stdout.close()
    again = start(cards, tokenizer, shared, "2/2")
    outputs = [process.communicate()[0] for process in (*others, again)]
    assert [0, 0, 0] == [process.returncode for process in (*others, again)]
    assert any("packed code math" in output for output in outputs)
    assert expected == files_of(shared / "rows")


def test_a_killed_packer_leaves_nothing_and_a_living_one_keeps_its_files(
    cards: Path, tokenizer: TokenizerCard, tmp_path: Path
) -> None:
    """Whatever moment the signal comes at, the next job cleans up; a file somebody is writing stays."""
    expected = expected_files(cards, tokenizer, tmp_path / "one")
    generator = random.Random(0)
    for i in range(3):
        cache = tmp_path / f"killed-{i}"
        process = start(cards, tokenizer, cache, "")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        assert expected == expected_files(cards, tokenizer, cache)


def test_what_is_missing_is_counted(cards: Path, tokenizer: TokenizerCard, tmp_path: Path) -> None:
    """Shards of documents per domain; nothing when all is there."""
    plans = plan_all(load_domains([str(cards)]), tokenizer, seq_len=SEQ_LEN, cache_dir=tmp_path)
    assert {"code": (5, 5), "math": (3, 3)} == missing_shards(plans)
    run_packing(plans, part=Part(number=1, of=2), processes=1, on_shard=lambda done, total: None)
    assert {"code": (2, 5), "math": (2, 3)} == missing_shards(plans)
    run_packing(plans, part=None, processes=1, on_shard=lambda done, total: None)
    assert {} == missing_shards(plans)


def test_digests_of_held_out_documents_are_remade(
    cards: Path, tokenizer: TokenizerCard, tmp_path: Path
) -> None:
    """A train shard that is packed later, after `.digests` was deleted or damaged, still drops duplicates."""
    expected = expected_files(cards, tokenizer, tmp_path / "cache")
    (code,) = (tmp_path / "cache" / "rows").glob("code-*")
    shutil.rmtree(code / ".digests" / "held_out")
    (code / ".digests" / "held_out").mkdir()
    (code / ".digests" / "held_out" / "held_out.tar.npy").write_bytes(b"damaged")
    (code / "train" / "train-000001.tar.index.npz").unlink()
    (code / "rows.json").unlink()
    assert expected == expected_files(cards, tokenizer, tmp_path / "cache")
    report = json.loads((code / "rows.json").read_text())["report"]
    assert {"duplicate of held-out": 4} == report["train"]["dropped"]


def test_storage_settings_do_not_change_rows(cards: Path, tokenizer: TokenizerCard, tmp_path: Path) -> None:
    """How shards are fetched is no part of a fingerprint."""
    folders = [
        [plan.folder for plan in plan_all(load_domains([str(cards)]), tokenizer, seq_len=SEQ_LEN,
                                          cache_dir=tmp_path, storage=storage)]
        for storage in (Storage(), Storage(attempts=2, folder=tmp_path / "x"))
    ]  # fmt: skip
    assert folders[0] == folders[1]
