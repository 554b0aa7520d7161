"""What several commands share: a config from options, for those who have no file, and quiet libraries."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ddkmix.config import RunConfig, load_config, parse_overrides
from ddkmix.errors import ConfigError, RunError
from ddkmix.resolved_config import read_run_config


def gaps_config(
    config: Path | None,
    overrides: Sequence[str] | None,
    student: str | None,
    teacher: str | None,
    domains: str | None,
) -> RunConfig:
    """A config for `gaps`: the given one, or one made of the options, with the options on top.

    Without a config and a teacher, the gaps are to the cards' reference losses, and the student's tokenizer
    packs the rows.

    Raises:
        ConfigError: neither is enough, or a value is wrong.
    """
    extra = []
    if student is not None:
        extra += [
            "student.init=load",
            "student.layers=null",
            "student.revision=null",
            f"student.model={json.dumps(student)}",
        ]
    if teacher is not None:
        extra.append(f"teacher.model={json.dumps(teacher)}")
    if domains is not None:
        extra.append(f"domains={json.dumps([domains])}")
    if config is not None:
        return load_config(config, [*(overrides or []), *extra])
    missing = [name for name, value in (("--student", student), ("--domains", domains)) if value is None]
    if missing:
        raise ConfigError(f"gaps needs a CONFIG, or {' and '.join(missing)} as well.")
    if teacher is None and not any(override.startswith("teacher.") for override in overrides or []):
        extra += [f"teacher.model={json.dumps(student)}", "evaluation.reference=cards"]
    base = {"run_dir": "unused", "trainer": {"steps": 1}, "teacher": {}, "student": {}}
    return parse_overrides(base, [*extra, *(overrides or [])], where="the options")


def run_or_config(
    path: Path, overrides: Sequence[str] | None, student: str | None
) -> tuple[RunConfig, str | None]:
    """The config of a file or of a run, and the student to look at.

    Args:
        path: a YAML file, or a run directory.
        overrides: on top of either.
        student: folder or Hub id; of a run its own student when None.

    Returns:
        The config, and the student's folder or Hub id; None for the one that the config describes.

    Raises:
        ConfigError: the file or a value is wrong.
        RunError: the folder is no run, or has no student yet.
    """
    if not path.is_dir():
        return load_config(path, overrides or []), student
    read_run_config(path)  # says what is wrong with the folder
    for override in overrides or []:
        if override.partition("=")[0].partition(".")[0] == "student":
            raise ConfigError(
                f"{override}: of a run it is its own student that is asked; name another one with --student."
            )
    config = load_config(path / "config.yaml", overrides or [], resume=True)
    folder = path / "student"
    if student is None and not folder.is_dir():
        raise RunError(f"{path} has no student yet; let the run end, or name one with --student.")
    return config, student or str(folder)


def quiet_libraries() -> None:
    """Model loading prints bars and hints that say nothing about the run."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from logging import getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # says at every checkpoint that tied weights are saved once, as they should be
    getLogger("accelerate.utils.other").setLevel("ERROR")
