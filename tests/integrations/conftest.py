"""A run of our own trainer, and the same mixture for the loops of other people.

Weights move at every interval in a way that does not depend on losses (`policies.Rotating`), so a loop
that serves other rows than `trainer_rows` has lost a row, repeated one, or changed weights too early or
too late.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ddkmix import DomainMixture, GapEvaluator, Reweighter, trainer
from ddkmix.config import parse_config
from ddkmix.setup import train
from tests.integrations.policies import Rotating

STEPS, BATCH_ROWS, INTERVAL_STEPS, SEED, SEQ_LEN = 8, 12, 2, 5, 32

Row = tuple[int, ...]
Rows = list[list[Row]]
"""Of each step, in the order of the global batch."""


def rows_of(input_ids: torch.Tensor) -> list[Row]:
    """The rows of a batch as values that can be compared."""
    return [tuple(row) for row in input_ids.tolist()]


def dealt(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The rows of a step from its micro-batches, which took every n-th row each."""
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


@pytest.fixture(scope="session")
def trainer_rows(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_domains: Path) -> Rows:
    """The rows of each step of a run of ddkmix's own trainer."""
    folder, found = tmp_path_factory.mktemp("own-trainer"), []
    config = parse_config(
        {
            "run_dir": str(folder / "run"),
            "cache_dir": str(tiny_domains / "cache"),
            "domains": [str(tiny_domains)],
            "seed": SEED,
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"init": "prune", "layers": [0]},
            "pack": {"seq_len": SEQ_LEN, "processes": 1},
            "mixture": {"interval_steps": INTERVAL_STEPS},
            "policy": {"name": "tests.integrations.policies:Rotating"},
            "guards": "off",
            "trainer": {"steps": STEPS, "batch_rows": BATCH_ROWS, "logits_chunk_tokens": 64},
            "optimizer": {"lr": 1e-3},
            "evaluation": {"rows": 4},
        },
        where="test",
    )
    step = trainer.train_step

    def recording(run: Any, batch: dict[str, torch.Tensor], number: int) -> tuple[float, int]:
        found.append(rows_of(batch["input_ids"]))
        return step(run, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", recording)
        train(config)
    assert STEPS == len(found)
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parts:
    """What a user of another loop makes."""

    mixture: DomainMixture
    evaluator: GapEvaluator
    reweighter: Reweighter
    student: Any
    """A small transformers model."""


@pytest.fixture
def parts(tiny_teacher: Path, tiny_domains: Path) -> Iterator[Callable[..., Parts]]:
    """A function that makes the parts of a run that must serve `trainer_rows`; keywords go to the mixture."""
    made: list[DomainMixture] = []

    def make(**options: Any) -> Parts:
        cards = {
            "cards": str(tiny_domains),
            "tokenizer": str(tiny_teacher),
            "seq_len": SEQ_LEN,
            "cache_dir": tiny_domains / "cache",
        }
        mixture = DomainMixture.from_cards(**cards, batch_rows=BATCH_ROWS, seed=SEED, **options)
        made.append(mixture)
        evaluator = GapEvaluator.from_cards(**cards, reference=dict.fromkeys(mixture.domains, 1.0), rows=4)
        reweighter = Reweighter(mixture, evaluator, Rotating(), interval_steps=INTERVAL_STEPS)
        torch.manual_seed(0)
        student = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
        return Parts(mixture=mixture, evaluator=evaluator, reweighter=reweighter, student=student)

    yield make
    for mixture in made:
        mixture.close()
