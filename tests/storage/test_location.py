"""Locations: told apart, taken apart, and shown without their secrets."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddkmix.config import Storage
from ddkmix.errors import DataError
from ddkmix.storage.location import (
    check_location,
    file_name,
    is_remote,
    join,
    scheme_of,
    shown,
    sibling,
    store_of,
    without_secrets,
)


@pytest.mark.parametrize(
    ("scheme", "location"),
    [
        ("", "code/train-000000.tar"),
        ("", "/data/train.tar"),
        ("", "../a:b/train.tar"),
        ("", "data/http://x"),
        ("http", "http://host/a.tar"),
        ("https", "HTTPS://host/a.tar"),
        ("s3", "s3://bucket/a.tar"),
        ("gs", "gs://bucket/a.tar"),
        ("hf", "hf://datasets/owner/name/a.tar"),
        ("file", "file:///data/a.tar"),
        ("az", "az://container/a.tar"),
        ("simplecache::s3", "simplecache::s3://bucket/a.tar"),
        ("pipe", "pipe:cat a.tar"),
    ],
)
def test_paths_urls_and_commands(scheme: str, location: str) -> None:
    """A scheme makes a location remote, a known one or not; everything else is a path."""
    assert scheme == scheme_of(location)
    assert bool(scheme) == is_remote(location)


@pytest.mark.parametrize(
    ("expected", "location"),
    [
        ("a.tar", "a.tar"),
        ("a?b#c.tar", "folder/a?b#c.tar"),
        ("a.tar", "https://host/x/a.tar?sig=a/b#d"),
        ("a.tar", "https://me:pw@host/a.tar#x?y"),
        ("a.tar", "s3://bucket/x/a.tar?versionId=3"),
        ("a?b.tar", "file:///x/a?b.tar"),
        ("b.tar.gz", "hf://datasets/o/n@v1/a/b.tar.gz"),
        ("shard-00000.tar", "pipe:aws s3 cp s3://data/shard-00000.tar -"),
        ("a.tar", "pipe:curl -s 'https://host/a.tar?sig=x' | pv"),
        ("b.tgz", "pipe:cat a.list.txt.d/b.tgz"),
        ("pipe-1c9b8b7c", "pipe:./next-shard 17"),
    ],
)
def test_the_file_name_of_a_location(expected: str, location: str) -> None:
    """The last part of the path; of a command, the word that looks like a shard, or a name of its digest."""
    name = file_name(location)
    assert expected == name or (expected.startswith("pipe-") and name.startswith("pipe-") and len(name) == 13)


def test_two_commands_without_a_name_have_two_names() -> None:
    """Rows of different shards must not share their names."""
    assert file_name("pipe:./next 1") != file_name("pipe:./next 2")


@pytest.mark.parametrize(
    ("expected", "folder"),
    [
        ("data/a.tar", "data"),
        ("/data/a.tar", "/data/"),
        ("s3://bucket/x/a.tar", "s3://bucket/x/"),
        ("s3://bucket/a.tar", "s3://bucket"),
        ("https://me:pw@host/x/a.tar?token=t/1", "https://me:pw@host/x?token=t/1"),
        ("file:///x?y/a.tar", "file:///x?y"),
    ],
)
def test_joining(expected: str, folder: str) -> None:
    """A name below a folder; an access token stays where servers want it."""
    assert expected == join(folder, "a.tar")
    assert "https://other/b.tar" == join(folder, "https://other/b.tar")


@pytest.mark.parametrize(
    ("expected", "location"),
    [
        ("x/b", "x/a.tar"),
        ("s3://bucket/x/b", "s3://bucket/x/a.tar"),
        ("https://host/b?sig=1/2", "https://host/a.tar?sig=1/2"),
        ("file:///x?y/b", "file:///x?y/a.tar"),
    ],
)
def test_siblings(expected: str, location: str) -> None:
    """Another file of the same folder, with the same token."""
    assert expected == sibling(location, "b")


@pytest.mark.parametrize(
    ("expected", "location"),
    [
        ("x/a?b.tar", "x/a?b.tar"),
        ("https://host:1/x/a.tar", "https://me:p@ss@host:1/x/a.tar?sig=hush#hush"),
        ("https://host", "https://hush@host?hush"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar?versionId=1"),
        ("hf://datasets/o/n@v1/a.tar", "hf://datasets/o/n@v1/a.tar"),
        ("pipe:curl ... a.tar", "pipe:curl -H 'Authorization: hush' https://h/a.tar?sig=hush"),
    ],
)
def test_secrets_are_not_shown(expected: str, location: str) -> None:
    """User, password, query and a command's arguments are left out; what names the file stays."""
    assert expected == shown(location)


def test_secrets_in_other_peoples_messages_are_not_shown() -> None:
    """A library's exception quotes the URL it failed on; two lines become one."""
    text = "403, url='https://me:hush@h/a.tar?sig=hush'\nsee http://docs/x?hush"
    assert "403, url='https://h/a.tar' see http://docs/x" == without_secrets(text)


@given(
    user=st.text(alphabet="abc:", min_size=1, max_size=5),
    secret=st.text(alphabet="XYZ%@:!", min_size=3, max_size=8).filter(lambda s: any(c in s for c in "XYZ")),
    path=st.text(alphabet="abc/.", max_size=10),
)
def test_no_secret_is_ever_shown(user: str, secret: str, path: str) -> None:
    """Whatever characters they hold: the letters of the secret do not occur anywhere else."""
    location = f"https://{user}:{secret}@host/{path}?sig={secret}"
    assert f"https://host/{path}" == shown(location)
    assert not set("XYZ") & set(without_secrets(f"failed: {location}"))


@pytest.mark.parametrize(
    ("expected", "location"),
    [
        ("", "a/b.tar"),
        ("pipe", "pipe:cat a.tar"),
        ("file://", "file:///x/a.tar"),
        ("s3://bucket", "s3://Bucket/x/a.tar"),
        ("https://host:1", "https://me:pw@HOST:1/a.tar"),
    ],
)
def test_the_store_of_a_location(expected: str, location: str) -> None:
    """What one of its files can do, the others can."""
    assert expected == store_of(location)


# --- checks -----------------------------------------------------------------------------------------


def refusal(location: str, settings: Storage | None = None) -> str:
    """The message of the check, one line that begins with the place."""
    with pytest.raises(DataError) as info:
        check_location(location, settings or Storage(), "code.yaml: train shard")
    assert "\n" not in str(info.value)
    assert str(info.value).startswith("code.yaml: train shard: ")
    return str(info.value)


@pytest.mark.parametrize(
    "location",
    [
        "a.tar",
        "https://h/a.tar",
        "http://h/x/a.tar?b",
        "hf://datasets/o/n/a.tar",
        "file:///a.tar",
        "s3://b/a.tar",
    ],
)
def test_what_can_be_asked_for(location: str) -> None:
    """Nothing is opened, so nothing has to be there."""
    check_location(location, Storage(), "code.yaml: train shard")


def test_an_unknown_scheme() -> None:
    """The nearest known one is offered."""
    assert (
        "code.yaml: train shard: htps://host/a.tar has the unknown scheme 'htps'; did you mean 'https'?"
        == refusal("htps://me:hush@host/a.tar?sig=hush")
    )
    assert "known: file, gs, hf, http, https, pipe, s3." in refusal("abfs://x/y")


@pytest.mark.parametrize(("module", "scheme", "extra"), [("s3fs", "s3", "s3"), ("gcsfs", "gs", "gs")])
def test_a_scheme_that_needs_a_package(
    module: str, scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says which, and how to install it."""
    monkeypatch.setitem(sys.modules, module, None)
    assert (
        f"code.yaml: train shard: {scheme}://bucket/a.tar needs the package {module}, which is not "
        f"installed; pip install 'ddkmix[{extra}]'."
    ) == refusal(f"{scheme}://bucket/a.tar")


@pytest.mark.parametrize(
    "location", ["https://host", "https://host/", "s3://bucket/x/", "https://h/..", "https://h?a/b"]
)
def test_a_url_that_names_no_file(location: str) -> None:
    """A folder is no shard."""
    assert "names no file; give the URL of one shard." in refusal(location)


def test_commands_need_the_opt_in() -> None:
    """And then a command; the message does not print it, as it may hold a password."""
    assert (
        "code.yaml: train shard: pipe:curl ... a.tar would run a command in a shell; set "
        "storage.allow_pipe=true if you trust every card of this run."
    ) == refusal("pipe:curl -u me:hush https://h/a.tar")
    assert "'pipe:' has no command" in refusal("pipe: ", Storage(allow_pipe=True))
    check_location("pipe:cat a.tar", Storage(allow_pipe=True), "code.yaml: train shard")
