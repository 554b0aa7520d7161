"""One measurement of ddkmix's on-policy step: `python ours.py ddkmix-gkd '{...}'` prints a line of JSON.

An ordinary run from an ordinary config. Responses end only at `max_new_tokens`, because the token that
would end them (`STOP`) is never said.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from on_policy_bench.job import Job, read_job, result  # noqa: E402

STOP = "<jupyter_script>"
"""A token of SmolLM2 that nothing in the prompts or their answers holds."""


def main() -> None:
    """Run what the arguments say."""
    from ddkmix.config import RunConfig
    from ddkmix.setup import train

    job = read_job(sys.argv[2])
    generated = count_generated()
    config = RunConfig.model_validate(training_tree(job))
    train(config)
    lines = (config.run_dir / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry["step_s"] for entry in map(json.loads, lines) if "step_s" in entry]
    packages = {package: version(package) for package in ("transformers", "torch", "accelerate")}
    print("RESULT " + json.dumps(result(job, steps, sum(generated), packages)), flush=True)


def count_generated() -> list[int]:
    """Tokens of every response that a decoder makes from now on; the list grows."""
    from ddkmix.generation.decode import Decoder

    generated: list[int] = []
    responses = Decoder.responses

    def counted(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        found = responses(self, *args, **kwargs)
        generated.extend(map(len, found))
        return found

    Decoder.responses = counted  # type: ignore[method-assign]
    return generated


def data_tree(job: Job) -> dict[str, Any]:
    """The part of the config that the order of the rows depends on; the mixture never moves."""
    return {
        "run_dir": job.folder,
        "cache_dir": str(Path(job.cache) / "ddkmix"),
        "domains": [job.card_folder],
        "teacher": {"model": job.teacher, "dtype": job.teacher_dtype},
        "student": {"init": "load", "model": job.student},
        "pack": {"seq_len": job.seq_len},
        "policy": {"name": "static"},
        "mixture": {"interval_steps": job.steps},
        "trainer": {
            "steps": job.steps,
            "batch_rows": job.batch_rows,
            "mixed_precision": "bf16",
            "checkpoint_steps": job.steps,
            "log_steps": 1,
        },
        "evaluation": {"rows": 2, "batch_rows": 2},
    }


def training_tree(job: Job) -> dict[str, Any]:
    """The whole config."""
    objective: dict[str, Any] = {"name": "minillm", "teacher_share": job.teacher_share}
    loss: list[dict[str, Any]] = []  # TRL's MiniLLM learns from nothing but responses
    if job.objective == "gkd":
        objective = {"name": "gkd", "share": 1.0}
        loss = [{"name": "jsd", "weight": 1.0, "beta": 0.5}]
    return {
        **data_tree(job),
        "objective": objective,
        "loss": loss,
        "generate": {
            "max_new_tokens": job.max_new_tokens,
            "stop": [STOP],
        },
        "rollouts": {"temperature": 1.0, "block_rows": job.batch_rows},
        "optimizer": {"lr": job.lr, "beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1.0},
        "schedule": {"name": "constant"},
    }


if __name__ == "__main__":
    main()
