"""Temporary folders: gone at the end, and gone after a kill when the next process comes along."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ddkmix.pack.scratch import scratch_folder
from tests.conftest import REPO

HOLD = """
import sys
from pathlib import Path
from ddkmix.pack.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "documents").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_there_and_then_gone(tmp_path: Path) -> None:
    """Also after an exception; several live side by side."""
    parent = tmp_path / "incoming"
    with scratch_folder(parent) as one, scratch_folder(parent) as two:
        (one / "file").write_text("x")
        assert one != two
    assert [] == list(parent.iterdir())


def test_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """While the process lives its folder stays; after SIGKILL the next one deletes it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert process.stdout is not None and process.stdin is not None
    folder = Path(process.stdout.readline().strip())
    with scratch_folder(tmp_path):
        assert (folder / "documents").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    with scratch_folder(tmp_path):
        assert not folder.exists()
    assert [] == list(tmp_path.iterdir())
