"""One measuring process: `child.py '{"task": "memory", ...}'`, which answers with a line of JSON.

time     contestants take turns for some rounds; seconds of each, after a small warm-up
memory   one pass of one contestant; bytes by which the process's peak grew, and seconds of the pass
error    gradients of all contestants against the naive loss in float64, relative to its norm
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

from loss_bench.contestants import CONTESTANTS, Problem, make_problem  # noqa: E402


def main() -> None:
    """Do the task and print what was found."""
    task = json.loads(sys.argv[1])
    dtype = getattr(torch, task.pop("dtype"))
    print(json.dumps(TASKS[task.pop("task")](dtype=dtype, **task)), flush=True)


def times(names: list[str], vocab: int, tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of each round of each contestant, who take turns; the order is turned round every time."""
    small, problem = make_problem(512, 64, dtype), make_problem(vocab, tokens, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {name: CONTESTANTS[name](small).item() for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            problem.hidden.grad = problem.weight.grad = None
            started = time.perf_counter()
            losses[name] = CONTESTANTS[name](problem).item()
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": seconds, "losses": losses}


def memory(name: str, vocab: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Growth of the peak in a pass, gradients of states and weights included."""
    CONTESTANTS[name](make_problem(512, 64, dtype))  # imports, thread pools
    problem = make_problem(vocab, tokens, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the problem
    before, started = _status("VmHWM"), time.perf_counter()
    CONTESTANTS[name](problem)
    return {"bytes": _status("VmHWM") - before, "seconds": time.perf_counter() - started}


def errors(names: list[str], vocab: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of the gradients of hidden states and weights."""
    low, found = make_problem(vocab, tokens, dtype), {}
    exact = low.to(torch.float64)
    _naive_in_double(exact)
    for name in names:
        mine = low.to(dtype)
        CONTESTANTS[name](mine)
        found[name] = [
            _relative(exact.hidden.grad, mine.hidden.grad),
            _relative(exact.weight.grad, mine.weight.grad),
        ]
    return {"errors": found}


def _naive_in_double(problem: Problem) -> None:
    student = problem.hidden @ problem.weight.T
    log_q = student.log_softmax(-1)
    log_p = (problem.teacher_hidden @ problem.teacher_weight.T).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    nats = -log_q.gather(1, problem.labels[:, None])[:, 0]
    (nats + 0.2 * divergence).mean().backward()  # type: ignore[no-untyped-call]


def _relative(exact: Any, actual: Any) -> float:
    return float((exact - actual).norm() / exact.norm())


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


TASKS = {"time": times, "memory": memory, "error": errors}

if __name__ == "__main__":
    main()
