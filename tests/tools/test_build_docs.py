"""The documentation is a site that holds every public name, links only to what is there, and stands alone."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import build_docs as tool  # noqa: E402
import public_names  # noqa: E402

README = tool.REPO / "README.md"


class Page(HTMLParser):
    """What a page points to and what can be pointed at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Anchors, and whatever a browser fetches by itself."""
        known = {name: value or "" for name, value in attrs}
        self.ids.add(known.get("id", ""))
        if tag == "a" and "href" in known:
            self.links.append(known["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in known:
            self.loaded.append(known["src"])
        if tag == "link":
            self.loaded.append(known.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of everything public, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    assert {} == tool.build(out, public_names.public_modules())
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """All pages of the site."""
    return {path: Page(path) for path in site.rglob("*.html")}


def page_of(site: Path, module: str) -> Path:
    """The file of a module."""
    return site / f"{module.replace('.', '/')}.html"


def test_every_public_name_has_its_place(site: Path, pages: dict[Path, Page]) -> None:
    """A page for each public module, an anchor for each public name, and no page for anything private."""
    modules = public_names.public_modules()
    assert set(pages) == {site / "index.html", *(page_of(site, module) for module in modules)}
    lost = []
    for name in public_names.public_names(public_names.load_modules(modules)[0]):
        home = max((m for m in modules if f"{name.path}.".startswith(f"{m}.")), key=len)
        anchor = name.path.removeprefix(home).lstrip(".")
        lost += [] if not anchor or anchor in pages[page_of(site, home)].ids else [name.path]
    assert [] == lost


def test_the_front_page_is_the_readme(site: Path) -> None:
    """`index.html` leads to the package's page, which begins with the README's title and has its headings."""
    assert "url=./ddkmix.html" in (site / "index.html").read_text()
    text = (site / "ddkmix.html").read_text()
    assert '<h1 id="ddkmix">ddkmix</h1>' in text
    headings = re.findall(r"^## (.+)$", README.read_text(), flags=re.MULTILINE)
    shown = re.findall(r"<h2 id=[^>]*>(.*?)</h2>", text)
    assert headings == [re.sub(r"<[^>]+>", "", heading) for heading in shown]
    for heading in headings:
        assert f">{heading}</a>" in text  # in the contents too


def test_every_page_can_be_reached(site: Path, pages: dict[Path, Page]) -> None:
    """From the front page, by links: no page is lost because its package has none."""
    reached, new = set(), {site / "ddkmix.html"}
    while new:
        reached |= new
        links = {
            (path.parent / link.partition("#")[0]).resolve() for path in new for link in pages[path].links
        }
        new = {path for path in pages if path.resolve() in links} - reached
    assert set(pages) == reached | {site / "index.html"}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    """Pages, anchors and the files that the README links to."""
    dead = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"https?://", link):
                continue
            to = (path.parent / target).resolve() if target else path
            alive = to.exists() and (not anchor or to not in pages or anchor in pages[to].ids)
            dead += [] if alive else [f"{path.relative_to(site)} -> {link}"]
    assert [] == dead


def test_public_names_are_linked_where_they_are_named(site: Path) -> None:
    """From a signature, from a text, and from the README."""
    policies = page_of(site, "ddkmix.policies").read_text()
    assert '<a href="../ddkmix.html#DomainLosses">ddkmix.DomainLosses</a>' in policies
    losses = page_of(site, "ddkmix.losses").read_text()
    assert 'href="losses/weights.html#WeightSchedule"' in losses
    front = (site / "ddkmix.html").read_text()
    assert '<a href="ddkmix/planner.html#quantise">ddkmix.planner.quantise</a>' in front


def test_the_site_stands_alone(site: Path, pages: dict[Path, Page]) -> None:
    """Nothing is fetched from elsewhere when it is read: no script, style, font or image."""
    for page in pages.values():
        assert not [source for source in page.loaded if not source.startswith("data:")]
    for path in site.rglob("*.html"):
        assert not re.findall(r"@import|url\(\s*['\"]?(?:https?:)?//", path.read_text())


def test_types_are_written_as_a_reader_writes_them(site: Path) -> None:
    """Bounds instead of pydantic's objects, no addresses of this process, no default where none is."""
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert not re.findall(
        r"FieldInfo|PydanticUndefined|object at 0x|Annotated\[|\*&lt;class|ddkmix\.sections", text
    )
    assert "WeightPolicy.__init__" not in text  # a protocol is not called
    mixture = re.sub(r"<[^>]+>", "", (site / "ddkmix.html").read_text())
    assert "**options: Unpack[ddkmix.sources.MixtureOptions]" in mixture
    config = re.sub(r"<[^>]+>", "", page_of(site, "ddkmix.config").read_text())
    assert "steps: int &gt;= 1\n" in config.replace("    ", "")


@pytest.mark.parametrize("table", ["POLICIES", "LOSSES"])
def test_every_policy_and_loss_shows_its_source(table: str, site: Path) -> None:
    """A paper, with the number of the equation, table or algorithm where its rule is known to us from there
    and not from the authors' code alone; our own policy says that it is ours."""
    import ddkmix

    numbered = {"ddk", "doremi", "sheared", "ado", "skill_it", "softmax", "static"}
    for name, cls in getattr(ddkmix, table).items():
        page = page_of(site, f"ddkmix.{table.lower()}").read_text()
        (section,) = re.findall(rf'<section id="{cls.__name__}">.*?</section>', page, flags=re.DOTALL)
        if name == "marginal_gain":
            assert "Ours; the page beside the source" in section
            continue
        assert re.search(r"arXiv \d{4}\.\d{5}", section), cls
        if name in numbered:
            assert re.search(r"Eq\. \d|Table \d|Algorithm \d", section), cls


# --- what goes wrong --------------------------------------------------------------------------------


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, readme: str = "# T") -> str:
    """The page of a module with this source."""
    name = f"ddkmix_{folder.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(source)
    (folder / "README.md").write_text(readme)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(tool, "FRONT", name)
    tool.build(folder / "site", [name], readme=folder / "README.md")
    return (folder / "site" / f"{name}.html").read_text() + (folder / "site" / "search.js").read_text()


HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(1)> mixture/weight/<domain>"


def test_a_docstring_is_text_and_never_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags are shown as they are written, on the page and in the search; so are those of the README."""
    source = f'"""{HOSTILE}"""\n__all__ = ["f"]\ndef f(x: str = {HOSTILE!r}) -> None:\n    """{HOSTILE}"""\n'
    readme = f"# {HOSTILE}\n\n{HOSTILE}\n\n[click](javascript:alert(1))\n"
    text = build(tmp_path, monkeypatch, source, readme)
    assert "mixture/weight/&lt;domain&gt;" in text
    assert not re.findall(r"<script>alert|<img src=x|<domain>|href=.javascript:", text)


def test_tags_would_get_through_without_the_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: pdoc by itself passes HTML on."""
    monkeypatch.setattr(tool, "to_html", tool.pdoc.render_helpers.to_html)
    source = f'"""{HOSTILE}"""\n__all__ = ["f"]\ndef f() -> None:\n    """{HOSTILE}"""\n'
    assert "<script>alert(1)</script>" in build(tmp_path, monkeypatch, source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('__all__ = ["f"]\ndef f(x: "Gone") -> None:\n    """F."""\n', "Error parsing type annotation"),
        ('"""A.\n\n.. include:: gone.md\n"""\n__all__ = []\n', "Cannot include 'gone.md'"),
    ],
)
def test_a_warning_is_an_error(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type that cannot be resolved, a file that is not there: no site, and the reason."""
    with pytest.raises(tool.DocsError, match=message):
        build(tmp_path, monkeypatch, source)


def test_what_a_private_class_hands_down_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of a private base stand below the public class that has them."""
    (tmp_path / "ddkmix_base.py").write_text(
        'class Base:\n    def stop(self) -> None:\n        """Stop."""\n'
    )
    source = 'from ddkmix_base import Base\n__all__ = ["Heir"]\nclass Heir(Base):\n    """An heir."""\n'
    assert 'id="Heir.stop"' in build(tmp_path, monkeypatch, source)


def test_what_a_framework_hands_down_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of somebody else's base are not shown, and types in them that cannot be resolved do not matter:
    transformers' Trainer names optuna, which is not installed."""
    theirs = 'class Trainer:\n    def fit(self, trial: "optuna.Trial") -> None:\n        """Fit."""\n'
    (tmp_path / "framework_of_theirs.py").write_text(theirs)
    source = (
        'from framework_of_theirs import Trainer\n__all__ = ["Ours"]\nclass Ours(Trainer):\n    """Ours."""\n'
        '    def stop(self) -> None:\n        """Stop."""\n'
    )
    page = build(tmp_path, monkeypatch, source)
    assert 'id="Ours.stop"' in page and "Ours.fit" not in page


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    """The tool as `make docs` calls it."""
    return subprocess.run(
        [sys.executable, str(TOOLS / "build_docs.py"), "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder.parent,
    )


def test_the_command_replaces_an_old_site(tmp_path: Path) -> None:
    """`make docs` from anywhere; pages that are gone do not stay."""
    out = tmp_path / "site"
    out.mkdir()
    for name in ("search.js", "old.html"):
        (out / name).write_text("old")
    done = command(out)
    assert (0, "", "wrote site/index.html\n") == (done.returncode, done.stderr, done.stdout)
    assert not (out / "old.html").exists() and (out / "ddkmix.html").exists()


def test_the_command_deletes_nothing_else(tmp_path: Path) -> None:
    """A folder that is no site of ours is left as it is."""
    (tmp_path / "thesis.tex").write_text("years of work")
    done = command(tmp_path)
    assert 1 == done.returncode and "holds other things" in done.stderr
    assert "years of work" == (tmp_path / "thesis.tex").read_text()
