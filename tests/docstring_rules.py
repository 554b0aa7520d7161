"""What a public docstring must say, as functions from a name to the list of what is missing.

They read sources (tools/public_names.py), so a rule can be shown to fail on a few lines of broken code.
"""

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Iterator

from ddkmix import errors
from ddkmix.config import RunConfig
from tests.conftest import REPO

sys.path.insert(0, str(REPO / "tools"))

from public_names import Name, public_modules

SHAPED = {"Float", "Int", "Bool", "UInt", "Num", "Shaped"}
ARRAYS = {"Tensor", "ndarray", "NDArray"}
NUMBERS = {"int", "float", "Float", "Int", "Num"}
UNITS = (
    r"nats|bits|bytes|gigabytes|tokens?|rows?|steps?|batch(es)?|seconds|passes|epochs?|process(es)?|layers?|"
    r"tries|checkpoints|logits|gradients|shares?|ratio|rate|factor|norm|weights?|seeds?|domains?|scores?|"
    r"exponentiated|temperatures?|draws"
)
"""Words for what a number counts or measures."""


def sections(doc: str) -> dict[str, str]:
    """Heading -> indented text below it."""
    found = re.findall(r"^([A-Z][a-z]+):\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    return dict(found)


def entries(section: str) -> dict[str, str]:
    """`name: text` entries; `a, b: text` stands for both."""
    items = re.split(r"^ {4}(?=\S)", section, flags=re.MULTILINE)
    pairs = [item.partition(":") for item in items if ":" in item]
    return {name.strip(" *"): text.strip() for names, _, text in pairs for name in names.split(",")}


def function_of(name: Name) -> ast.FunctionDef | None:
    """The function whose parameters the docstring describes: a class describes its constructor."""
    if isinstance(name.node, ast.FunctionDef):
        return name.node
    if isinstance(name.node, ast.ClassDef):
        found = (n for n in name.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        return next(found, None)
    return None


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """All parameters but self and cls."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [arg for arg in every if arg.arg not in ("self", "cls")]


def is_framework_hook(name: Name) -> bool:
    """Whether a method stands in for one of somebody else's class, which says what its parameters are."""
    method = name.path.rpartition(".")[2]
    mro = name.owner.__mro__ if name.owner and name.kind in ("method", "property") else ()
    foreign = [base for base in mro if not base.__module__.startswith("ddkmix")]
    return any(method in vars(base) for base in foreign if base is not object)


def is_refinement(name: Name) -> bool:
    """Whether a method is that of a base class of ours which says what its parameters are."""
    method = name.path.rpartition(".")[2]
    bases = name.owner.__mro__[1:] if name.owner and name.kind == "method" else ()
    return any("Args:" in (getattr(vars(base).get(method), "__doc__", None) or "") for base in bases)


def without_text(name: Name) -> list[str]:
    """A name without a docstring."""
    return [] if name.doc.strip() else [name.path]


def undocumented_parameters(name: Name) -> list[str]:
    """Parameters that `Args:` does not name, and entries of `Args:` that are no parameters."""
    function = function_of(name)
    if function is None or name.kind == "property" or is_framework_hook(name) or is_refinement(name):
        return []
    known = set(entries(sections(name.doc).get("Args", "")))
    wanted = {arg.arg for arg in parameters(function)}
    return [f"{name.path}: {parameter}" for parameter in sorted(known ^ wanted)]


def untyped(name: Name) -> list[str]:
    """Parameters and results without a type."""
    function = function_of(name)
    if function is None:
        return [name.path] if name.kind == "field" and isinstance(name.node, ast.Assign) else []
    missing = [arg.arg for arg in parameters(function) if arg.annotation is None]
    missing += ["return"] if function.returns is None else []
    return [f"{name.path}: {parameter}" for parameter in missing]


def annotations(name: Name) -> Iterator[tuple[str, ast.expr]]:
    """(parameter, type) of everything that a name takes and gives."""
    function = function_of(name)
    if function is not None:
        yield from ((arg.arg, arg.annotation) for arg in parameters(function) if arg.annotation)
        if function.returns is not None:
            yield "return", function.returns
    elif isinstance(name.node, ast.AnnAssign):
        yield "type", name.node.annotation


def shapeless(name: Name) -> list[str]:
    """Arrays and tensors outside of a jaxtyping annotation."""
    return [f"{name.path}: {where}" for where, type_ in annotations(name) if any(_bare_arrays(parsed(type_)))]


def parsed(type_: ast.expr) -> ast.expr:
    """Types may be written as strings."""
    text = type_.value if isinstance(type_, ast.Constant) else None
    return ast.parse(text, mode="eval").body if isinstance(text, str) else type_


def _bare_arrays(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Subscript) and _last(node.value) in SHAPED:
        return
    if _last(node) in ARRAYS:
        yield ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from _bare_arrays(child)


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def unmentioned_errors(name: Name) -> list[str]:
    """Our errors that a body raises itself and `Raises:` does not name, by themselves or by a base."""
    function = function_of(name)
    if function is None:
        return []
    named = {_error(entry) for entry in entries(sections(name.doc).get("Raises", ""))}
    raised = {_error(_last(call.func)) for call in _raised(function)} - {None}
    return [
        f"{name.path}: {kind.__name__}"
        for kind in raised
        if kind and not any(base in named for base in kind.__mro__)
    ]


def unknown_errors(name: Name) -> list[str]:
    """Entries of `Raises:` that are no errors."""
    raises = entries(sections(name.doc).get("Raises", ""))
    return [f"{name.path}: {entry}" for entry in raises if _error(entry) is None]


def private_names(name: Name) -> list[str]:
    """Names of our private modules, which a reader of the documentation cannot look up."""
    function, found = function_of(name), []
    arguments = {arg.arg for arg in parameters(function)} if function else set()
    for module, rest in re.findall(r"`(?:ddkmix\.)?([a-z_]+)((?:\.\w+)*)`", name.doc):
        ours = any((REPO / "ddkmix" / path).exists() for path in (f"{module}.py", f"{module}/__init__.py"))
        section = RunConfig.model_fields.get(module)
        is_key = section is not None and rest[1:] in getattr(section.annotation, "model_fields", {})
        if (
            ours
            and rest
            and not is_key
            and module not in arguments
            and not _is_public(f"ddkmix.{module}{rest}")
        ):
            found.append(f"{name.path}: {module}{rest}")
    return found


def _is_public(path: str) -> bool:
    """Whether a dotted name is a public module or in the `__all__` of one."""
    module = max((m for m in public_modules() if f"{path}.".startswith(f"{m}.")), key=len)
    first = path.removeprefix(module).lstrip(".").partition(".")[0]
    return not first or first in importlib.import_module(module).__all__


def _raised(function: ast.FunctionDef) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc


def _error(name: str) -> type[BaseException] | None:
    found = getattr(errors, name, None) or getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def without_unit(name: Name) -> list[str]:
    """Numbers of which nothing says what they count or measure: fields, properties, parameters."""
    found = []
    for parameter, text, type_ in _numbers(name):
        said = f"{parameter or name.path.rpartition('.')[2]} {text}".replace("_", " ")
        if not re.search(rf"\b({UNITS})\b", said, flags=re.IGNORECASE):
            found.append(f"{name.path}: {parameter or type_}")
    return found


def _numbers(name: Name) -> Iterator[tuple[str, str, str]]:
    """(parameter, what is said of it, type) of the numbers; a field or property has no parameter."""
    said = entries(sections(name.doc).get("Args", ""))
    for parameter, type_ in annotations(name):
        if not any(_last(part) in NUMBERS for part in ast.walk(parsed(type_))):
            continue
        if name.kind in ("field", "property"):
            yield "", name.doc, ast.unparse(type_)
        elif parameter in said:
            yield parameter, said[parameter], ast.unparse(type_)
