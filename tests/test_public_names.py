"""Every public name says what it is, what it takes, in which shape and unit, and what it raises.

The rules stand in docstring_rules.py. Each is applied to all names, and to a broken module that it must find.
"""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import docstring_rules as rules
from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))

import public_names as tool


@cache
def every() -> list[tool.Name]:
    """Every public name; importing all frameworks takes seconds, so not before a test asks."""
    return tool.public_names(tool.load_modules(tool.public_modules())[0])


Rule = Callable[[tool.Name], list[str]]
RULES: list[Rule] = [
    rules.without_text,
    rules.undocumented_parameters,
    rules.untyped,
    rules.shapeless,
    rules.unmentioned_errors,
    rules.unknown_errors,
    rules.without_unit,
    rules.private_names,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_public_name_keeps_the_rules(rule: Rule) -> None:
    """Modules, functions, classes, methods, properties, fields and tables."""
    assert [] == [lack for name in every() if name.kind != "same" for lack in rule(name)]


BROKEN = '''"""A module."""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ddkmix.errors import ConfigError, DataError

__all__ = ["LIMIT", "Mixer", "Settings", "measure"]

LIMIT = 3


def measure(loss: Tensor, count, *, every: int) -> Callable[[Tensor], None]:
    """Measure.

    Args:
        loss: of all.
        every: how often.
        gone: was removed.

    Raises:
        DataEror: misspelt.
    """
    raise ConfigError("x")


class Mixer:
    """Mixes `planner.plan_step`, `ddkmix.reading.ReadAhead` and `self.size` by `planner.quantise`.

    See `loader.workers` and `ddkmix.errors.DataError`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        if size < 0:
            raise DataError("x")

    @property
    def speed(self) -> float:
        """How fast."""
        return 1.0

    def stop(self) -> None:
        raise NotImplementedError

    def _hidden(self, x):
        pass


@dataclass
class Settings:
    """Settings."""

    lr: float
'''
FOUND = {
    "without_text": ["LIMIT", "Mixer.stop", "Mixer.size", "Settings.lr"],
    "undocumented_parameters": ["Mixer: size", "measure: count", "measure: gone"],
    "untyped": ["Mixer.size", "measure: count"],
    "shapeless": ["measure: loss", "measure: return"],
    "unmentioned_errors": ["Mixer: DataError", "measure: ConfigError"],
    "unknown_errors": ["measure: DataEror"],
    "private_names": ["Mixer: planner.plan_step", "Mixer: reading.ReadAhead"],
    "without_unit": ["Mixer.speed: float", "Settings.lr: float", "measure: every"],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_docstring_would_be_noticed(
    rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule finds exactly its own mistakes; private names are nobody's business."""
    path = tmp_path / "ddkmix_broken.py"
    path.write_text(BROKEN)
    spec = importlib.util.spec_from_file_location("ddkmix_broken", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ddkmix_broken", module)
    spec.loader.exec_module(module)
    found = [lack for name in tool.public_names([module]) for lack in rule(name)]
    assert [f"ddkmix_broken.{lack}" for lack in FOUND[rule.__name__]] == found


# --- which names are public -------------------------------------------------------------------------


def test_the_public_names_are_those_of_the_last_release() -> None:
    """No name, type or default changes unnoticed: the change stands in the diff of tests/public_api.txt."""
    frozen = tool.SNAPSHOT.read_text().splitlines()
    now = tool.signatures(every())
    gone = [f"- {line}" for line in frozen if line not in now]
    new = [f"+ {line}" for line in now if line not in frozen]
    message = "\n".join([*gone, *new, "if this is meant: python tools/public_names.py, and CHANGELOG.md"])
    assert frozen == now, message


OPAQUE = {
    "ddkmix.card.ReferenceLoss": "a card's reference_loss, handed on by GapEvaluator.from_cards",
    "ddkmix.index.DomainRows": "made by DomainMixture.from_cards and handed on",
    "ddkmix.integrations.lightning_hooks.TrainLoader": "a StepLoader, which documents it",
    "ddkmix.sources.MixtureOptions": "the arguments of DomainMixture, which documents them",
    "ddkmix.own_rows.OwnRows": "made by DomainMixture.from_datasets and handed on",
    "ddkmix.planned_mixture.PlannedMixture": "DomainMixture or MixtureBatchSampler, which document it",
    "ddkmix.stream.Stream": "rows and order of a mixture, for the parts of ddkmix",
}
"""Private types in public signatures, and why a user need not look into them."""


def test_types_in_public_signatures_are_public() -> None:
    """Whoever is given an object can look up what it is; the table above has the exceptions, no others."""
    modules = tool.load_modules(tool.public_modules())[0]
    public = {id(getattr(module, name)) for module in modules for name in module.__all__}
    private = set()
    for name in every():
        for _, type_ in rules.annotations(name):
            for part in ast.walk(rules.parsed(type_)):
                found = getattr(name.module, getattr(part, "id", ""), None)
                if inspect.isclass(found) and found.__module__.startswith("ddkmix"):
                    private |= {f"{found.__module__}.{found.__name__}"} if id(found) not in public else set()
    assert set(OPAQUE) == private


def test_every_adapter_is_there() -> None:
    """The adapters' frameworks are installed here, so that none goes unchecked."""
    assert {} == tool.load_modules(tool.public_modules())[1]


def silent_adapters(folder: Path) -> set[str]:
    """Modules without `__all__` that no other module of the folder imports: nobody would know of them."""
    sources = {path.stem: path.read_text() for path in folder.glob("[!_]*.py")}
    parts = {stem for stem in sources for text in sources.values() if re.search(rf"\.{stem} import", text)}
    return {
        stem for stem, text in sources.items() if not re.search(r"^__all__\b", text, re.MULTILINE)
    } - parts


def test_every_adapter_says_what_is_public() -> None:
    """An adapter without `__all__` would be left out of the documentation, silently; a part of one may be."""
    assert set() == silent_adapters(REPO / "ddkmix" / "integrations")


def test_a_silent_adapter_would_be_noticed(tmp_path: Path) -> None:
    """One of three files is neither documented nor a part of a documented one."""
    (tmp_path / "lightning.py").write_text("from ddkmix.integrations.hooks import Hooks\n__all__ = ['X']\n")
    (tmp_path / "hooks.py").write_text("class Hooks: ...\n")
    (tmp_path / "composer.py").write_text("class Mixture: ...\n")
    (tmp_path / "_private.py").write_text("")
    assert {"composer"} == silent_adapters(tmp_path)


def test_an_adapter_without_its_framework_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the package that is missing; a module of ours that is missing is our mistake."""
    (tmp_path / "ddkmix_theirs.py").write_text("import no_such_framework.trainer\n")
    (tmp_path / "ddkmix_ours.py").write_text("import ddkmix.no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, missing = tool.load_modules(["ddkmix.errors", "ddkmix_theirs"])
    assert ["ddkmix.errors"] == [module.__name__ for module in modules]
    assert {"ddkmix_theirs": "no_such_framework"} == missing
    with pytest.raises(ModuleNotFoundError, match=r"ddkmix\.no_such_module"):
        tool.load_modules(["ddkmix_ours"])


def test_public_modules_are_found_by_their_all(tmp_path: Path) -> None:
    """Those that the list names, and those of the public packages that declare `__all__`; nothing private."""
    for name, text in {
        "ddkmix/__init__.py": "",
        "ddkmix/trainer.py": "__all__ = []",
        "ddkmix/errors.py": "",
        "ddkmix/integrations/__init__.py": "",
        "ddkmix/integrations/lightning.py": "__all__ = ['X']",
        "ddkmix/integrations/_shared.py": "__all__ = ['X']",
        "ddkmix/losses/__init__.py": "__all__: list[str] = []",
        "ddkmix/losses/chunked.py": "def f(): ...",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    wanted = ["ddkmix", "ddkmix.errors", "ddkmix.integrations.lightning", "ddkmix.losses"]
    assert wanted == tool.public_modules(tmp_path)


def test_a_choice_behind_an_alias_is_part_of_the_signature() -> None:
    """`OnCap` is spelt out, and so are bounds: they may not change unnoticed either."""
    lines = tool.signatures(every())
    (mixture,) = [line for line in lines if line.startswith("ddkmix.DomainMixture: class")]
    assert "on_cap: Literal['renormalize', 'stop', 'error']='renormalize'" in mixture
    assert "ddkmix.config.Evaluation.rows: Annotated[int, Field(ge=1)] = 500" in lines
    assert "ddkmix.config.load_config is ddkmix.load_config" in lines


# --- what a user's type checker sees ----------------------------------------------------------------


def test_the_wheel_is_typed_and_whole(tmp_path: Path) -> None:
    """A wheel holds every module, py.typed and the page of our policy, and nothing of the tests; an installed
    ddkmix is typed for mypy, which otherwise takes every name of it for Any."""
    wheel = build_wheel(tmp_path)
    installed = environment(tmp_path, wheel)
    files = {str(p.relative_to(installed)) for p in (installed / "ddkmix").rglob("*") if p.is_file()}
    ours = {str(p.relative_to(REPO)) for p in (REPO / "ddkmix").rglob("*.py")}
    assert files == ours | {"ddkmix/py.typed", "ddkmix/policies/marginal_gain.md"}
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nfrom ddkmix import load_config\n"
        "config = load_config(Path('x.yaml'), ['a=1'])\nload_config(3)\n"
    )
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), program.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 1 == done.returncode, done.stdout + done.stderr
    assert (
        'program.py:4: error: Argument 1 to "load_config" has incompatible type "int"; expected "Path"'
        in done.stdout
    )
    assert "Found 1 error" in done.stdout


def build_wheel(folder: Path) -> Path:
    """What `pip wheel` makes, from a copy of the sources, without the network."""
    copy = folder / "source"
    copy.mkdir()
    shutil.copytree(REPO / "ddkmix", copy / "ddkmix", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPO / name, copy / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(folder: Path, wheel: Path) -> Path:
    """An empty virtual environment with the wheel unpacked in it; gives its site-packages."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site
