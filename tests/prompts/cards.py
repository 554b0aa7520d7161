"""Small prompt domains: what the tests of examples, packing and runs share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_shard


def talk(question: str, answer: str) -> dict[str, Any]:
    """One example."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompt_domain(
    folder: Path,
    train: Sequence[Sequence[dict[str, Any]]],
    held_out: Sequence[dict[str, Any]],
    name: str = "talk",
    card: Mapping[str, Any] | None = None,
) -> Path:
    """A domain of these examples, one list per train shard; `card` changes the card."""
    for i, examples in enumerate(train):
        write_shard(folder / name / f"train-{i}.tar", [json.dumps(one) for one in examples], extension="json")
    path = folder / name / "held_out.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in held_out))
    content = {
        "name": name,
        "prompt_response": {"messages": "messages"},
        "train": f"{name}/train-*.tar",
        "held_out": f"{name}/held_out.jsonl",
        "license": "CC0-1.0",
        **(card or {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path
