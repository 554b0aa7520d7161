"""The text that every contestant serves: the repository's domains as rows of tokens, the same rows for all.

The domains in `domains/` are packed by ddkmix with the shipped tokenizer; a domain with fewer rows than asked
for is repeated, so a set is big enough for its order and its files to matter. Every row is full: no padding.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
TOKENIZER = REPO / "models" / "smollm2-135m-instruct"
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Rows of every domain, in memory-mapped files."""

    folder: Path
    domains: tuple[str, ...]
    rows_per_domain: int
    shard_rows: int
    """Rows in a shard, for every format that has shards."""
    seq_len: int

    def rows(self, domain: str) -> np.ndarray:
        """The rows of a domain, (R, T) uint16, read-only."""
        return np.load(self.folder / "rows" / f"{domain}.npy", mmap_mode="r")

    @property
    def weights(self) -> dict[str, float]:
        """The mixture that all are asked for: uneven, as real ones are."""
        raw = np.arange(1, len(self.domains) + 1, dtype=np.float64)
        return dict(zip(self.domains, (raw / raw.sum()).tolist(), strict=True))

    def format_folder(self, name: str) -> Path:
        """Where a contestant keeps its format."""
        return self.folder / "formats" / name


def make_corpus(
    cache: Path, *, seq_len: int, rows_per_domain: int, shard_rows: int, tokenizer: Path = TOKENIZER
) -> Corpus:
    """The corpus of this size, written when the cache lacks it."""
    folder = cache / f"corpus-{seq_len}-{rows_per_domain}-{shard_rows}"
    done = folder / "corpus.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "rows").mkdir(parents=True)
        packed = _packed_rows(cache, seq_len, tokenizer)
        for domain, rows in packed.items():
            np.save(folder / "rows" / f"{domain}.npy", rows[np.arange(rows_per_domain) % len(rows)])
        done.write_text(json.dumps({"domains": sorted(packed)}))
    return Corpus(
        folder=folder,
        domains=tuple(json.loads(done.read_text())["domains"]),
        rows_per_domain=rows_per_domain,
        shard_rows=shard_rows,
        seq_len=seq_len,
    )


def _packed_rows(cache: Path, seq_len: int, tokenizer: Path) -> dict[str, np.ndarray]:
    """Full rows of every domain of the repository, by domain."""
    from ddkmix.domains import load_domains
    from ddkmix.pack import pack_domains
    from ddkmix.rows import RowReader
    from ddkmix.tokenizer import read_tokenizer

    packed = pack_domains(
        load_domains([str(REPO / "domains")]),
        read_tokenizer(str(tokenizer), separator=SEPARATOR),
        seq_len=seq_len,
        cache_dir=cache / "ddkmix",
        processes=1,
    )
    rows = {}
    for name, domain in packed.items():
        reader = RowReader(domain.train)
        rows[name] = np.stack(
            [
                reader.read(i, row)
                for i, shard in enumerate(domain.train.shards)
                for row in np.flatnonzero(shard.num_tokens == seq_len).tolist()
            ]
        ).astype(np.uint16)
        reader.close()
    return rows
