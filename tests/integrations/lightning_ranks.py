"""A run of Lightning on two processes, which write down the rows that each of them trained on."""

import json
import sys
import warnings
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from ddkmix import DomainMixture, GapEvaluator, Reweighter
from ddkmix.integrations.lightning import MixtureCallback, MixtureDataModule
from tests.hand_made import numbered_rows
from tests.integrations.lightning_student import Student, trainer_of
from tests.integrations.policies import Rotating

STEPS, NAMES = 6, "abc"


def reweighter_of(folder: Path) -> Reweighter:
    """Weights that move every other step; each row names itself by its tokens."""
    rows = {
        name: numbered_rows(folder / f"rows-{name}", name, 20, length=4, seq_len=4, first=1 + 40 * i)
        for i, name in enumerate(NAMES)
    }
    held_out = {name: [{"input_ids": [1, 2, 3, 4]}] * 3 for name in NAMES}
    evaluator = GapEvaluator(held_out, cache_dir=folder / "cache")
    return Reweighter(DomainMixture(rows, batch_rows=12), evaluator, Rotating(), interval_steps=2)


def main(folder: Path) -> None:
    """Train to the end, then again from the checkpoint after three steps."""
    saving = ModelCheckpoint(folder / "saved", "at-{step}", every_n_train_steps=3, save_top_k=-1)
    for path in (None, folder / "saved" / "at-step=3.ckpt"):
        reweighter, student = reweighter_of(folder), Student()
        trainer = trainer_of(
            folder,
            MixtureCallback(reweighter),
            saving,
            max_steps=STEPS,
            accumulate_grad_batches=2,
            strategy="ddp",
            devices=2,
        )
        trainer.fit(student, MixtureDataModule(reweighter.mixture), ckpt_path=path)
        name = f"rank-{trainer.global_rank}-{'resumed' if path else 'whole'}.json"
        (folder / name).write_text(json.dumps(student.seen))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(Path(sys.argv[1]))
