"""Shared by the tests of Trainer and TRL: rows that name themselves, a tiny student, a recording trainer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from ddkmix import DomainLosses, DomainMixture, Reweighter
from ddkmix.integrations.transformers import MixtureTrainer
from tests.hand_made import numbered_rows
from tests.integrations.policies import Rotating

ROWS = {"code": 30, "math": 50, "prose": 17}
"""Rows of each domain; all their tokens are FIRST + the number of the row."""
FIRST = {"code": 10, "math": 100, "prose": 200}
LENGTH, BATCH_ROWS, INTERVAL = 8, 12, 2


class Constant:
    """An evaluator that measures nothing and counts how often."""

    def __init__(self, domains: tuple[str, ...] = tuple(ROWS)) -> None:
        self.domains, self.measured = domains, 0

    def measure(self, model: torch.nn.Module) -> DomainLosses:
        """3 nats for the student, 2 for the teacher, everywhere."""
        self.measured += 1
        return DomainLosses.from_means(dict.fromkeys(self.domains, 3.0), dict.fromkeys(self.domains, 2.0))


def items() -> dict[str, list[dict[str, list[int]]]]:
    """The rows as a user's own map-style datasets."""
    return {
        name: [
            {"input_ids": [FIRST[name] + i] * LENGTH, "labels": [FIRST[name] + i] * LENGTH} for i in range(n)
        ]
        for name, n in ROWS.items()
    }


def own() -> DomainMixture:
    """The mixture that a Trainer makes of the user's own datasets."""

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    return DomainMixture.from_datasets(items(), batch_rows=BATCH_ROWS, seed=42, collate_fn=collate)


def packed(folder: Path, **options: Any) -> DomainMixture:
    """The rows as a mixture of packed shards."""
    rows = {
        name: numbered_rows(folder, name, n, length=LENGTH, seq_len=LENGTH, first=FIRST[name])
        for name, n in ROWS.items()
    }
    return DomainMixture(rows, batch_rows=BATCH_ROWS, **options)


def student(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with one layer."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def arguments(folder: Path, *, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of a short quiet run on the CPU with 12 rows a step."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": BATCH_ROWS // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }


class Recorder(MixtureTrainer):
    """Notes the first token of each row that a step trains on, and what its loss is divided by."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: dict[int, list[list[int]]] = {}
        self.num_items: dict[int, list[int]] = {}
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One micro-batch; steps count from 0."""
        step = self.state.global_step
        self.rows.setdefault(step, []).append(inputs["input_ids"][:, 0].tolist())
        self.num_items.setdefault(step, []).append(int(num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(folder: Path, data: Any = None, *, cls: type = Recorder, **changes: Any) -> Any:
    """A Trainer over the rows (of `data`, or the user's own) that measures every second step."""
    given = {"policy": Rotating(), "interval_steps": INTERVAL, "evaluator": Constant()}
    names = ("policy", "interval_steps", "evaluator", "mixture_options", "allow_changes")
    names += ("eval_dataset", "callbacks")
    given |= {name: changes.pop(name) for name in names if name in changes}
    return cls(
        student(),
        TrainingArguments(**arguments(folder, **changes)),
        train_dataset=items() if data is None else data,
        data_collator=default_data_collator,
        **given,
    )


def steps_of(mixture: DomainMixture, steps: int, parts: int) -> Iterator[list[list[int]]]:
    """The first tokens that a loop of ours would train on: each step's micro-batches, weights rotating."""
    reweighter = Reweighter(mixture, Constant(), Rotating(), interval_steps=INTERVAL)
    for step in range(steps):
        reweighter.step(None, step)
        rows = next(mixture)["input_ids"][:, 0].tolist()
        yield [rows[part::parts] for part in range(parts)]


def main(folder: str) -> None:
    """Six steps on every process of torchrun: writes which rows this one has trained on."""
    from torch.distributed import barrier, get_rank

    run = trainer(
        Path(folder),
        accumulation=3,
        per_device_train_batch_size=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
    )
    run.train()
    (Path(folder) / f"rank{get_rank()}.json").write_text(json.dumps(run.rows))
    barrier()  # the group goes with the process (rank_program): taken down beside a DDP model it may hang
