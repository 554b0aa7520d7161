"""The records of a shard: batches that begin at fixed rows, draws that belong to a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddkmix.capture import open_capturing
from ddkmix.config import parse_config
from ddkmix.recording import Recorder
from ddkmix.teaching import open_models
from tests.conftest import ConfigTree, write_domain


@pytest.fixture
def recorder(tmp_path: Path, tiny_config: Callable[..., ConfigTree]) -> Recorder:
    """Of the first shard of a domain, 12 draws for each token, four rows in a forward pass."""
    domains = tmp_path / "domains"
    write_domain(domains, "code", shards=1, per_shard=4)
    capture = {"keep": "drawn", "draws": 12, "folder": str(tmp_path / "logits"), "batch_rows": 4}
    tree = tiny_config(domains=[str(domains)], cache_dir=str(tmp_path / "cache"), capture=capture)
    job = open_capturing(parse_config(tree, where="test"))
    teacher = open_models(job.prepared, torch.device("cpu"))["teacher"]
    return job.recorder(job.jobs()[0], teacher)


def test_a_capture_that_goes_on_reads_the_batches_of_the_whole_one(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on at row 6 begins with row 4: rows of a batch see the same neighbours, to the last bit."""
    asked: list[list[int]] = []
    batch = Recorder.batch

    def noting(self: Recorder, reader: Any, rows: np.ndarray) -> Any:
        asked.append(rows.tolist())
        return batch(self, reader, rows)

    monkeypatch.setattr(Recorder, "batch", noting)
    whole = list(recorder.records(0))
    first, asked[:] = [*asked], []
    assert whole[6:] == list(recorder.records(6))
    assert [4, 5, 6, 7] == first[1] == asked[0]
    assert first[1:] == asked


def test_every_row_has_draws_of_its_own(recorder: Recorder) -> None:
    """Whatever the batch: two rows never share random numbers, and one has the same in any company."""
    together = recorder._uniforms(np.array([0, 1, 2]), [5, 5, 5])
    assert together is not None
    parts = together.split(5)
    for i, part in enumerate(parts):
        alone = recorder._uniforms(np.array([i]), [5])
        assert alone is not None
        assert torch.equal(part, alone)
    assert 3 * 5 * 12 == len(together.flatten().unique())
