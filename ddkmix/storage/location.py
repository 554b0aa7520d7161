"""Locations: where a shard lies, as a local path or a URL, and how to show one without its secrets.

A location with a scheme is *remote*, `file://` too: a shared network disk can so be spooled like a store.
Signed URLs and `user:password@` hold credentials, so every message and log line goes through `shown`.
"""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from ddkmix.config import Storage
from ddkmix.errors import DataError, did_you_mean

_MODULES = {
    "http": ("fsspec", "ddkmix"),
    "https": ("fsspec", "ddkmix"),
    "file": ("fsspec", "ddkmix"),
    "hf": ("huggingface_hub", "ddkmix"),
    "s3": ("s3fs", "ddkmix[s3]"),
    "gs": ("gcsfs", "ddkmix[gs]"),
}
"""Scheme -> the module that speaks it, and what to install to have it."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_SHARD_WORD = re.compile(r"[^\s/'\"=|<>]+\.(?:tar|tgz|jsonl?|parquet|txt)(?:\.\w+)?(?![\w.])")
"""A file name in a shell command that looks like a shard's."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a `pipe:` command, of known scheme or not."""
    return scheme_of(location) != ""


def scheme_of(location: str) -> str:
    """`https`, `s3`, `pipe`, ... in lower case; empty for a local path."""
    if location.startswith("pipe:"):
        return "pipe"
    match = _SCHEME.match(location)
    return match[1].lower() if match else ""


def store_of(location: str) -> str:
    """Scheme and host (or bucket): locations of one store behave alike."""
    scheme = scheme_of(location)
    if scheme in ("", "pipe"):
        return scheme
    host = location.split("://", 1)[1].partition("/")[0]
    return f"{scheme}://{host.rpartition('@')[2].lower()}"


def shown(location: str) -> str:
    """A location without credentials: no user, no password, no query, no command line."""
    scheme = scheme_of(location)
    if scheme == "pipe":
        words = location.removeprefix("pipe:").split()
        return f"pipe:{words[0] if words else ''} ... {file_name(location)}"
    if scheme == "":
        return location
    rest = location.split("://", 1)[1]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2].partition('?')[0]}{slash}{_without_query(scheme, path)[0]}"


def without_secrets(text: str) -> str:
    """A library's message as one line, with every URL in it as `shown` shows it."""
    return " ".join(_URL.sub(lambda match: shown(match[0]), text).split())


def file_name(location: str) -> str:
    """The last part of the path, without the query.

    For a command, the last word of it that looks like a shard's name; a name made from the whole command if
    none does.
    """
    scheme = scheme_of(location)
    if scheme == "pipe":
        found = _SHARD_WORD.findall(location)
        return str(found[-1]) if found else f"pipe-{hashlib.sha256(location.encode()).hexdigest()[:8]}"
    return _without_query(scheme, location)[0].rsplit("/", 1)[-1]


def join(folder: str, name: str) -> str:
    """A location below a folder; a query of the folder (an access token, often) stays at the end."""
    if is_remote(name):
        return name
    scheme = scheme_of(folder)
    if scheme == "":
        return str(Path(folder) / name)
    path, query = _without_query(scheme, folder)
    return f"{path.rstrip('/')}/{name}{query}"


def sibling(location: str, name: str) -> str:
    """The location of another file beside this one."""
    scheme = scheme_of(location)
    assert scheme != "pipe", "a command has no folder"
    if scheme == "":
        return str(Path(location).with_name(name))
    path, query = _without_query(scheme, location)
    return f"{path.rsplit('/', 1)[0]}/{name}{query}"


def check_location(location: str, settings: Storage, where: str) -> None:
    """Check that a location can be asked for at all; a local path always can. Nothing is opened.

    Args:
        where: what names the location ("domains/code.yaml: train shard"), for the message.

    Raises:
        DataError: an unknown scheme, a scheme whose file system is not installed, a URL that names no file,
            or a `pipe:` command without the opt-in.
    """
    scheme = scheme_of(location)
    if scheme == "pipe":
        _check_pipe(location, settings, where)
    elif scheme:
        _check_url(scheme, location, where)


def _check_url(scheme: str, location: str, where: str) -> None:
    if scheme not in _MODULES:
        raise DataError(
            f"{where}: {shown(location)} has the unknown scheme {scheme!r}; "
            f"{did_you_mean(scheme, [*_MODULES, 'pipe'])}"
        )
    module, package = _MODULES[scheme]
    if find_spec(module) is None:
        raise DataError(
            f"{where}: {shown(location)} needs the package {module}, which is not installed; "
            f"pip install '{package}'."
        )
    path = _without_query(scheme, location)[0].split("://", 1)[1].partition("/")[2]
    if path.rsplit("/", 1)[-1] in ("", ".", ".."):
        raise DataError(f"{where}: {shown(location)} names no file; give the URL of one shard.")


def _check_pipe(location: str, settings: Storage, where: str) -> None:
    if not settings.allow_pipe:
        raise DataError(
            f"{where}: {shown(location)} would run a command in a shell; set storage.allow_pipe=true if you "
            "trust every card of this run."
        )
    if not location.removeprefix("pipe:").strip():
        raise DataError(f"{where}: 'pipe:' has no command; give one that writes the shard to its output.")


def _without_query(scheme: str, location: str) -> tuple[str, str]:
    """A location and its `?query#fragment`; paths of disks may hold both characters."""
    if scheme in ("", "file"):
        return location, ""
    at = min((i for i in (location.find("?"), location.find("#")) if i >= 0), default=len(location))
    return location[:at], location[at:]
