"""Domain cards: found, checked, and refused in one line that says what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ddkmix.domains import Domain, load_domains
from ddkmix.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four files that may serve as shards; loading does not read them."""
    for name in ("train-0.tar", "train-1.tar", "train-2.tar", "held_out.tar"):
        (tmp_path / name).write_bytes(b"not read here")
    return tmp_path


def write_card(path: Path, **changes: Any) -> Path:
    """A sound card with some keys changed; None leaves a key out."""
    card = {"name": "code", "train": "train-0.tar", "held_out": "held_out.tar", "license": "MIT", **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in card.items() if value is not None}))
    return path


def load(path: Path, **changes: Any) -> Domain:
    """The one domain of a card."""
    (domain,) = load_domains([str(write_card(path / "code.yaml", **changes))])
    return domain


def refusal(*patterns: Path | str) -> str:
    """The message with which loading fails; checked to be one line."""
    with pytest.raises(DataError) as info:
        load_domains([str(pattern) for pattern in patterns])
    assert "\n" not in str(info.value)
    return str(info.value)


# --- what is loaded ---------------------------------------------------------------------------------


def test_a_card_becomes_a_domain(folder: Path) -> None:
    """Shards are relative to the card; what is not set has its default."""
    assert Domain(
        name="code",
        card=folder / "code.yaml",
        train=(folder / "train-0.tar",),
        held_out=(folder / "held_out.tar",),
        text_field="txt",
        license="MIT",
        max_epochs=None,
        prior=None,
    ) == load(folder)


def test_every_key_of_a_card_is_read(folder: Path) -> None:
    """The optional ones too."""
    source = {"package": "p", "registry": "pypi", "version": "1", "license": "MIT", "note": "n"}
    domain = load(
        folder, text_field="json.content", max_epochs=2, prior=0.5, description="Code.", sources=[source]
    )
    assert ("json.content", 2.0, 0.5) == (domain.text_field, domain.max_epochs, domain.prior)


@pytest.mark.parametrize(
    ("expected", "train"),
    [
        (["train-0.tar", "train-1.tar", "train-2.tar"], "train-{0..2}.tar"),
        (["train-2.tar", "train-0.tar"], "train-{2,0}.tar"),
        (["train-1.tar", "train-0.tar"], ["train-1.tar", "train-0.tar"]),
        (["train-2.tar", "train-0.tar", "train-1.tar"], ["train-2.tar", "train-{0..1}.tar"]),
    ],
)
def test_braces_and_lists_of_shards(folder: Path, expected: list[str], train: Any) -> None:
    """Braces expand as in a shell; the order is the card's."""
    assert expected == [path.name for path in load(folder, train=train).train]


def test_shards_may_lie_anywhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Absolute paths, and paths that leave the card's folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.tar").write_bytes(b"x")
    (folder / "cards").mkdir()
    train = [str(elsewhere / "a.tar"), "../train-0.tar"]
    domain = load(folder / "cards", train=train, held_out="../held_out.tar")
    assert [elsewhere / "a.tar", folder / "train-0.tar"] == [path.resolve() for path in domain.train]


@pytest.fixture
def three_cards(folder: Path) -> Path:
    """Cards of b, a and c, written in that order, and a file that is no card."""
    for i, name in enumerate(["b", "a", "c"]):
        (folder / f"{name}-held_out.tar").write_bytes(b"x")
        write_card(
            folder / f"{i}-{name}.yaml", name=name, train=f"train-{i}.tar", held_out=f"{name}-held_out.tar"
        )
    (folder / "README.md").write_text("no card")
    return folder


@pytest.mark.parametrize(
    ("expected", "patterns"),
    [
        ("abc", ["."]),
        ("abc", ["*.yaml"]),
        ("ab", ["[01]-*.yaml"]),
        ("ac", ["2-c.yaml", "1-a.yaml"]),
        ("abc", ["2-c.yaml", "*.yaml", "./2-c.yaml", "."]),
        ("b", ["0-b.yaml", "0-b.yaml"]),
    ],
)
def test_domains_are_sorted_by_name(
    three_cards: Path, monkeypatch: pytest.MonkeyPatch, expected: str, patterns: list[str]
) -> None:
    """From folders, globs and files, in any order; a card that is named twice counts once."""
    monkeypatch.chdir(three_cards)
    assert list(expected) == [domain.name for domain in load_domains(patterns)]


def test_folders_with_glob_characters_are_read(folder: Path) -> None:
    """A folder called `data [v1]` is a folder, and a card in it a card, and neither is a pattern."""
    odd = folder / "data [v1]"
    odd.mkdir()
    card = write_card(odd / "code.yaml", train="../train-0.tar", held_out="../held_out.tar")
    assert ["code"] == [domain.name for domain in load_domains([str(odd)])]
    assert ["code"] == [domain.name for domain in load_domains([str(card)])]


# --- what is refused --------------------------------------------------------------------------------


def test_no_card_is_refused(folder: Path) -> None:
    """A pattern that matches nothing, and an empty folder."""
    assert (
        f"domains: '{folder}/*.yml' matches no card; give YAML files, a glob or a folder, relative to the "
        "working directory."
    ) == refusal(f"{folder}/*.yml")
    assert "matches no card" in refusal(folder)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("train shard {folder}/gone.tar does not exist; correct the card or add it.", {"train": "gone.tar"}),
        ("train shard {folder}/train-3.tar does not exist", {"train": "train-{0..3}.tar"}),
        ("held_out shard {folder}/gone.tar does not exist", {"held_out": "gone.tar"}),
        ("train shard {folder} does not exist", {"train": "."}),
        ("domain 'code' has no held_out shards; its loss gap cannot be measured", {"held_out": None}),
        ("domain 'code' has no held_out shards", {"held_out": []}),
        ("domain 'code' has no train shards", {"train": []}),
        ("train is missing; a card needs name, train, held_out and license.", {"train": None}),
        ("name is missing", {"name": None}),
        ("license is missing", {"license": None}),
        ("unknown key 'txt_field'; did you mean 'text_field'?", {"txt_field": "txt"}),
        ("unknown key 'zzz'; known: description, held_out, license", {"zzz": 1}),
        ("name = 'Code'; String should match pattern", {"name": "Code"}),
        ("name = '../code'; String should match pattern", {"name": "../code"}),
        ("name = '-code'; String should match pattern", {"name": "-code"}),
        ("name = ''; String should match pattern", {"name": ""}),
        ("name = 'code\\n'; String should match pattern", {"name": "code\n"}),
        ("name = 3; Input should be a valid string", {"name": 3}),
        ("text_field = 'jsonl'; String should match pattern", {"text_field": "jsonl"}),
        ("text_field = 'json.'; String should match pattern", {"text_field": "json."}),
        ("max_epochs = 0; Input should be greater than 0", {"max_epochs": 0}),
        ("max_epochs = inf; Input should be a finite number", {"max_epochs": float("inf")}),
        ("prior = -1; Input should be greater than 0", {"prior": -1}),
        (
            "train shard 's3://bucket/0.tar' is remote; this version reads local shards. Download it",
            {"train": "s3://bucket/0.tar"},
        ),
        ("train shard 'pipe:curl x' is remote", {"train": ["train-0.tar", "pipe:curl x"]}),
        ("held_out shard 'https://x/0.tar' is remote", {"held_out": "https://x/0.tar"}),
        ("train = 'train-{0..2.tar' has unbalanced braces.", {"train": "train-{0..2.tar"}),
        ("train = 'train-0}.tar' has unbalanced braces.", {"train": "train-0}.tar"}),
    ],
)
def test_a_wrong_card_is_refused(folder: Path, expected: str, changes: dict[str, Any]) -> None:
    """The message names the card, the key, the value and the rule."""
    card = write_card(folder / "code.yaml", **changes)
    message = refusal(card)
    assert message.startswith(f"{card}: ")
    assert expected.format(folder=folder) in message if "{folder}" in expected else expected in message


def test_an_empty_shard_is_refused(folder: Path) -> None:
    """Zero bytes are a download that failed."""
    (folder / "train-0.tar").write_bytes(b"")
    card = write_card(folder / "code.yaml")
    assert f"{card}: train shard {folder}/train-0.tar is empty (0 bytes); write it again." == refusal(card)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"just text", id="text"),
        pytest.param(b"- a\n- b\n", id="list"),
        pytest.param(b"name: [", id="no YAML"),
        pytest.param(b"name: \tx\n\t- y: :", id="tabs"),
        pytest.param(b"name: \xff", id="not UTF-8"),
        pytest.param(b"name: !!python/object/apply:os.getcwd []", id="code"),
    ],
)
def test_what_is_no_card_is_refused(folder: Path, content: bytes) -> None:
    """One line with the path, whatever YAML has to say about it."""
    card = folder / "code.yaml"
    card.write_bytes(content)
    assert str(card) in refusal(card)


def test_a_folder_that_is_called_like_a_card_is_refused(folder: Path) -> None:
    """A glob may match a folder."""
    (folder / "code.yaml").mkdir()
    assert f"{folder}/code.yaml cannot be read as a card" in refusal(f"{folder}/*.yaml")


def test_two_domains_of_one_name_are_refused(folder: Path) -> None:
    """Both cards are named."""
    one = write_card(folder / "one.yaml")
    two = write_card(folder / "two.yaml", train="train-1.tar", held_out="train-2.tar")
    assert f"domain 'code' is in two cards, {one} and {two}; names must differ." == refusal(folder)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("is in code/train and in code/held_out", {"held_out": "train-0.tar"}),
        ("is in code/train and in code/train", {"train": ["train-0.tar", "train-0.tar"]}),
        ("is in code/train and in code/train", {"train": ["train-0.tar", "./cards/../train-0.tar"]}),
        ("is in code/train and in code/held_out", {"held_out": "link.tar"}),
    ],
)
def test_a_shard_twice_in_one_domain_is_refused(folder: Path, expected: str, changes: dict[str, Any]) -> None:
    """Under the same path, another spelling of it, or a link."""
    (folder / "cards").mkdir()
    (folder / "link.tar").symlink_to(folder / "train-0.tar")
    message = refusal(write_card(folder / "code.yaml", **changes))
    assert f"{expected}; a shard belongs to one split of one domain." in message


def test_a_shard_in_two_domains_is_refused(folder: Path) -> None:
    """Learning from what another domain measures on would hide its gap."""
    write_card(folder / "a.yaml", name="a")
    write_card(folder / "b.yaml", name="b", train="held_out.tar", held_out="train-1.tar")
    assert (
        f"shard {folder}/held_out.tar is in a/held_out and in b/train; a shard belongs to one split of one "
        "domain."
    ) == refusal(folder)


def test_an_unreadable_card_is_named(folder: Path) -> None:
    """A link that leads nowhere."""
    (folder / "code.yaml").symlink_to(folder / "gone.yaml")
    assert f"{folder}/code.yaml" in refusal(folder)
