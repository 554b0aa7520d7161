"""What both systems get: a student's folder, and the prompts in the order of ddkmix's planner."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from on_policy_bench import ours
from on_policy_bench.job import Job

LAYERS = (0, 1, 8, 15, 22, 29)
"""Of the teacher, as in configs/quickstart.yaml."""
Messages = list[dict[str, str]]


def make_student(cache: Path, teacher: Path, say: Callable[[str], None]) -> Path:
    """The folder of the pruned student in float32, written when the cache lacks it."""
    folder = cache / ("student-" + "-".join(map(str, LAYERS)))
    if not (folder / "model.safetensors").exists():
        from ddkmix.config import Student, Teacher
        from ddkmix.models import build_student, save_student
        from ddkmix.tokenizer import read_tokenizer

        say(f"pruning a student into {folder}")
        named = Teacher(model=str(teacher))
        student = build_student(Student(init="prune", layers=LAYERS), named, seed=0)
        save_student(student, read_tokenizer(str(teacher)), folder)
    return folder


def write_prompts(job: Job, path: Path) -> None:
    """The prompts of every step of a job, one after the other, as conversations without their answers.

    A prompt that ddkmix has packed is found again by its tokens, which the tokenizer's chat template gives
    both systems.
    """
    known = known_prompts(job)
    found = [known[prompt] for prompt in served_prompts(job)]
    path.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


def served_prompts(job: Job) -> list[tuple[int, ...]]:
    """Tokens of the prompts in the order of ddkmix's run, from the packed rows."""
    from ddkmix.config import RunConfig
    from ddkmix.preflight import check
    from ddkmix.prepare import open_mixture, open_rows

    prepared = check(RunConfig.model_validate(ours.data_tree(replace(job, folder=job.folder + "-plan"))))
    mixture = open_mixture(prepared.config, open_rows(prepared, shown=False))
    mixture.set_weights(dict.fromkeys(mixture.domains, 1.0))
    prompts = []
    for _ in range(job.steps):
        batch = next(mixture)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            first = int((labels != -100).nonzero()[0])
            prompts.append(tuple(ids[:first].tolist()))
    mixture.close()
    return prompts


def known_prompts(job: Job) -> dict[tuple[int, ...], Messages]:
    """Every conversation of the cards' train files by the tokens that its prompt has."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job.teacher)
    known = {}
    for path in sorted(Path(job.card_folder).glob("*/train-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"][:-1]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            known[tuple(tokenizer(text, add_special_tokens=False)["input_ids"])] = messages
    return known
