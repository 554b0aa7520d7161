"""ddkmix's on-policy step against TRL's trainers, in one run. Results: BENCHMARKS.md.

    gkd       student samples, JSD(0.5): TRL's GKDTrainer, and its DistillationTrainer, which took its place
    minillm   policy gradient of the reverse KL: the last TRL that has a MiniLLMTrainer

Seconds of an optimizer step (generation, both forward passes, backward pass, AdamW), tokens of responses
per second, and peak resident memory, on the same student, teacher and prompts in the same order, responses
of one length. Goal: at least 1.2 x the tokens per second of the GKD and MiniLLM trainers, at no more memory.
TRL is installed into folders of its own (`on_policy_bench/environment.py`); systems take turns, a process
each.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from bench_loader import _names, machine, say  # noqa: E402
from on_policy_bench import environment, material, race, report  # noqa: E402
from on_policy_bench.job import Job  # noqa: E402

REPO = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print Markdown, write JSON."""
    options = _parser().parse_args(arguments)
    folder = options.cache / "runs"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier benchmark; ddkmix writes into no run's folder
    folder.mkdir(parents=True)
    job = job_of(options, folder)
    material.write_prompts(job, Path(job.prompts))
    versions = {name: environment.VERSION[name] for name in options.systems if name in environment.VERSION}
    found = race.run(
        job,
        options.systems,
        options.rounds,
        threads=options.threads,
        folders={n: environment.make(options.cache, version, say) for n, version in versions.items()},
        timeout_s=options.timeout_s,
        say=say,
    )
    results: dict[str, Any] = {
        "command": "python tools/bench_on_policy.py "
        + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": options.threads,
        "rounds": options.rounds,
        "job": asdict(nameless(job)),
        **found,
    }
    print(report.markdown(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def job_of(options: argparse.Namespace, folder: Path) -> Job:
    """The settings that all processes share."""
    student = options.student or material.make_student(options.cache, options.teacher, say)
    return Job(
        objective="gkd",
        teacher=str(options.teacher.resolve()),
        student=str(student.resolve()),
        teacher_dtype=options.teacher_dtype,
        prompts=str((folder / "prompts.json").resolve()),
        steps=options.warmup_steps + options.steps,
        warmup_steps=options.warmup_steps,
        batch_rows=options.batch_rows,
        max_new_tokens=options.max_new_tokens,
        teacher_share=options.teacher_share,
        lr=options.lr,
        folder=str(folder.resolve()),
        card_folder=str(options.domains.resolve()),
        cache=str(options.cache.resolve()),
        seq_len=options.seq_len,
    )


def nameless(job: Job) -> Job:
    """Without the machine's folders."""
    return replace(
        job,
        teacher=Path(job.teacher).name,
        student=Path(job.student).name,
        prompts=Path(job.prompts).name,
        folder="",
        card_folder=Path(job.card_folder).name,
        cache="",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(race.SYSTEMS)
    add = parser.add_argument
    add("--systems", type=_names(names), default=names, help=",".join(names))
    add("--rounds", type=int, default=3, help="turns of each system")
    add("--steps", type=int, default=6, help="optimizer steps that count, of a turn")
    add("--warmup-steps", type=int, default=2, help="optimizer steps before them")
    add("--batch-rows", type=int, default=8, help="prompts of a step")
    add("--max-new-tokens", type=int, default=64, help="tokens of a response, of every one")
    add("--seq-len", type=int, default=512, help="of ddkmix's packed rows, which prompts must fit into")
    add(
        "--teacher-share",
        type=float,
        default=0.0,
        help="of ddkmix's MiniLLM; TRL draws from the student alone",
    )
    add("--lr", type=float, default=1e-5)
    add("--threads", type=int, default=2, help="of each process")
    add("--teacher", type=Path, default=REPO / "models" / "smollm2-135m-instruct")
    add("--teacher-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--student", type=Path, help="a folder; default: six layers of the teacher, pruned into the cache")
    add("--domains", type=Path, default=REPO / "domains" / "prompts", help="cards of chat messages")
    add("--timeout-s", type=float, default=1800, help="of a process")
    add("--cache", type=Path, default=Path(".cache/bench-on-policy"), help="for TRL, student and runs")
    add("--json", type=Path, help="also write all numbers here")
    return parser


if __name__ == "__main__":
    main()
