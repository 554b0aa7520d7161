"""Small domains of given documents, packed: what the tests of packing share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ddkmix.domains import Domain, load_domains
from ddkmix.index import DomainRows
from ddkmix.pack import PackedDomain, pack_domains
from ddkmix.row_layout import Strategy
from ddkmix.rows import RowReader
from ddkmix.tokenizer import TokenizerCard
from tests.conftest import write_shard

SEQ_LEN = 16


def domain_of(folder: Path, name: str, train: Sequence[Sequence[str]], held_out: Sequence[str]) -> Path:
    """A domain of these documents, one list per train shard."""
    for i, texts in enumerate(train):
        write_shard(folder / name / f"train-{i:06d}.tar", texts)
    write_shard(folder / name / "held_out.tar", held_out)
    card = {
        "name": name,
        "train": [f"{name}/train-{i:06d}.tar" for i in range(len(train))],
        "held_out": f"{name}/held_out.tar",
        "license": "CC0-1.0",
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(card))  # JSON is YAML
    return path


def packed_of(
    folder: Path,
    tokenizer: TokenizerCard,
    train: Sequence[Sequence[str]],
    held_out: Sequence[str] = ("held out",),
    *,
    seq_len: int = SEQ_LEN,
    strategy: Strategy = "concatenate",
) -> PackedDomain:
    """One domain, packed."""
    domain_of(folder, "code", train, held_out)
    cards = load_domains([str(folder / "code.yaml")])
    cache = folder / "cache"
    packed = pack_domains(cards, tokenizer, seq_len=seq_len, cache_dir=cache, strategy=strategy, processes=1)
    return packed["code"]


def one_domain(path: Path, **card: Any) -> Domain:
    """The domain of a card with these keys, written to `path`."""
    path.write_text(yaml.safe_dump({"name": "code", "license": "CC0-1.0", **card}))
    (domain,) = load_domains([str(path)])
    return domain


def files_of(folder: Path) -> dict[str, bytes]:
    """Name and content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(rows: DomainRows, tokenizer: TokenizerCard) -> list[str]:
    """The documents of some rows, decoded, in the order of shards and rows."""
    from tokenizers import Tokenizer

    library, reader = Tokenizer.from_file(str(tokenizer.path)), RowReader(rows)
    texts = []
    for number, shard in enumerate(rows.shards):
        ids: list[int] = []
        for row in range(shard.num_rows):
            ids += reader.read(number, row)[: shard.num_tokens[row]].tolist()
        ends = [i for i, token in enumerate(ids) if token == tokenizer.separator_id]
        starts = [0, *(end + 1 for end in ends)]
        texts += [library.decode(ids[a:b]) for a, b in zip(starts, ends, strict=False)]
    return texts
