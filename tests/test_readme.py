"""The README is true: its code runs, its commands exist, the files it names are there."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddkmix.card import Card
from ddkmix.cli import main
from ddkmix.config import Named, parse_config
from ddkmix.policies import build_policy, next_state
from ddkmix.preflight import dummy_losses
from tests.conftest import REPO, TEACHER, ConfigTree

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LAB.md", "BENCHMARKS.md")
README = (REPO / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_policy_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved as my_module.py and named as the README says, it is built and gives weights."""
    (code,) = [block for block in blocks("python") if "class SoftmaxOfGap" in block]
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = re.search(r"`policy: \{name: (\S+), temperature: 0\.5\}`", README)
    assert spec is not None
    policy = build_policy(Named.model_validate({"name": spec[1], "temperature": 0.5}))
    losses, natural = dummy_losses(("a", "b")), np.array([0.25, 0.75])
    state = next_state(policy, None, losses, natural)
    assert [0.25, 0.75] == state["mixture_weights"]
    assert [0.5, 0.5] == next_state(policy, state, losses, natural)["mixture_weights"]


def test_every_block_of_yaml_is_a_card_or_a_part_of_a_config(tiny_config: Callable[..., ConfigTree]) -> None:
    """As it stands: cards are cards, sections are read with the rest of a config."""
    cards, sections = 0, set()
    for tree in map(yaml.safe_load, blocks("yaml")):
        if "reference_loss" in tree:
            tree = {"name": "code", "rows": "rows", "license": "MIT", **tree}
        if "license" in tree:
            cards += Card.model_validate(tree).name == "code"
        else:
            parse_config(tiny_config(**tree), where="README.md")
            sections |= set(tree)
    assert 3 == cards
    assert {"policy", "guards", "loss", "schedule", "objective", "generate", "rollouts"} == sections


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_distillation_trainer_of_the_readme_trains(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands but for the model, which is a tiny one here."""
    (code,) = [block for block in blocks("python") if "DistillationTrainer" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    namespace: dict[str, Any] = {}
    exec(code.replace("models/smollm2-135m-instruct", str(tiny_teacher)), namespace)
    (summary,) = namespace["trainer"].state.log_history
    assert 2 == namespace["trainer"].state.global_step
    assert summary["train_loss"] > 0


def test_the_loop_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """The example without our trainer: in the repository, with the real teacher and the real domains; the
    weight change it makes is whole at the next step, and it ends by itself."""
    if not TEACHER.exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    (code,) = [block for block in blocks("python") if "DomainMixture.from_cards" in block]
    assert len(code.strip().splitlines()) <= 30
    code = code.replace("if step == 2:", "print(step, mixture.weights['code'])\n    if step == 2:")
    script = tmp_path / "loop.py"
    script.write_text(code)
    result = subprocess.run(
        [sys.executable, str(script)], cwd=REPO, check=True, capture_output=True, text=True, timeout=300
    )
    shares = [float(line.split()[1]) for line in result.stdout.splitlines()]
    assert 6 == len(shares)
    assert shares[0] == shares[2] < 0.2 < 0.5 < shares[3] == shares[5]


def test_every_command_of_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """`make` targets are in the Makefile and `ddkmix` commands answer to --help."""
    makefile = (REPO / "Makefile").read_text()
    contributing = (REPO / "CONTRIBUTING.md").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README + contributing)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for command in set(re.findall(r"`ddkmix ([a-z]+(?:-[a-z]+)*)", README + contributing)):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
            raise SystemExit(0)
        assert end.value.code in (0, None), command
    assert "Usage" in capsys.readouterr().out


def test_every_file_that_the_documents_name_exists() -> None:
    """Links and paths in backquotes, in all documents at the top level."""
    for document in DOCUMENTS:
        text = (REPO / document).read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        paths = re.findall(r"`((?:ddkmix|configs|tools|tests|domains)/[\w./-]*)`", text)
        for path in {*links, *paths}:
            assert (REPO / path).exists(), f"{document} names {path}"


def test_the_map_of_the_code_names_every_module() -> None:
    """A new file must appear in the README's map, and a deleted one must leave it."""
    (tree,) = re.findall(r"    ddkmix/\n(.*?)    domains/", README, flags=re.DOTALL)
    named = set(re.findall(r"\b([a-z_]+(?:\.py|/))", tree))
    package = REPO / "ddkmix"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert files | folders == named
