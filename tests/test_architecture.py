"""The shape of the package: who may import whom, what a command may load, how long a file may be.

`LAYERS` is the picture of DESIGN.md as a table. A module imports from lower layers only, and from its own
layer only what `SIBLINGS` allows. The feedback edge from losses to the mixture is a value, never an import.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ddkmix
from tests.conftest import REPO

PACKAGE = REPO / "ddkmix"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    # plain values
    "errors": 0,
    "types": 1,
    "fingerprint": 1,
    "overrides": 1,
    "validation": 1,
    "plugins": 1,
    "sections": 1,
    "records": 1,
    "stage_sections": 1,
    "teacher_sections": 1,
    "run_average": 1,
    "config": 2,
    "measures": 3,
    "schedule": 3,
    # documents -> rows
    "storage": 3,
    "card": 3,
    "documents": 3,
    "hub": 3,
    "row_layout": 3,
    "segments": 3,
    "document_shards": 4,
    "tokenizer": 4,
    "token_stream": 4,
    "index": 4,
    "alignment": 5,
    "domains": 5,
    "prompts": 5,
    "pack": 6,
    "teachers": 6,
    "references": 6,
    # rows -> batches
    "apportion": 4,
    "order": 5,
    "planner": 5,
    "rows": 6,
    "mixture_state": 6,
    "plan_queue": 6,
    "projection": 6,
    "provenance": 7,
    "trackers": 7,
    "stream": 7,
    "ranks": 7,
    "planned_mixture": 8,
    "prefetching": 8,
    "row_tasks": 8,
    "own_rows": 8,
    "item_tasks": 9,
    "sources": 10,
    "reading": 11,
    "step_loader": 11,
    "loader": 12,
    "batch_sampler": 12,
    # losses -> weights
    "policies": 13,
    "selection": 13,
    # batches -> losses: from here on with torch
    "batch": 14,
    "losses": 15,
    "models": 15,
    "boundaries": 16,
    "matching": 16,
    "common_tokenizer": 16,
    "metrics": 16,
    "teacher": 17,
    "predicted_tokens": 17,
    "stored_teacher": 18,
    "logits_store": 15,
    "distillation": 17,
    "truncation": 18,
    "preference": 18,
    "objectives": 19,
    "objective_checks": 20,
    "online_teacher": 18,
    "cross_vocabulary": 18,
    "online_step": 19,
    "held_out": 17,
    "nats_cache": 18,
    "evaluator": 19,
    "recording": 19,
    "generation": 19,
    "response_store": 16,
    "answers": 20,
    "step_rows": 21,
    # for loops that are not ours
    "own_held_out": 19,
    "same_text": 20,
    "predictions": 20,
    "gap_evaluator": 21,
    "reweighting": 20,
    "integrations": 21,
    # the loop and what stands around it
    "resolved_config": 20,
    "run_changes": 21,
    "checkpoint": 22,
    "tracking": 22,
    "signals": 22,
    "row_weights": 22,
    "preflight": 22,
    "replay": 23,
    "prepare": 23,
    "run": 23,
    "train_step": 24,
    "trainer": 25,
    "restoring": 24,
    "selected": 23,
    "teaching": 24,
    "selecting": 24,
    "responders": 24,
    "answering": 25,
    "setup": 26,
    "capture": 25,
    "generate": 27,
    "rouge": 27,
    "verifying": 27,
    "gaps": 27,
    "report": 28,
    "options": 28,
    "replay_command": 29,
    "report_commands": 29,
    "cli": 30,
    "__init__": 30,
    "__main__": 31,
}
SIBLINGS: set[tuple[str, str]] = {
    ("run_average", "records"),
    ("stage_sections", "sections"),
    ("predicted_tokens", "teacher"),
    ("distillation", "predicted_tokens"),
    ("teacher_sections", "sections"),
    ("selecting", "teaching"),
}
"""(importer, imported) of one layer."""

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 320, 60
STILL_LONGER: dict[str, int] = {}
"""Files and functions that wait to be split. They must not grow, and the list must not."""


def parts_of(path):
    """("policies", "ddk") for ddkmix/policies/ddk.py, ("policies",) for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports_of(source):
    """Dotted names of everything that a source imports, wherever in it: functions, TYPE_CHECKING, all."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def part_of(name):
    """The entry of LAYERS that a dotted name of ours belongs to; None for other packages."""
    package, _, rest = name.partition(".")
    return None if package != "ddkmix" else rest.partition(".")[0] or "__init__"


def violations(source, parts):
    """Imports of a source that go up, or sideways without leave, or that hide where they go."""
    own, wrong = parts[0], []
    for name in sorted(imports_of(source)):
        if name.startswith("."):
            wrong.append(f"{'.'.join(parts)} imports {name}; imports are absolute here")
        part = part_of(name)
        if part is None or part == own:
            continue
        if part not in LAYERS:  # a name out of ddkmix/__init__.py
            part = "__init__"
        allowed = LAYERS[part] < LAYERS[own] or (own, part) in SIBLINGS
        if not allowed:
            wrong.append(f"{'.'.join(parts)} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[part]})")
    return wrong


# --- layers -----------------------------------------------------------------------------------------


def test_every_module_has_a_layer():
    """A new module takes a line in the table above, and a module that is gone leaves it."""
    assert set(LAYERS) == {parts_of(path)[0] for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """Lower does not import higher; imports inside functions count."""
    assert [] == violations(path.read_text(), parts_of(path))


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("policies", "ddk"), "from ddkmix.evaluator import Evaluator"),
        (("loader",), "from ddkmix.policies import POLICIES"),
        (("planner",), "import ddkmix.loader"),
        (("planner",), "def f():\n    from ddkmix.trainer import run_loop"),
        (("losses", "chunked"), "from ddkmix import train"),
        (("losses", "chunked"), "from ..batch import Head"),
        (("types",), "if TYPE_CHECKING:\n    from ddkmix.config import RunConfig"),
        (("errors",), "from ddkmix import errors, types"),
        (("fingerprint",), "from ddkmix.types import LN_2"),
    ],
)
def test_an_import_that_goes_up_would_be_noticed(parts, source):
    """At the top, in a function, for type checkers only, relative, from the package itself, sideways."""
    assert violations(source, parts)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("trainer",), "from ddkmix.policies import next_state\nimport torch"),
        (("policies", "ddk"), "from ddkmix.policies.update import exponentiated_update"),
        (("losses", "chunked"), "from ddkmix.losses import LossTerm\nfrom ddkmix.batch import Head"),
        (("cli",), "def f():\n    from ddkmix.setup import train"),
    ],
)
def test_an_import_that_goes_down_is_allowed(parts, source):
    """Lower layers, the own package, and other people's packages."""
    assert [] == violations(source, parts)


def test_tools_and_tests_are_never_imported():
    """The package stands alone."""
    for path in FILES:
        tops = {name.partition(".")[0] for name in imports_of(path.read_text())}
        assert not tops & {"tools", "tests", "integrations"}


# --- torch and transformers -------------------------------------------------------------------------

WITHOUT_TORCH = [part for part, layer in LAYERS.items() if layer <= LAYERS["policies"]]


def module_level_imports(source):
    """Top names that importing a module loads: everything outside functions and TYPE_CHECKING blocks."""
    found, nodes = set(), list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.partition(".")[0] for name in imports_of(ast.unparse(node))}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize(
    "part", [*WITHOUT_TORCH, "cli", "preflight", "replay", "report", "selected", "tracking"]
)
def test_everything_up_to_the_policies_is_free_of_torch(part):
    """Importing these modules loads neither torch nor transformers nor accelerate."""
    for path in FILES:
        if parts_of(path)[0] == part:
            assert not module_level_imports(path.read_text()) & {"torch", "transformers", "accelerate"}


def test_policies_import_no_torch_anywhere():
    """Not even inside a function: a policy is arithmetic on a few numbers."""
    for path in (PACKAGE / "policies").glob("*.py"):
        names = imports_of(path.read_text())
        assert not {name.partition(".")[0] for name in names} & {"torch", "transformers", "accelerate"}
        ours = {part_of(name) for name in names} - {None}
        assert ours <= {"config", "errors", "plugins", "policies", "types", "validation"}


def heavy_modules(code, folder):
    """Which of torch, transformers and accelerate a fresh interpreter has loaded after running `code`."""
    heavy = ["torch", "transformers", "accelerate"]
    report = f"import json, sys; print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_main(*arguments):
    """Code that runs a command of ours in its process and goes on afterwards."""
    return (
        "from ddkmix.cli import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )


def test_importing_ddkmix_loads_nothing_heavy(tmp_path):
    """Neither does looking at its version and names."""
    assert [] == heavy_modules("import ddkmix; dir(ddkmix), ddkmix.__version__", tmp_path)


def test_policies_and_losses_are_listed_without_loading_anything_heavy(tmp_path):
    """The two tables, the config and the mixture are there without torch."""
    code = "from ddkmix import LOSSES, POLICIES, DomainLosses, DomainMixture, RunConfig, load_config"
    assert [] == heavy_modules(code, tmp_path)


def test_help_loads_nothing_heavy(tmp_path):
    """`ddkmix --help` answers at once."""
    assert [] == heavy_modules(run_main("--help"), tmp_path)


@pytest.mark.parametrize("command", ["lint", "plan", "pack"])
def test_lint_and_plan_load_nothing_heavy(command, tmp_path, tiny_config, write_config):
    """They answer from cards, packed rows and the model's small files; `plan` even packs on the way."""
    config = write_config(tiny_config(cache_dir=str(tmp_path / "cache")))
    assert [] == heavy_modules(run_main(command, str(config)), tmp_path)


def test_past_steps_and_projections_load_nothing_heavy(tmp_path, tiny_config, write_config):
    """`seen`, `show` and `plan RUN` answer from the run directory and the packed rows."""
    from ddkmix.config import load_config
    from ddkmix.setup import train

    tree = tiny_config(trainer={"steps": 2})
    train(load_config(write_config(tree)))
    page = ("show", tree["run_dir"], "--format", "html")
    for arguments in (("seen", tree["run_dir"], "--step", "1"), ("plan", tree["run_dir"]), page):
        assert [] == heavy_modules(run_main(*arguments), tmp_path)


def test_a_heavy_import_would_be_noticed(tmp_path):
    """The check can fail: the trainer needs torch."""
    assert "torch" in heavy_modules("import ddkmix.trainer", tmp_path)


# --- the public interface ---------------------------------------------------------------------------


def test_all_names_what_is_exported():
    """`__all__`, `dir` and what can be had are one list, and every name comes from its home."""
    assert sorted(ddkmix.__all__) == sorted(ddkmix._HOME)
    assert sorted([*ddkmix.__all__, "__version__"]) == dir(ddkmix)
    for name, home in ddkmix._HOME.items():
        assert getattr(ddkmix, name) is getattr(importlib.import_module(home), name)


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING are the table of homes."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert ddkmix._HOME == seen


def test_an_unknown_name_is_an_attribute_error():
    """As with any module, so that `hasattr` and typing work."""
    with pytest.raises(AttributeError, match="module 'ddkmix' has no attribute 'trian'"):
        _ = ddkmix.trian


# --- size and style ---------------------------------------------------------------------------------


def long_functions(source, file="x.py"):
    """(name, lines) of functions that are too long."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > STILL_LONGER.get(f"{file} {node.name}", MOST_LINES_OF_A_FUNCTION):
                found.append((node.name, lines))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long_to_be_read(path):
    """A file that grows beyond 320 lines has two subjects."""
    name = str(path.relative_to(PACKAGE))
    assert STILL_LONGER.get(name, MOST_LINES) >= path.read_text().count("\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_too_long_to_be_read(path):
    """A function fits on a screen, its docstring included."""
    assert [] == long_functions(path.read_text(), str(path.relative_to(PACKAGE)))


def test_a_long_function_would_be_noticed():
    """61 lines are too many, 60 are not."""
    body = "    x = 1\n" * 59
    assert [] == long_functions(f"def f():\n{body}")
    assert [("f", 61)] == long_functions(f"def f():\n{body}    x = 1\n")


def test_no_module_is_a_drawer_for_leftovers():
    """What has no name of its own has no place."""
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


FORBIDDEN = (
    r"\bpickle\b(?!\s*=\s*False)",
    r"trust_remote_code\s*=\s*True",
    r"\byaml\.(load|unsafe_load|full_load)\(",
    r"(?<![\w.])(eval|exec)\(",
    r"allow_pickle\s*=\s*True",
    r"weights_only\s*=\s*False",
    r"shell\s*=\s*True",
    r"\bos\.system\(",
)


def forbidden(source):
    """Code (not comments, not docstrings) that executes or unpickles what somebody else wrote."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    code = ast.unparse(tree)
    return [match.group() for pattern in FORBIDDEN for match in re.finditer(pattern, code)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_untrusted_is_executed_or_unpickled(path):
    """No pickle, no remote code, no YAML tags, no eval, no shell."""
    assert [] == forbidden(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "f(name, trust_remote_code=True)",
        "yaml.load(text, Loader=L)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_is_forbidden_would_be_noticed(source):
    """Each pattern finds its code."""
    assert forbidden(source)


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "np.load(path, allow_pickle=False)", "yaml.safe_load(text)", "'''no eval( here'''"],
)
def test_what_is_allowed_is_not_found(source):
    """Putting a model into evaluation mode is no eval; safe loading is safe; docstrings are text."""
    assert [] == forbidden(source)


def test_the_yaml_reader_builds_nothing_but_plain_values():
    """The one loader of our own is PyYAML's safe one with another rule for numbers."""
    from ddkmix.overrides import _Yaml, read_yaml

    assert issubclass(_Yaml, yaml.SafeLoader)
    assert yaml.SafeLoader.yaml_constructors == _Yaml.yaml_constructors
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml("!!python/object/apply:os.getcwd []")


def test_every_module_and_public_function_says_what_it_is():
    """Docstrings on all modules, public classes and public functions."""
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        missing += [f"{path.name}:{node.name}" for node in public if not ast.get_docstring(node)]
        missing += [] if ast.get_docstring(tree) else [path.name]
    assert [] == missing


def test_paths_of_the_repository_are_where_this_file_thinks():
    """The walk above has found the package: a moved test must not check nothing."""
    assert Path(ddkmix.__file__).parent == PACKAGE
    assert len(FILES) > 30
