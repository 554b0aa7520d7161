"""`ddkmix capture`: the store says what the live teacher would, whoever writes it, however often it dies."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ddkmix import capture as capture_module
from ddkmix.batch import DenseSignal, TruncatedSignal
from ddkmix.capture import Job, capture, deal, open_capturing
from ddkmix.config import parse_config
from ddkmix.errors import ConfigError, DataError, NumericsError
from ddkmix.logits_store.reader import LogitsStore
from ddkmix.logits_store.sidecar import SidecarWriter
from ddkmix.logits_store.totals import Totals
from ddkmix.losses.reference import dense_logits
from ddkmix.pack import Part
from ddkmix.rows import RowReader
from ddkmix.teaching import open_teachers
from ddkmix.verifying import verify_store
from tests.conftest import REPO, ConfigTree, save_tiny_model, write_domain
from tests.test_checkpoint import no_file_larger_than
from tests.test_cli import ddkmix, refused

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> Make:
    """A config of one domain whose rows are packed and whose store is its own."""
    domains = tmp_path / "domains"
    write_domain(domains, "code", shards=2, per_shard=4)

    def config(folder: str = "logits", **sections: Any) -> Any:
        options = {"k": 20, "folder": str(tmp_path / folder), "batch_rows": 4, **sections.pop("capture", {})}
        tree = tiny_config(
            domains=[str(domains)], cache_dir=str(tmp_path / "cache"), capture=options, **sections
        )
        return parse_config(tree, where="test")

    return config


def sidecars(config: Any) -> dict[str, bytes]:
    """Name and content of every sidecar of a config's store."""
    return {path.name: path.read_bytes() for path in config.capture.folder.rglob("*.logits")}


def live_logits(config: Any, place: tuple[str, int, int]) -> torch.Tensor:
    """What the live teacher says about the tokens that predict in one row."""
    job = open_capturing(config)
    rows = job.rows[place[0]]
    ids = torch.from_numpy(RowReader(rows).read(place[1], place[2]).astype(np.int64))[None]
    said = open_teachers(job.prepared, job.device)["teacher"].signal({"input_ids": ids})
    return dense_logits(said.at(0))[: rows.tokens_at(place[1], place[2]) - 1]


def store_of(config: Any) -> LogitsStore:
    """The store of a config, opened as a run does it."""
    job = open_capturing(config)
    return LogitsStore.open(config.capture.folder, job.cards, job.rows)


@pytest.mark.parametrize("boundaries", [False, True])
def test_the_store_says_what_the_live_teacher_says(make: Make, boundaries: bool) -> None:
    """Position by position: the same classes in the same order, log-probabilities within the stated error;
    with and without documents kept apart, which are two stores."""
    config = make(capture={"log_prob_bytes": 2}, trainer={"document_boundaries": boundaries})
    capture(config)
    store = store_of(config)
    for place in (("code", 0, 0), ("code", 1, 3), ("code", 1, len(store.rows["code"].shards[1].offsets) - 1)):
        log_p = live_logits(config, place).log_softmax(-1)
        said = store.read([place])
        assert isinstance(said, TruncatedSignal)
        said = said.at(0).at(slice(0, len(log_p)))
        expected = log_p.topk(said.ids.shape[1])
        used = said.log_probs > -math.inf
        assert torch.equal(expected.indices[used], said.ids[used])
        torch.testing.assert_close(expected.values[used], said.log_probs[used], atol=5e-3, rtol=0)
    with pytest.raises(DataError, match="separator between documents"):
        store_of(make(capture={"log_prob_bytes": 2}, trainer={"document_boundaries": not boundaries}))


def test_hidden_states_give_the_live_teachers_very_logits(make: Make) -> None:
    """In float32 with four bytes: bit for bit, without a teacher."""
    config = make(capture={"keep": "hidden", "hidden_bytes": 4})
    capture(config)
    said = store_of(config).read([("code", 0, 1)])
    assert isinstance(said, DenseSignal)
    expected = live_logits(config, ("code", 0, 1))
    torch.testing.assert_close(expected, dense_logits(said.at(0))[: len(expected)], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("keep", ["top_p_k", "drawn", "hidden"])
def test_a_capture_that_was_interrupted_ends_with_the_same_bytes(
    make: Make, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a row in the middle of a batch: nothing is lost, doubled or drawn differently."""
    settings = {"keep": keep}
    whole = make("whole", capture=settings)
    capture(whole)
    config = make(capture=settings)
    append = SidecarWriter.append

    def dies(self: SidecarWriter, record: bytes) -> None:
        if self.num_rows == 6:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(SidecarWriter, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        capture(config)
    monkeypatch.undo()
    assert {} == sidecars(config)
    capture(config)
    assert sidecars(whole) == sidecars(config)
    assert not list(config.capture.folder.rglob("*.partial"))


def test_nothing_is_captured_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second capture loads no teacher, and says the same."""
    config = make()
    first = capture(config)
    monkeypatch.setattr(capture_module, "open_models", None)
    assert first == capture(config)
    fewer = make(loss=[{"name": "forward_kl"}])
    assert first == capture(fewer)


def test_a_damaged_sidecar_is_captured_again(make: Make) -> None:
    """A file that was cut is not whole; the others stay as they are."""
    config = make()
    capture(config)
    before = sidecars(config)
    (cut, *_) = config.capture.folder.rglob("*.logits")
    os.truncate(cut, 5000)
    capture(config)
    assert before == sidecars(config)


def test_other_batches_give_the_same_store(make: Make) -> None:
    """To the rounding of the forward pass: here classes are the same and log-probabilities as good as."""
    one, three = make("one", capture={"batch_rows": 1}), make("three", capture={"batch_rows": 3})
    capture(one), capture(three)
    assert sidecars(one).keys() == sidecars(three).keys()
    for place in (("code", 0, 4), ("code", 1, 2)):
        expected, actual = store_of(one).columns(place), store_of(three).columns(place)
        assert np.array_equal(expected.ids, actual.ids)
        np.testing.assert_allclose(expected.log_probs, actual.log_probs, atol=0.1)


def test_parts_make_one_store(make: Make) -> None:
    """Any machine may take any part; the files are those of one."""
    whole, parts = make("whole"), make("parts")
    capture(whole)
    capture(parts, part=Part(number=2, of=2))
    assert 1 == len(sidecars(parts))
    capture(parts, part=Part(number=1, of=2))
    assert sidecars(whole) == sidecars(parts)


def test_a_full_disk_stops_the_capture_in_one_line(make: Make) -> None:
    """What was captured stays; no file that is not whole has a sidecar's name; with space it is finished."""
    whole, config = make("whole"), make()
    capture(whole)
    open_capturing(config)  # rows are packed before the disk is full
    largest = max(len(data) for data in sidecars(whole).values())
    with no_file_larger_than(largest // 2), pytest.raises(DataError, match=r"cannot be written.*free space"):
        capture(config)
    assert {} == sidecars(config)
    capture(config)
    assert sidecars(whole) == sidecars(config)


def test_a_teacher_whose_logits_are_no_numbers_names_the_row(make: Make, tmp_path: Path) -> None:
    """Shard, row and position; nothing of it is stored. The embedding of one token is damaged here, and what
    attention makes of it reaches the whole row, so its first position is named."""
    from safetensors.torch import load_file, save_file

    config = make()
    rows = open_capturing(config).rows["code"]
    texts = [
        [RowReader(rows).read(number, row).tolist() for row in range(shard.num_rows)]
        for number, shard in enumerate(rows.shards)
    ]
    token = texts[0][2][3]
    broken = save_tiny_model(tmp_path / "broken", Path(config.teacher.model), tie_word_embeddings=False)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    expected = set()
    for number, shard in enumerate(texts):
        row = next(i for i, text in enumerate(shard) if token in text)
        expected.add(f"{rows.name_of(number, row)}, position 0")
    config = make(teacher={"model": str(broken)})
    with pytest.raises(NumericsError, match="the teacher's largest logit is nan") as failure:
        capture(config)
    assert str(failure.value).partition(": the")[0] in expected
    assert {} == sidecars(config)


def test_more_classes_than_there_are_is_refused_before_anything_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with both numbers."""
    monkeypatch.setattr(capture_module, "open_models", None)
    with pytest.raises(ConfigError, match=r"capture\.k = 400; the teacher has 320 classes"):
        capture(make(capture={"k": 400}))


def test_the_teachers_held_out_losses_are_in_the_store(make: Make) -> None:
    """Gaps need no teacher: the sums are those that an evaluator measures."""
    config = make()
    assert open_capturing(config).teachers_losses() is None
    capture(config)
    job = open_capturing(config)
    losses = job.teachers_losses()
    assert losses is not None
    sums = losses.sums
    (held_out,) = job.evaluator().held_out.values()
    assert len(held_out.num_tokens) == len(sums["code"])
    nats = sums["code"].sum() / held_out.num_tokens.sum()
    assert 3 < nats < 12


def test_totals_are_those_of_the_records(make: Make) -> None:
    """Rows, tokens and classes counted, kept mass and tail entropy recomputed from the live teacher."""
    config = make(capture={"k": 20, "p": 1.0, "log_prob_bytes": 2})
    (totals,) = capture(config).values()
    rows = open_capturing(config).rows["code"]
    assert (rows.num_rows, rows.num_tokens - rows.num_rows) == (totals.rows, totals.tokens)
    assert 20 * totals.tokens == totals.entries
    assert totals.tokens * (2 + 2 + 2 + 1 + 20 * 4) == totals.bytes  # nats, entropy, mass, count; entries
    kept = tail = 0.0
    places = [("code", s, r) for s, shard in enumerate(rows.shards) for r in range(shard.num_rows)]
    for place in places[:: len(places) // 3]:
        log_p = live_logits(config, place).log_softmax(-1).double()
        values = log_p.topk(20).values
        rest = 1 - values.exp().sum(-1)
        kept += float(values.exp().sum(-1).mean())
        bucketed = -(values.exp() * values).sum(-1) - rest * rest.log()
        tail += float((-(log_p.exp() * log_p).sum(-1) - bucketed).mean())
    count = len(places[:: len(places) // 3])
    assert kept / count == pytest.approx(totals.kept_mass / totals.tokens, rel=0.1)
    assert tail / count == pytest.approx(totals.tail_entropy / totals.tokens, rel=0.1)


def test_shards_are_dealt_by_their_rows() -> None:
    """The largest first, each to the rank with the least to do; every shard once."""
    jobs = [Job(domain="a", shard=i, path=Path(str(i)), num_rows=n) for i, n in enumerate((5, 9, 1, 4, 2))]
    hands = deal(jobs, 2)
    assert [[1, 4], [0, 2, 3]] == [sorted(one.shard for one in hand) for hand in hands]
    assert [[], []] == deal([], 2)


def test_totals_add_up() -> None:
    """Field by field; no tokens give no means."""
    assert Totals(rows=3, tokens=7, entropy=1.5) == Totals(rows=1, tokens=7) + Totals(rows=2, entropy=1.5)
    assert Totals().to_json()["entries_per_token"] is None


# --- verify ---------------------------------------------------------------------------------------------


def test_a_good_store_is_found_good(make: Make) -> None:
    """All rows read, two asked again, with a difference that rounding explains."""
    config = make()
    capture(config)
    (check,) = verify_store(config).domains.values()
    assert (open_capturing(config).rows["code"].num_rows, 0, 2) == (check.rows, check.missing, check.asked)
    assert not check.damaged
    assert check.difference is not None
    assert check.difference < 0.03


def test_damage_is_found_and_named(make: Make, capsys: pytest.CaptureFixture[str], write_config: Any) -> None:
    """Every damaged record, in a line, exit code 2."""
    config = make()
    capture(config)
    (path, *_) = sorted(config.capture.folder.rglob("*.logits"))
    data = bytearray(path.read_bytes())
    data[4096 + 10] ^= 1
    path.write_bytes(data)
    verified = verify_store(config)
    (line,) = verified.domains["code"].damaged
    assert "#0: its record in" in line
    with pytest.raises(DataError, match="1 records or sidecars are damaged"):
        verified.raise_if_damaged()


def test_records_of_another_model_are_found(make: Make, tmp_path: Path) -> None:
    """Whole, with good checksums, but not what this teacher says: a store that was renamed by hand."""
    other = save_tiny_model(tmp_path / "other", Path(make().teacher.model), seed=5)
    true, false = make(), make(teacher={"model": str(other)})
    capture(false)
    (made,) = false.capture.folder.iterdir()
    card = json.loads((made / "store.json").read_text())
    card["model"] = open_capturing(true).cards["code"].model
    (made / "store.json").write_text(json.dumps(card))
    (line,) = verify_store(true).domains["code"].damaged
    assert "records and teacher differ by" in line


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_json(
    make: Make, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the other commands do; a wrong part is one line."""
    from ddkmix.config import dump_config

    path = write_config(dump_config(make()))
    assert 0 == ddkmix("capture", path)
    assert "bytes/token" in capsys.readouterr().out
    assert 0 == ddkmix("capture", path, "--format", "json")
    assert {"code", "total"} == set(json.loads(capsys.readouterr().out))
    assert 0 == ddkmix("capture", path, "--verify", "--format", "markdown")
    assert "| code |" in capsys.readouterr().out
    assert "--part 3/2" in refused(capsys, "capture", path, "--part", "3/2")


def command(config: Path, *arguments: str, ranks: int = 1) -> list[str]:
    """`ddkmix capture` in processes of its own."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", "0", "-m"]
    return [*start, "ddkmix", "capture", str(config), *arguments]


def test_two_ranks_write_the_files_of_one_and_a_kill_costs_nothing(make: Make, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle of a shard, then finished by two ranks: the bytes of one undisturbed
    process, no row lost or doubled, no leftovers."""
    from ddkmix.config import dump_config

    whole, config = make("whole", capture={"keep": "drawn", "batch_rows": 1}), None
    capture(whole)
    config = make(capture={"keep": "drawn", "batch_rows": 1})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dump_config(config)))
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    victim = subprocess.Popen(
        command(path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        journals = list(config.capture.folder.rglob("*.journal"))
        if journals and max(journal.stat().st_size for journal in journals) >= 3 * 16:
            break
    victim.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == victim.wait()
    assert sidecars(config) != sidecars(whole)
    done = subprocess.run(
        command(path, "--format", "json", ranks=2),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    assert sidecars(whole) == sidecars(config)
    assert not list(config.capture.folder.rglob("*.journal"))
    assert json.loads(done.stdout)["code"]["rows"] == open_capturing(config).rows["code"].num_rows
