"""Packed rows straight from domain cards, for loops without a config."""

from collections.abc import Sequence
from pathlib import Path

from ddkmix.config import Storage
from ddkmix.domains import load_domains
from ddkmix.pack import PackedDomain, pack_domains
from ddkmix.row_layout import Strategy
from ddkmix.tokenizer import read_tokenizer


def pack_cards(
    cards: Sequence[str] | str,
    *,
    tokenizer: str,
    seq_len: int,
    cache_dir: Path | str,
    separator: str | None,
    strategy: Strategy,
    processes: int,
    storage: Storage | None,
) -> dict[str, PackedDomain]:
    """The rows of some cards; what the cache lacks is packed now.

    Args:
        cards: card files, globs or folders.
        tokenizer: local folder or Hub id.
        seq_len, separator, strategy, processes: as in the section `pack` of a config.
        cache_dir: where packed rows are kept.
        storage: how remote shards are read; the defaults of a config when None.

    Raises:
        ConfigError: an argument is wrong.
        DataError: a card or its shards are wrong.
    """
    return pack_domains(
        load_domains([cards] if isinstance(cards, str) else cards, storage),
        read_tokenizer(tokenizer, separator=separator),
        seq_len=seq_len,
        cache_dir=Path(cache_dir),
        strategy=strategy,
        processes=processes,
        storage=storage or Storage(),
    )
