"""Domain cards: found, checked, and refused in one line that says what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkmix.config import Storage
from ddkmix.document_shards import DocumentShard, with_names
from ddkmix.documents import HubSplit
from ddkmix.domains import Domain, load_domains
from ddkmix.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four files that may serve as shards; loading does not read them."""
    for name in ("train-0.tar", "train-1.tar", "train-2.tar", "held_out.tar"):
        (tmp_path / name).write_bytes(b"not read here")
    return tmp_path


PLAIN = {"prompt": "p", "response": "r"}


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
        train=(DocumentShard(location=str(folder / "train-0.tar"), name="train-0.tar"),),
        held_out=(DocumentShard(location=str(folder / "held_out.tar"), name="held_out.tar"),),
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
    assert expected == [shard.name for shard in load(folder, train=train).train]


def test_shards_may_lie_anywhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Absolute paths, and paths that leave the card's folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.tar").write_bytes(b"x")
    (folder / "cards").mkdir()
    train = [str(elsewhere / "a.tar"), "../train-0.tar"]
    domain = load(folder / "cards", train=train, held_out="../held_out.tar")
    assert [elsewhere / "a.tar", folder / "train-0.tar"] == [
        Path(shard.location).resolve() for shard in domain.train
    ]


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
        ("train is missing; a card needs name, license, and train and held_out (or rows).", {"train": None}),
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
        ("text_field = 'a b'; String should match pattern", {"text_field": "a b"}),
        ("text_field = 'json.'; String should match pattern", {"text_field": "json."}),
        *(
            (message, {"text_field": None, "prompt_response": value})
            for message, value in {
                "prompt_response = {}; name messages, or both prompt and response.": {},
                "prompt_response = {'prompt': 'p'}; name messages, or both": {"prompt": "p"},
                "messages and prompt exclude each other": {"messages": "m", "prompt": "p"},
                "unknown key 'prompt_response.promt'; did you mean 'prompt'?": {"promt": "p"},
                "template holds {prompt!r}; it may hold {prompt}, and {{ for a": {
                    **PLAIN,
                    "template": "{prompt!r}",
                },
                "template holds {prompt.__class__}; it may": {**PLAIN, "template": "{prompt.__class__}"},
                "template holds {prompt:>9}; it may": {**PLAIN, "template": "{prompt:>9}"},
                "template holds {response}; it may": {**PLAIN, "template": "{prompt}{response}"},
                "template holds {}; it may": {**PLAIN, "template": "{}"},
                "template lacks {prompt}.": {**PLAIN, "template": "x"},
                "template lacks {context}.": {**PLAIN, "context": "c", "template": "{prompt}"},
                "expected '}' before end of string": {**PLAIN, "template": "{prompt"},
                "prompt_response.messages = 'a b'; String should match pattern": {"messages": "a b"},
                "long_responses = 'keep'; Input should be 'leave_out' or 'cut'": {
                    **PLAIN,
                    "long_responses": "keep",
                },
            }.items()
        ),
        (
            "text_field and prompt_response exclude each other; remove one of them.",
            {"text_field": "txt", "prompt_response": {"messages": "m"}},
        ),
        ("max_epochs = 0; Input should be greater than 0", {"max_epochs": 0}),
        ("max_epochs = inf; Input should be a finite number", {"max_epochs": float("inf")}),
        ("prior = -1; Input should be greater than 0", {"prior": -1}),
        ("train: s4://bucket/0.tar has the unknown scheme 's4'", {"train": "s4://bucket/0.tar"}),
        ("train: pipe:curl ... x.tar would run a command in a shell; set", {"train": ["pipe:curl x.tar"]}),
        ("held_out: https://x/ names no file", {"held_out": "https://x/"}),
        ("train = 's3://b/*.tar': `*` stands for files of this machine only", {"train": "s3://b/*.tar"}),
        ("train = 'gone-*.tar' matches no file", {"train": "gone-*.tar"}),
        ("train.dataset is missing", {"train": {"config": "en"}}),
        ("unknown key 'train.shrads'; did you mean 'shards'?", {"train": {"dataset": "a/b", "shrads": 2}}),
        ("train.shards = 0; Input should be greater", {"train": [{"dataset": "a/b", "shards": 0}]}),
        ("train = 3; Input should be a valid string", {"train": 3}),
        ("held_out.share_of_train = 0; Input should be greater than 0", {"held_out": {"share_of_train": 0}}),
        ("held_out.share_of_train = 0.9; Input should be less", {"held_out": {"share_of_train": 0.9}}),
        ("unknown key 'held_out.share'; known: share_of_train.", {"held_out": {"share": 0.1}}),
        ("train beside rows; packed rows hold both splits", {"rows": "packed"}),
        ("held_out beside rows", {"rows": "packed", "train": None}),
        ("sha256 names 'gone.tar', which is no shard of the card", {"sha256": {"gone.tar": 64 * "0"}}),
        ("sha256.train-0.tar = 'abc'; String should match pattern", {"sha256": {"train-0.tar": "abc"}}),
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


# --- sources of every kind --------------------------------------------------------------------------


def locations(domain: Domain) -> list[str]:
    """Where the train shards of a domain lie."""
    return [shard.location for shard in domain.train]


def test_stars_match_files_in_order(folder: Path) -> None:
    """`**` goes into folders; other glob characters are plain; only files match."""
    (folder / "train-9").mkdir()
    (folder / "deep").mkdir()
    (folder / "deep" / "a[1].tar").write_bytes(b"x")
    assert [f"{folder}/train-{i}.tar" for i in range(3)] == locations(load(folder, train="train-*"))
    assert [f"{folder}/deep/a[1].tar"] == locations(load(folder, train="**/a[1]*"))


def test_remote_shards_are_taken_as_they_are(folder: Path) -> None:
    """Braces expand in URLs; nothing is asked over the network; a query is no part of a row's name."""
    domain = load(folder, train=["https://data.example/{en,fr}/0.jsonl.zst?key=x", "s3://bucket/1.tar"])
    expected = [
        "https://data.example/en/0.jsonl.zst?key=x",
        "https://data.example/fr/0.jsonl.zst?key=x",
        "s3://bucket/1.tar",
    ]
    assert expected == locations(domain)
    assert ["en__0.tar", "fr__0.tar", "1.tar"] == [shard.name for shard in domain.train]
    assert "https://data.example/en/0.jsonl.zst" == str(domain.train[0])


def test_commands_need_leave(folder: Path) -> None:
    """storage.allow_pipe is the run's decision, not the card's."""
    card = write_card(folder / "code.yaml", train="pipe:zcat x.tar.gz")
    (domain,) = load_domains([str(card)], Storage(allow_pipe=True))
    assert ["x.tar"] == [shard.name for shard in domain.train]


def test_a_data_set_is_one_entry_until_it_is_packed(folder: Path) -> None:
    """Counting its files would ask the Hub; a name with a dot in front is a folder beside the card."""
    entry = {"dataset": "owner/name", "config": "en", "split": "train", "revision": "main", "shards": 4}
    domain = load(folder, train=[entry, {"dataset": "./mine"}], text_field="text")
    hub, mine = (shard.dataset for shard in domain.train)
    assert HubSplit(dataset="owner/name", config="en", split="train", revision="main") == hub
    assert HubSplit(dataset=str(folder / "mine")) == mine
    assert [4, 0] == [shard.of for shard in domain.train]


def test_sources_can_be_mixed(folder: Path) -> None:
    """A list takes whatever a single entry may be."""
    write_list(folder / "list.json", [{"url": "train-2.tar"}])
    train = ["train-{0,1}.tar", "https://x.example/a.parquet", {"dataset": "o/n"}, "list.json"]
    names = [shard.name for shard in load(folder, train=train).train]
    assert ["train-0.tar", "train-1.tar", "a.tar", "n-train", "train-2.tar"] == names


def write_list(path: Path, shards: list[dict[str, Any]]) -> None:
    """A wids list."""
    tree = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    path.write_text(json.dumps(tree))


def test_a_wids_list_stands_for_its_shards(folder: Path) -> None:
    """Relative to the list; what it promises is kept, to be checked when a shard is read."""
    entry = {"url": "train-1.tar", "nsamples": 3, "md5sum": "0" * 32, "filesize": 13}
    write_list(folder / "list.json", [entry, {"url": "https://x.example/2.tar"}])
    first, second = load(folder, train="list.json").train
    assert (f"{folder}/train-1.tar", 3, "0" * 32, 13) == (
        first.location,
        first.num_documents,
        first.md5,
        first.size,
    )
    assert ("https://x.example/2.tar", None) == (second.location, second.md5)


def test_a_list_with_a_shard_that_is_not_there_is_refused(folder: Path) -> None:
    """The message names the card, the list and the shard."""
    write_list(folder / "list.json", [{"url": "gone.tar"}])
    message = refusal(write_card(folder / "code.yaml", train="list.json"))
    assert f"train: list.json: shard {folder}/gone.tar does not exist" in message


def test_json_that_is_no_list_holds_documents(folder: Path) -> None:
    """`.json` is also what JSON lines are called."""
    (folder / "a.json").write_text('{"text": "hello"}\n')
    assert [f"{folder}/a.json"] == locations(load(folder, train="a.json", text_field="text"))


def test_a_share_of_the_train_documents_can_be_held_out(folder: Path) -> None:
    """Then there are no held-out shards."""
    domain = load(folder, held_out={"share_of_train": 0.01})
    assert (0.01, ()) == (domain.share_of_train, domain.held_out)


@pytest.mark.parametrize(("rows", "expected"), [("packed", "{folder}/packed"), ("s3://b/c", "s3://b/c")])
def test_packed_rows_take_the_place_of_shards(folder: Path, rows: str, expected: str) -> None:
    """A folder beside the card, or a URL."""
    domain = load(folder, rows=rows, train=None, held_out=None)
    assert (expected.format(folder=folder), ()) == (domain.rows, domain.train)


def test_two_domains_of_the_same_rows_are_refused(folder: Path) -> None:
    """As with shards."""
    for name in "ab":
        write_card(folder / f"{name}.yaml", name=name, rows="packed", train=None, held_out=None)
    assert f"rows {folder}/packed are in a and in b; rows belong to one domain." == refusal(folder)


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["part-0.tar", "part-1.tar"], ["part-0.jsonl", "part-1.jsonl.gz"]),
        (["c4-train.00000-of-01024.tar"], ["c4-train.00000-of-01024.json.gz"]),
        (
            ["en__part-0.tar", "fr__part-0.tar", "part-1.tar"],
            ["en/part-0.tar", "fr/part-0.tar", "part-1.tar"],
        ),
        (["a__x__0.tar", "b__x__0.tar"], ["a/x/0.parquet", "b/x/0.parquet"]),
        (["a.jsonl.tar", "a.parquet.tar"], ["a.jsonl", "a.parquet"]),
        (["a__b.tar", "0.tar"], ["a__b.tar", "a/../0.tar"]),
        (["has_space_and_hash.tar"], ["has space#and#hash.tar"]),
        ([".gz.tar"], [".gz"]),
    ],
)
def test_rows_are_named_by_the_shortest_path_that_tells(
    tmp_path: Path, names: list[str], paths: list[str]
) -> None:
    """The format's suffix gives way to .tar; folders are added where file names meet."""
    (tmp_path / "held_out.tar").write_bytes(b"x")
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    assert names == [shard.name for shard in load(tmp_path, train=paths, text_field="text").train]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.lists(st.text("ab_#", min_size=1, max_size=2), min_size=1, max_size=4).map("/".join),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_names_are_distinct_or_refused(paths: list[str]) -> None:
    """Whatever the paths: rows of two shards never share a name, and a name never leaves its folder."""
    shards = [DocumentShard(location=f"/data/{path}.tar") for path in paths]
    try:
        names = [shard.name for shard in with_names(shards, where="train")]
    except DataError as error:
        assert "would both have rows called" in str(error)
        return
    assert len(paths) == len(set(names))
    assert not any("/" in name or "#" in name or name in ("", ".", "..") for name in names)


# --- checksums --------------------------------------------------------------------------------------


def test_checksums_find_their_shards(folder: Path) -> None:
    """By file name, or by as much of the path as it takes; digits may be upper-case."""
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "0.tar").write_bytes(b"x")
    one, two, three = ("1" * 64, "A" * 64, "3" * 64)
    sha256 = {"a/0.tar": one, "b/0.tar": two, "held_out.tar": three}
    domain = load(folder, train=["{a,b}/0.tar", "train-0.tar"], sha256=sha256)
    assert [one, two.lower(), None] == [shard.sha256 for shard in domain.train]
    assert [three] == [shard.sha256 for shard in domain.held_out]


def test_a_checksum_that_fits_two_shards_is_refused(folder: Path) -> None:
    """The way out is a longer path."""
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "0.tar").write_bytes(b"x")
    card = write_card(folder / "code.yaml", train="{a,b}/0.tar", sha256={"0.tar": "1" * 64})
    assert "'0.tar' fits" in refusal(card)
    assert "write more of the path before it" in refusal(card)


def test_a_card_of_prompts(folder: Path) -> None:
    """What it says of an example reaches the domain; of text nothing does."""
    chat = load(folder, prompt_response={"messages": "json.chat", "long_responses": "cut"}).prompt_response
    assert chat is not None
    assert ("json.chat", "cut", None) == (chat.messages, chat.long_responses, chat.end_of_turn)
    template = "{{x}} {context}: {prompt}"
    plain = {**PLAIN, "context": "a.b", "template": template}
    found = load(folder, prompt_response=plain).prompt_response
    assert found is not None
    assert (template, "leave_out") == (found.template, found.long_responses)
    assert load(folder).prompt_response is None
