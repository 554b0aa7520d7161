"""One measurement of a TRL trainer: `python peers.py trl-gkd '{...}'`, which prints a line of JSON.

Set up as TRL's documentation of each trainer says, with the settings of `Job`: bfloat16 autocast over float32
parameters, no gradient checkpointing, the trainers' own optimizer (AdamW, fused), no saving, no trackers. The
end-of-turn token is suppressed, so that every response has `max_new_tokens` tokens.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from on_policy_bench.job import Job, read_job, result  # noqa: E402


def main() -> None:
    """Run what the arguments say."""
    name, job = sys.argv[1], read_job(sys.argv[2])
    trainer, counter = TRAINERS[name](job)
    clock = _clock()
    trainer.add_callback(clock)
    trainer.train()
    packages = {package: version(package) for package in ("trl", "transformers", "torch", "accelerate")}
    print("RESULT " + json.dumps(result(job, clock.step_s, counter.tokens, packages)), flush=True)


class _Counter:
    """Tokens that were generated."""

    tokens = 0


def _clock() -> Any:
    """Seconds from the end of a step to the end of the next one, so that fetching and collating count."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step_s: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.step_s.append(now - self.last)
            self.last = now

    return Clock()


def _gkd(job: Job) -> tuple[Any, _Counter]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(
        **_common(job),
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        max_new_tokens=job.max_new_tokens,
        max_length=2048,
    )
    trainer = GKDTrainer(
        model=_model(job.student, "float32"),
        teacher_model=_model(job.teacher, job.teacher_dtype),
        args=config,
        train_dataset=_dataset(job, "messages"),
        processing_class=_tokenizer(job),
    )
    trainer.generation_config.min_new_tokens = job.max_new_tokens
    trainer.generation_kwargs["min_new_tokens"] = job.max_new_tokens
    counter, generate = _Counter(), trainer.generate_on_policy_outputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        counter.tokens += int((outputs[2] != -100).sum())
        return outputs

    trainer.generate_on_policy_outputs = counted
    return trainer, counter


def _minillm(job: Job) -> tuple[Any, _Counter]:
    from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer

    config = MiniLLMConfig(
        **_common(job),
        max_completion_length=job.max_new_tokens,
        num_generations=1,
        temperature=1.0,
        shuffle_dataset=False,
        rkl_advantage=True,
        single_step_decomposition=True,
        length_normalization=True,
        gamma=1.0,
        generation_kwargs={"min_new_tokens": job.max_new_tokens},
    )
    trainer = MiniLLMTrainer(
        model=_model(job.student, "float32"),
        teacher_model=_model(job.teacher, job.teacher_dtype),
        args=config,
        train_dataset=_dataset(job, "prompt"),
        processing_class=_tokenizer(job),
    )
    return trainer, _count_turns(trainer)


def _distillation(job: Job) -> tuple[Any, _Counter]:
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        **_common(job),
        max_completion_length=job.max_new_tokens,
        temperature=1.0,
        beta=0.5,
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": job.max_new_tokens},
    )
    trainer = DistillationTrainer(
        model=_model(job.student, "float32"),
        teacher_model=_model(job.teacher, job.teacher_dtype),
        args=config,
        train_dataset=_dataset(job, "prompt"),
        processing_class=_tokenizer(job),
    )
    return trainer, _count_turns(trainer)


def _count_turns(trainer: Any) -> _Counter:
    counter, generate = _Counter(), trainer._generate_single_turn

    def counted(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        responses = outputs[0] if isinstance(outputs, tuple) else outputs
        counter.tokens += sum(map(len, responses))
        return outputs

    trainer._generate_single_turn = counted
    return counter


def _common(job: Job) -> dict[str, Any]:
    return {
        "output_dir": job.folder,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": True,
        "use_cpu": True,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }


def _model(name: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True)


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.teacher)


def _dataset(job: Job, column: str) -> Any:
    """The prompts in order: conversations with an answer that nobody reads, or without it."""
    from datasets import Dataset

    conversations = json.loads(Path(job.prompts).read_text(encoding="utf-8"))
    answer = [{"role": "assistant", "content": "-"}] if column == "messages" else []
    return Dataset.from_list([{column: [*messages, *answer]} for messages in conversations])


TRAINERS = {"trl-gkd": _gkd, "trl-minillm": _minillm, "trl-distillation": _distillation}

if __name__ == "__main__":
    main()
