"""What both systems are asked to do, and what a measuring process answers."""

import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One measurement: some optimizer steps of one objective on the same prompts in the same order."""

    objective: str
    """"gkd" or "minillm"."""
    teacher: str
    student: str
    teacher_dtype: str
    prompts: str
    """A JSON file: a list of lists of messages, `batch_rows` of them for each step."""
    steps: int
    """Warm-up included."""
    warmup_steps: int
    batch_rows: int
    max_new_tokens: int
    teacher_share: float
    """Of ddkmix's MiniLLM: of tokens drawn from a mixture with the teacher; TRL has no such thing."""
    lr: float
    folder: str
    """Where the process may write, of its own."""
    card_folder: str
    """Domain cards whose rows are the prompts."""
    cache: str
    seq_len: int

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


def read_job(text: str) -> Job:
    """What `to_json` wrote."""
    return Job(**json.loads(text))


def result(job: Job, step_s: list[float], generated: int, versions: dict[str, str]) -> dict[str, Any]:
    """What a process answers.

    Args:
        job: what was asked.
        step_s: seconds of each step, warm-up included.
        generated: tokens of responses over all steps; an end of a turn counts.
        versions: of packages.
    """
    assert len(step_s) == job.steps, f"{len(step_s)} steps were timed, {job.steps} were to be"
    median = statistics.median(step_s[job.warmup_steps :])
    tokens = generated / job.steps
    return {
        "step_s": [round(seconds, 4) for seconds in step_s],
        "median_step_s": median,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / median,
        "peak_mb": peak_mb(),
        "versions": versions,
    }


def peak_mb() -> float:
    """Most resident memory of this process so far, in MB of 1e6 bytes.

    The kernel's own account of the address space: `ru_maxrss` also keeps the peak of the process that forked
    this one, before it became another program.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024 / 1e6
