"""The public names of ddkmix, read from their sources: which there are, what they take, what they say.

Public are the names in `__all__` of the modules that `public_modules` finds, and of those classes the
members without a leading underscore. Everything else is private. The documentation (tools/build_docs.py) and
the tests both go by this list, so a name cannot be public in one and missing in the other.

Sources, not objects: types stay as their author wrote them, and do not change with the Python version.

    python tools/public_names.py     # writes tests/public_api.txt, the names and signatures as they are now
"""

import ast
import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_origin

REPO = Path(__file__).resolve().parents[1]
SNAPSHOT = REPO / "tests" / "public_api.txt"
sys.path.insert(0, str(REPO))  # the package of this tree, wherever we are called

PUBLIC = (
    "ddkmix",
    "ddkmix.batch",
    "ddkmix.config",
    "ddkmix.errors",
    "ddkmix.own_rows",
    "ddkmix.planner",
    "ddkmix.reweighting",
    "ddkmix.row_tasks",
)
"""Modules of which `__all__` is public: the package, and the homes of types that its signatures name."""
PACKAGES = ("ddkmix.integrations", "ddkmix.losses", "ddkmix.policies")
"""Packages whose modules are public where they declare `__all__`."""
SPECIAL = ("__call__", "__enter__", "__getitem__", "__iter__", "__len__", "__next__")
"""Special methods that a user calls, by their syntax; public where they have a docstring."""
PYDANTIC = "model_config"
"""A setting of pydantic's in each of its classes, of no interest to users."""

HELPED = {"ddkmix.integrations.composer": "tests.integrations.composer_here"}
"""Composer wants image libraries that PyPI does not have for every PyTorch; our tests do without them."""

Kind = Literal["module", "value", "function", "class", "method", "property", "field", "same"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """One public name and where it is written down."""

    path: str
    """For example `ddkmix.DomainMixture.weights`."""
    kind: Kind
    doc: str
    """Docstring, without indentation; empty if there is none."""
    node: ast.AST | None = None
    """The definition; None for modules."""
    module: ModuleType
    """Where the definition stands."""
    owner: type | None = None
    """The class that a member was reached through."""


def public_modules(root: Path = REPO) -> list[str]:
    """Dotted names of the public modules below a folder, found without importing any."""
    found = [name for name in PUBLIC if _file(root, name)]
    for package in PACKAGES:
        folder = root.joinpath(*package.split("."))
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts) and _declares_all(path):
                found.append(".".join(parts))
    return sorted(found)


def load_modules(names: Sequence[str]) -> tuple[list[ModuleType], dict[str, str]]:
    """The modules, and those left out because another package is not installed: name -> package."""
    modules, missing = [], {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what frameworks warn of when imported is theirs
                if name in HELPED:
                    importlib.import_module(HELPED[name]).import_composer()
                modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "ddkmix"):
                raise
            missing[name] = package
    return modules, missing


def public_names(modules: Sequence[ModuleType]) -> list[Name]:
    """Every public name of some modules; one that was met before is "same" there, without its members."""
    found, met = [], dict[int, str]()
    for module in modules:
        doc = inspect.getdoc(module) or ""
        found.append(Name(path=module.__name__, kind="module", doc=doc, module=module))
        for name in sorted(module.__all__):
            first, *members = _top(module, name)
            value = getattr(module, name)
            if id(value) in met:
                found.append(replace(first, kind="same", doc=met[id(value)]))
            else:
                met[id(value)] = first.path
                found += [first, *members]
    return found


def signatures(names: Sequence[Name]) -> list[str]:
    """One line for each name: parameters, types and defaults as they are written."""
    return [f"{name.path}{_signature(name)}" for name in names]


def _file(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def _declares_all(path: Path) -> bool:
    return _definition(ast.parse(path.read_text()).body, "__all__") is not None


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def _body(module: ModuleType) -> list[ast.stmt]:
    assert module.__file__ is not None
    return _tree(module.__file__).body


def _top(module: ModuleType, name: str) -> list[Name]:
    """A name of `__all__`, and the members if it is a class; imports are followed to the definition."""
    value, path = getattr(module, name), f"{module.__name__}.{name}"
    value = inspect.unwrap(value) if callable(value) and not inspect.isclass(value) else value
    if inspect.isclass(value) or inspect.isfunction(value):
        home = sys.modules[value.__module__]
        node = _definition(_body(home), value.__name__)
        assert isinstance(node, ast.ClassDef | ast.FunctionDef), path
        kind: Kind = "class" if isinstance(node, ast.ClassDef) else "function"
        owner = value if inspect.isclass(value) else None
        doc = ast.get_docstring(node) or ""
        found = Name(path=path, kind=kind, doc=doc, node=node, module=home, owner=owner)
        return [found, *(_members(path, owner) if owner else [])]
    home = sys.modules[_home_of_value(module, name)]
    defined = _definition(_body(home), name)
    return [Name(path=path, kind="value", doc=_text_below(_body(home), defined), node=defined, module=home)]


def _home_of_value(module: ModuleType, name: str) -> str:
    """The module in which a value without `__module__` (a table, an alias) is assigned."""
    lazy: dict[str, str] = getattr(module, "_HOME", {})
    if name in lazy:
        return lazy[name]
    for node in _body(module):
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            assert node.module is not None
            return node.module
    return module.__name__


def _members(path: str, cls: type) -> Iterator[Name]:
    """Public members of a class and of our classes that it inherits from."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("ddkmix"):
            continue
        module = sys.modules[base.__module__]
        definition = _definition(_body(module), base.__name__)
        assert isinstance(definition, ast.ClassDef), base
        for node in [*definition.body, *_attributes(definition)]:
            name = _assigned(node)
            if name is None or name in seen or (name.startswith("_") and name not in SPECIAL):
                continue
            seen.add(name)
            if name == PYDANTIC:
                continue
            kind, doc = _kind(node), ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            doc = doc or _text_below(definition.body, node) or _text_below(_init(definition), node)
            member = Name(path=f"{path}.{name}", kind=kind, doc=doc, node=node, module=module, owner=cls)
            if not (name in SPECIAL and not doc):
                yield member


def _init(cls: ast.ClassDef) -> list[ast.stmt]:
    node = _definition(cls.body, "__init__")
    return node.body if isinstance(node, ast.FunctionDef) else []


def _attributes(cls: ast.ClassDef) -> Iterator[ast.stmt]:
    """Assignments to `self.name` in the constructor."""
    for node in _init(cls):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            yield node
        for part in target.elts if isinstance(target, ast.Tuple) else ():
            if isinstance(part, ast.Attribute):  # self.a, self.b = a, b: no place for a docstring
                yield ast.Assign(targets=[part], value=ast.Constant(None))


def _assigned(node: ast.stmt) -> str | None:
    """The name that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target: Any = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", None) or getattr(target, "attr", None)


def _definition(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    return next((node for node in body if _assigned(node) == name), None)


def _text_below(body: Sequence[ast.stmt], node: ast.stmt | None) -> str:
    """The string literal that follows an assignment."""
    for here, below in pairwise(body):
        if here is node and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            return inspect.cleandoc(str(below.value.value))
    return ""


def _kind(node: ast.stmt) -> Kind:
    if not isinstance(node, ast.FunctionDef):
        return "field"
    decorators = {ast.unparse(d) for d in node.decorator_list}
    return "property" if decorators & {"property", "cached_property"} else "method"


def _signature(name: Name) -> str:
    node = name.node
    if name.kind == "same":
        return f" is {name.doc}"
    if isinstance(node, ast.FunctionDef):
        if name.kind == "property":
            return f": {_type(node.returns, name)}"
        marks = "".join(f" @{ast.unparse(d)}" for d in node.decorator_list)
        return f"{_parameters(node, name)} -> {_type(node.returns, name)}{marks}"
    if isinstance(node, ast.ClassDef):
        init = _definition(node.body, "__init__")
        bases = ", ".join(map(ast.unparse, node.bases))
        shown = _parameters(init, name) if isinstance(init, ast.FunctionDef) else ""
        marks = "".join(f" @{ast.unparse(d)}" for d in node.decorator_list)
        return f": class({bases}){shown}{marks}"
    if isinstance(node, ast.AnnAssign):
        default = "" if node.value is None else f" = {ast.unparse(node.value)}"
        return f": {_type(node.annotation, name)}{default}"
    if isinstance(node, ast.Assign):
        return f" = {ast.unparse(node.value)}" if name.kind == "value" else ""
    return ""


def _parameters(node: ast.FunctionDef, name: Name) -> str:
    spelt = _Spelt(name.module).visit(ast.parse(ast.unparse(node)).body[0])
    return f"({ast.unparse(spelt.args)})"


def _type(node: ast.expr | None, name: Name) -> str:
    if node is None:
        return "?"
    return ast.unparse(_Spelt(name.module).visit(ast.parse(ast.unparse(node), mode="eval")))


class _Spelt(ast.NodeTransformer):
    """Aliases of choices and bounds are spelt out: another choice is another signature."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """`OnCap` -> `Literal['renormalize', 'stop', 'error']`."""
        if get_origin(getattr(self._module, node.id, None)) not in (Literal, Annotated):
            return node
        home = sys.modules[_home_of_value(self._module, node.id)]
        definition = _definition(_body(home), node.id)
        return definition.value if isinstance(definition, ast.Assign) else node


def main() -> int:
    """Write the snapshot; exit code 1 if a framework is missing, because its adapter would be lost."""
    modules, missing = load_modules(public_modules())
    if missing:
        print(f"not written: {missing} cannot be imported; install them first", file=sys.stderr)
        return 1
    SNAPSHOT.write_text("\n".join(signatures(public_names(modules))) + "\n")
    print(f"wrote {SNAPSHOT.relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
