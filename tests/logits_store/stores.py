"""A store written by hand, whose every record a test knows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddkmix.index import DomainRows
from ddkmix.logits_store.card import Kept, StoreCard, write_card
from ddkmix.logits_store.codec import RecordFormat, encode
from ddkmix.logits_store.sidecar import SidecarWriter, sidecar_path
from ddkmix.logits_store.signal import columns_of
from ddkmix.truncation import seeded_uniforms, truncate

CLASSES = 300


def card_of(kept: Kept, **changes: Any) -> StoreCard:
    """The card of some teacher."""
    card = StoreCard(
        teacher="teacher",
        members=(),
        model="m" * 64,
        tokenizer="t" * 64,
        vocab_size=None,
        separator_id=None,
        kept=kept,
        temperatures=(2.0,),
    )
    return replace(card, **changes)


def logits_of_row(domain: str, shard: int, row: int, tokens: int) -> torch.Tensor:
    """What the teacher says about a row."""
    generator = torch.Generator().manual_seed(hash((len(domain), shard, row)) % 2**31)
    return 3 * torch.randn(tokens, CLASSES, generator=generator)


def write_store(folder: Path, card: StoreCard, rows: DomainRows, shards: Sequence[int] | None = None) -> Path:
    """Records of the rows of one domain; gives the store's folder."""
    layout = RecordFormat(num_classes=CLASSES, kept=card.kept, temperatures=card.temperatures)
    store = folder / card.key
    write_card(store, card, num_classes=CLASSES)
    for number in range(len(rows.shards)) if shards is None else shards:
        shard = rows.shards[number]
        with SidecarWriter(sidecar_path(store, rows.domain, shard)) as writer:
            for row in range(shard.num_rows):
                n = max(rows.tokens_at(number, row) - 1, 0)
                signal = truncate(
                    logits_of_row(rows.domain, number, row, n),
                    torch.zeros(n, dtype=torch.int64),
                    card.kept,
                    card.temperatures,
                    uniforms=torch.from_numpy(seeded_uniforms([number, row], n, card.kept.draws or 1)),
                )
                writer.append(encode(columns_of(signal), layout))
            writer.finish({"shard": shard.sha256})
    return store
