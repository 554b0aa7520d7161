"""`data.json`: what it says, which block is in force, and what a resume does to it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import RunConfig, parse_config
from ddkmix.domains import load_domains
from ddkmix.errors import RunError
from ddkmix.loader import DomainMixture
from ddkmix.pack import PackedDomain, pack_domains
from ddkmix.planner import PlannerState
from ddkmix.provenance import DataBlock, block_at, describe, read_blocks, record_data
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import ConfigTree, write_domain

Parts = tuple[RunConfig, dict[str, PackedDomain], DataBlock]


@pytest.fixture
def parts(tmp_path: Path, tiny_config: Any, tiny_teacher: Path) -> Parts:
    """A config over two domains, one with a limit of its own; its rows; and what describes them."""
    write_domain(tmp_path / "domains", "code", per_shard=8, max_epochs=2)
    write_domain(tmp_path / "domains", "math", per_shard=9)
    tree: ConfigTree = tiny_config(
        domains=[str(tmp_path / "domains")],
        cache_dir=str(tmp_path / "cache"),
        seed=7,
        mixture={"max_epochs": 3.5, "block_rows": 64},
    )
    config = parse_config(tree, where="test")
    tokenizer = read_tokenizer(str(tiny_teacher))
    packed = pack_domains(
        load_domains(config.domains), tokenizer, seq_len=32, cache_dir=config.cache_dir, processes=1
    )
    rows = {name: domain.train for name, domain in packed.items()}
    mixture = DomainMixture(rows, batch_rows=6, max_epochs=3.5)
    return config, packed, describe(config, rows, mixture.settings, tokenizer)


def test_a_block_says_what_shapes_the_stream(parts: Parts, tiny_teacher: Path) -> None:
    """Per domain fingerprint, folder, shards in order, tokens and limit; tokenizer; seed and sizes."""
    _, packed, block = parts
    assert ("code", "math") == block.settings.domains
    assert (7, 64, 32, "rows", 6) == (
        block.seed,
        block.block_rows,
        block.seq_len,
        block.count,
        block.settings.batch_rows,
    )
    for name, record, limit in zip(("code", "math"), block.domains, (2.0, 3.5), strict=True):
        train = packed[name].train
        assert train.fingerprint == record.fingerprint
        assert [(s.name, s.num_rows, s.sha256) for s in train.shards] == [
            (s.name, s.rows, s.sha256) for s in record.shards
        ]
        assert (train.num_tokens, train.num_rows, limit) == (
            record.tokens,
            record.num_rows,
            record.max_epochs,
        )
        assert all((Path(record.folder) / shard.name).is_file() for shard in record.shards)
        assert Path(record.folder).is_absolute()
        cap = block.settings.cap_rows[block.settings.domains.index(name)]
        assert int(limit * train.num_rows) == cap
    assert str(tiny_teacher / "tokenizer.json") == block.tokenizer.path
    assert "<|endoftext|>" == block.tokenizer.separator


def test_relative_places_are_written_down_in_full(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache named from the working directory is found from any other; a URL stays what it is."""
    config, packed, block = parts
    train = packed["code"].train
    for location, folder in (
        ("rows/a.tar", str(Path("rows").absolute())),
        ("a.tar", str(Path().absolute())),
        ("s3://bucket/rows/a.tar", "s3://bucket/rows"),
    ):
        moved = replace(train, shards=(replace(train.shards[0], location=location),))
        rows = {"code": moved, "math": packed["math"].train}
        tokenizer = read_tokenizer(block.tokenizer.name)
        assert folder == describe(config, rows, block.settings, tokenizer).domains[0].folder


def test_a_block_survives_its_file(tmp_path: Path, parts: Parts) -> None:
    """Everything comes back, places and the planner's state too."""
    block = parts[2]
    state = PlannerState(step=4, version=1, weights=(1, 2), credit=(3, -3), served=(5, 6))
    for value in (block, replace(block, from_step=4, seed=8, planner=state)):
        record_data(tmp_path, value)
        again = read_blocks(tmp_path)[-1]
        assert value.to_json() == again.to_json()
        assert value == again
    assert [0, 4] == [tree["from_step"] for tree in json.loads((tmp_path / "data.json").read_text())]


def test_the_same_data_at_a_resume_add_nothing(tmp_path: Path, parts: Parts) -> None:
    """The file keeps its one block, whatever the step."""
    block = parts[2]
    record_data(tmp_path, block)
    before = (tmp_path / "data.json").read_bytes()
    for step in (0, 5, 9):
        record_data(tmp_path, replace(block, from_step=step))
        assert before == (tmp_path / "data.json").read_bytes()


def moved(block: DataBlock, folder: str) -> DataBlock:
    """The same data in another place."""
    return replace(block, domains=tuple(replace(domain, folder=folder) for domain in block.domains))


def test_rows_that_moved_are_found_in_their_new_place(tmp_path: Path, parts: Parts) -> None:
    """A cache may move between start and resume: places are brought up to date, also in older blocks."""
    block = parts[2]
    record_data(tmp_path, block)
    record_data(tmp_path, moved(replace(block, from_step=5), "/elsewhere"))
    (only,) = read_blocks(tmp_path)
    assert 0 == only.from_step
    assert {"/elsewhere"} == {domain.folder for domain in only.domains}
    record_data(tmp_path, moved(replace(block, from_step=6, seed=8), "/again"))
    assert [{"/again"}] * 2 == [{d.folder for d in b.domains} for b in read_blocks(tmp_path)]


def test_other_data_are_a_new_block_and_a_rewind_drops_later_ones(tmp_path: Path, parts: Parts) -> None:
    """Changed at 5 and at 8; then resumed from step 6 with the first data: the block of 8 never was."""
    block = parts[2]
    other = replace(block, domains=(replace(block.domains[0], fingerprint="f"), block.domains[1]))
    record_data(tmp_path, block)
    record_data(tmp_path, replace(other, from_step=5))
    record_data(tmp_path, replace(block, from_step=8))
    assert [0, 5, 8] == [b.from_step for b in read_blocks(tmp_path)]
    record_data(tmp_path, replace(other, from_step=6))
    assert [0, 5] == [b.from_step for b in read_blocks(tmp_path)]
    record_data(tmp_path, replace(block, from_step=5))
    assert [0] == [b.from_step for b in read_blocks(tmp_path)]


def test_the_block_in_force_is_the_last_that_begins_before_the_step(tmp_path: Path, parts: Parts) -> None:
    """Steps count from 1: the first 5 are of the first block."""
    blocks = [parts[2], replace(parts[2], from_step=5, seed=8)]
    forces = [block_at(blocks, step, tmp_path).from_step for step in (1, 5, 6, 100)]
    assert [0, 0, 5, 5] == forces
    with pytest.raises(RunError, match=r"data.json starts after step 5; what step 4 was served is not known"):
        block_at(blocks[1:], 4, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[{}]", '{"a": 1}', "null"])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    """The file, and that it is damaged or of another version."""
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(
        RunError, match=r"data.json cannot be read \(.*damaged or of another version"
    ) as error:
        read_blocks(tmp_path)
    assert "\n" not in str(error.value)


def test_sizes_of_rows_count_only_where_tokens_are_shared(parts: Parts) -> None:
    """None for shares of rows; tokens over rows for shares of tokens."""
    block = parts[2]
    assert block.row_sizes is None
    expected = tuple(d.tokens / d.num_rows for d in block.domains)
    assert expected == replace(block, count="tokens").row_sizes
    assert all(1 < size <= 32 for size in expected)
