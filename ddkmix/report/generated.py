"""What responses were made: how many and how long per domain, where they lie, and a few of them as text."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ddkmix.generate import Generating
from ddkmix.report.gaps import Format, render_markdown, render_table
from ddkmix.report.markup import visible
from ddkmix.response_store.reader import ResponseStore, ResponseTotals, response_path

_HEADER = ["domain", "rows", "tokens", "tokens/row", "ended", "empty", "store"]


def render_generated(totals: Mapping[str, ResponseTotals], stores: Mapping[str, Path], style: Format) -> str:
    """The responses of each domain and of all, in the format asked for.

    `ended` counts those that ended by themselves, `empty` those that say nothing.

    Args:
        totals: of each domain's files.
        stores: the folder of each domain's store.
        style: "table", "json" or "markdown".
    """
    every = {**totals, "total": sum(totals.values(), ResponseTotals())}
    if style == "json":
        tree = {name: {**_numbers(one), "store": _shown(stores.get(name))} for name, one in every.items()}
        return json.dumps(tree, indent=1, allow_nan=False)
    rows = [[name, *_cells(one), _shown(stores.get(name)) or ""] for name, one in every.items()]
    if style == "markdown":
        return render_markdown(_HEADER, rows)
    return render_table(_HEADER, rows, left=("store",))


def render_exchanges(job: Generating, count: int) -> str:
    """The first prompts of each domain that are answered, and the responses, as text.

    Args:
        job: whose they are.
        count: how many of each domain.

    Raises:
        DataError: a row or a response cannot be read.
    """
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(job.prepared.tokenizer.path)).decode
    blocks = []
    for name, prompts in job.prompts.items():
        answered = (
            (number, row)
            for number, shard in enumerate(prompts.shards)
            if response_path(job.folder(name), prompts, number).exists()
            for row in range(shard.num_rows)
        )
        shown = list(islice(answered, count))
        if not shown:  # a part of the work need not have a shard of every domain
            continue
        store = ResponseStore({name: job.folder(name)}, {name: prompts})
        for number, row in shown:
            response = store.read((name, number, row))
            texts = [
                visible(decode(ids.tolist(), skip_special_tokens=False))
                for ids in (prompts.read(number, [row])[0], response.ids)
            ]
            how = "ended" if response.ended else "was cut"
            blocks.append(
                f"=== {name}/{prompts.shards[number].name}#{row}\n{texts[0]}\n"
                f"--- {job.by}, {len(response.ids)} tokens, {how}\n{texts[1]}"
            )
    return "\n\n".join(blocks)


def _numbers(one: ResponseTotals) -> dict[str, Any]:
    return {"rows": one.rows, "tokens": one.tokens, "ended": one.ended, "empty": one.empty}


def _cells(one: ResponseTotals) -> list[str]:
    mean = f"{one.tokens / one.rows:.1f}" if one.rows else "-"
    return [f"{one.rows:,}", f"{one.tokens:,}", mean, f"{one.ended:,}", f"{one.empty:,}"]


def _shown(folder: Path | None) -> str | None:
    return None if folder is None else str(folder)
