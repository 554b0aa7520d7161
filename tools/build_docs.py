"""The documentation as a site, made by pdoc from the docstrings of the public names and the README.

    python tools/build_docs.py --out site

Every page stands alone: no script, font or image comes from elsewhere. A warning of pdoc's is an error. An
adapter whose framework is not installed is left out, and said so.
"""

import argparse
import inspect
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import markdown2
import pdoc
from pdoc.doc import Class, Doc, Function, Module, Variable
from pdoc.doc_types import empty
from pydantic_core import PydanticUndefined

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(REPO)]  # the package of this tree, wherever we are called

from public_names import SPECIAL, load_modules, public_modules  # noqa: E402

TEMPLATES = Path(__file__).parent / "docs_templates"
OURS = "ddkmix"
"""Modules that begin so are ours."""
FRONT = "ddkmix"
"""The page that begins with the README."""


class DocsError(Exception):
    """The site cannot be built as it should be."""


def build(out: Path, names: Sequence[str], *, readme: Path = REPO / "README.md") -> dict[str, str]:
    """Write the site of some modules into an empty or new folder.

    Returns:
        Modules left out, with the package that each of them lacks.

    Raises:
        DocsError: pdoc warned of something.
    """
    modules, missing = load_modules(names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pages = _render(_documented(modules), readme.read_text(encoding="utf-8"))
    if caught:
        raise DocsError("; ".join(dict.fromkeys(str(warning.message) for warning in caught)))
    for name, page in pages.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    _copy_linked_files(readme, out)
    return missing


def _documented(modules: Sequence[ModuleType]) -> dict[str, Module]:
    """The modules as pdoc sees them, without what is not for readers."""
    for module in modules:
        for name in module.__all__:  # names that are loaded when first used
            setattr(module, name, getattr(module, name))
    docs = {module.__name__: Module(module) for module in modules}
    homes = _homes(modules)
    for name, doc in docs.items():
        doc.submodules = [docs[child] for child in sorted(docs) if child.rpartition(".")[0] == name]
        for member in _walk(doc):
            _tidy(member, homes)
    return docs


def _walk(doc: Any) -> Iterator[Doc[Any]]:
    """Members of a module or class, and of classes in it; what frameworks hand down is not ours to show."""
    if isinstance(doc, Class):
        ours = {name: member for name, member in doc.members.items() if member.taken_from[0].startswith(OURS)}
        doc.members = ours
    for member in list(doc.members.values()):
        yield member
        if isinstance(member, Class):
            yield from _walk(member)


def _tidy(doc: Doc[Any], homes: Mapping[str, str]) -> None:
    """Types as a reader writes them, no constructor for a protocol, no default where none is."""
    if isinstance(doc, Class):
        if getattr(doc.obj, "_is_protocol", False):
            doc.members.pop("__init__", None)
        known = [(homes.get(f"{base[0]}.{base[1]}"), base) for base in doc.bases]
        doc.bases = [(*path.rsplit(".", 1), path) if path else base for path, base in known]
        doc.bases = [base for base in doc.bases if not base[1].startswith("_")]
        inherited = {base: ms for base, ms in doc.inherited_members.items() if base[0].startswith(OURS)}
        private = [base for base in inherited if ".".join(base) not in homes]
        # what a private class of ours hands down is the heir's own
        doc.own_members = [*doc.own_members, *(member for base in private for member in inherited[base])]
        doc.inherited_members = {base: found for base, found in inherited.items() if base not in private}
    if isinstance(doc, Variable):
        doc.annotation = _readable(doc.annotation, homes)
        if doc.default_value is PydanticUndefined:
            doc.default_value = empty
        elif doc.default_value is not empty:
            doc.default_value = _Text(_public(repr(doc.default_value), homes))
    if isinstance(doc, Function):
        for parameter in doc.signature.parameters.values():
            parameter._annotation = _readable(parameter.annotation, homes)  # type: ignore[attr-defined]


class _Text:
    """An annotation that shows as this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


_BOUNDED = re.compile(
    r"(?:typing\.)?Annotated\[([^\[\]]+(?:\[(?:[^\[\]]|\[[^\[\]]*\])*\])?), "
    r"FieldInfo\([^\[]*metadata=\[([^\]]*)\]\)\]"
)
_BOUND = re.compile(r"(?:Ge\(ge|Gt\(gt|Le\(le|Lt\(lt|MinLen\(min_length)=([^)]*)\)")
_SIGN = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<", "Mi": "of length >="}


def _homes(modules: Sequence[ModuleType]) -> dict[str, str]:
    """Where a class is defined -> where it is public: `ddkmix.sections.Pack` -> `ddkmix.config.Pack`."""
    homes: dict[str, str] = {}
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                homes.setdefault(f"{value.__module__}.{name}", f"{module.__name__}.{name}")
    return homes


def _public(text: str, homes: Mapping[str, str]) -> str:
    return re.sub(r"\bddkmix[\w.]*", lambda match: homes.get(match[0], match[0]), text)


def _readable(annotation: Any, homes: Mapping[str, str]) -> Any:
    """`Annotated[int, Field(ge=1)]` as `int >= 1`, classes by their public names."""
    if annotation is empty:
        return annotation
    text = inspect.formatannotation(annotation).replace("~", "")  # type variables
    text = re.sub(r"\*<class '([\w.]+)'>", r"Unpack[\1]", text)
    text = re.sub(r"_PydanticGeneralMetadata\(pattern='[^']*'\)", "", text)  # patterns have brackets too

    def shown(match: re.Match[str]) -> str:
        bounds = [f"{_SIGN[found[0][:2]]} {found[1]}" for found in _BOUND.finditer(match[2])]
        return " ".join([match[1], ", ".join(bounds)]) if bounds else match[1]

    short = _public(_BOUNDED.sub(shown, text), homes)
    return annotation if short == inspect.formatannotation(annotation) else _Text(short)


def to_html(markdown: str) -> str:
    """Markdown to HTML; tags in it (`<domain>`) are text, not HTML."""
    return markdown2.markdown(  # type: ignore[no-any-return]
        markdown,
        extras=pdoc.render_helpers.markdown_extensions,
        link_patterns=pdoc.render_helpers.markdown_link_patterns,
        safe_mode="escape",
    )


def _render(docs: dict[str, Module], readme: str) -> dict[str, str]:
    """File name -> page."""
    pdoc.render.configure(
        docformat="google", template_directory=TEMPLATES, show_source=False, include_undocumented=True
    )
    env = pdoc.render.env
    env.filters["to_html"] = pdoc.search.to_html = to_html
    special = {d.qualname for doc in docs.values() for d in _walk(doc) if d.name in SPECIAL}
    env.globals |= {"front": FRONT, "readme": readme, "special": special}
    pages = {
        f"{name.replace('.', '/')}.html": pdoc.render.html_module(doc, docs) for name, doc in docs.items()
    }
    return {
        **pages,
        "index.html": pdoc.render.html_index(docs),
        "search.js": pdoc.render.search_index(docs),
    }


def _copy_linked_files(readme: Path, out: Path) -> None:
    """The files of the repository that the README links to, so that its links work."""
    for link in set(re.findall(r"\]\(([^)#:]+)\)", readme.read_text(encoding="utf-8"))):
        source, target = readme.parent / link, out / link
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def main() -> int:
    """Build the site of everything public."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "site")
    out: Path = parser.parse_args().out
    if out.exists() and any(out.iterdir()) and not (out / "search.js").exists():
        print(
            f"documentation: {out} holds other things than a site of ours; name a new folder.",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(out, ignore_errors=True)
    try:
        missing = build(out, public_modules())
    except DocsError as error:
        print(f"documentation: {error}", file=sys.stderr)
        return 1
    for name, package in missing.items():
        print(f"left out: {name}, because {package} is not installed")
    print(f"wrote {os.path.relpath(out)}/index.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
