"""The Trainer over a mixture on two real gloo processes."""

import json
from pathlib import Path

from tests.conftest import REPO
from tests.integrations.conftest import dealt
from tests.integrations.trainers import own, steps_of, trainer
from tests.test_elastic import torchrun


def test_two_processes_train_on_the_rows_of_one(tmp_path: Path) -> None:
    """Real gloo processes under torchrun: together they have each step's rows, weights move on both at the
    same step, and a single process goes on from their checkpoint."""
    program = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); "
        "from tests.integrations.trainers import main; main(sys.argv[1])"
    )
    (tmp_path / "program.py").write_text(program)
    torchrun(2, str(tmp_path / "program.py"), str(tmp_path))
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    expected = list(steps_of(own(), 8, 1))
    for step, (whole,) in enumerate(expected[:6]):
        rows = [row for rank in found for part in rank[str(step)] for row in part]
        assert sorted(whole) == sorted(rows)
        assert [[2] * 3] * 2 == [[len(part) for part in rank[str(step)]] for rank in found]
    run = trainer(tmp_path, accumulation=3)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [whole for (whole,) in expected[3:]] == [dealt(parts) for parts in run.rows.values()]
