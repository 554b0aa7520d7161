"""What a logits store was made of: the card that says which runs may read it, and how stores are found.

A store is a folder named after everything that its records depend on but the rows: teacher, tokenizer,
context and what was kept. Rows are known by the content of their shard, so a domain may grow and a mixture,
an order, a seed or a number of ranks may change without a record being captured twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ddkmix.config import Capture
from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_json, write_atomically

STORE = "store.json"
STORE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is kept of each token; settings without effect are None, so that they change no key."""

    keep: str
    p: float | None = None
    k: int | None = None
    draws: int | None = None
    log_prob_bytes: int | None = None
    hidden_bytes: int | None = None

    @property
    def has_exact(self) -> bool:
        """Whether some entries stand for themselves."""
        return self.k is not None

    @property
    def is_hidden(self) -> bool:
        """Whether hidden states are kept instead of classes."""
        return self.keep == "hidden"


def kept_of(capture: Capture) -> Kept:
    """The settings of a config that have an effect."""
    keep = capture.keep
    return Kept(
        keep=keep,
        p=capture.p if keep == "top_p_k" else None,
        k=capture.k if keep in ("top_p_k", "top_k", "top_k_drawn") else None,
        draws=capture.draws if keep in ("drawn", "top_k_drawn") else None,
        log_prob_bytes=None if keep == "hidden" else capture.log_prob_bytes,
        hidden_bytes=capture.hidden_bytes if keep == "hidden" else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreCard:
    """Everything that records depend on, but the rows."""

    teacher: str
    """Its name in the config; only for people to read."""
    members: tuple[Mapping[str, Any], ...]
    """Folder or Hub id, revision, type and share of each of its models; likewise."""
    model: str
    """Fingerprint of config and parameters, types and shares of these."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int | None
    """Classes that teacher and student share, where their padding differs."""
    separator_id: int | None
    """The token that keeps the documents of a row apart; None where they see each other."""
    kept: Kept
    temperatures: tuple[float, ...]
    """Temperatures other than 1 whose normaliser is kept, increasing; none of hidden states."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal; JSON-able."""
        tree = asdict(self)
        del tree["teacher"], tree["members"]
        return {**tree, "temperatures": list(self.temperatures)}

    @property
    def key(self) -> str:
        """The name of the store's folder."""
        return hash_json([STORE_FORMAT, self.identity])[:16]

    def serves(self, wanted: "StoreCard") -> bool:
        """Whether records of this card are what another one asks for; more temperatures do no harm."""
        return not self.differences(wanted)

    def differences(self, wanted: "StoreCard") -> list[str]:
        """What keeps records of this card from serving another one: `k 50 (wanted: 100)`."""
        found = []
        own, other = self.identity, wanted.identity
        own_kept, other_kept = own.pop("kept"), other.pop("kept")
        for mine, theirs in ((own, other), (own_kept, other_kept)):
            for name, value in mine.items():
                if value == theirs[name] or (name == "temperatures" and set(theirs[name]) <= set(value)):
                    continue
                found.append(f"{_WORDS.get(name, name)} {_short(value)} (wanted: {_short(theirs[name])})")
        return found


_WORDS = {"model": "teacher", "vocab_size": "classes", "separator_id": "separator between documents"}


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def write_card(folder: Path, card: StoreCard, *, num_classes: int) -> None:
    """Write store.json of a store, unless it is there.

    Args:
        folder: of the store.
        card: what its records are made of.
        num_classes: of the teacher's distributions.

    Raises:
        DataError: the folder cannot be written, or holds another store.
    """
    path = folder / STORE
    if path.exists():
        if read_card(folder) != (replace(card, **_names(folder)), num_classes):
            raise DataError(f"{path} describes another store than its folder's name; delete the folder.")
        return
    tree = {"format": STORE_FORMAT, "num_classes": num_classes, **asdict(card)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(tree, indent=1) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or set capture.folder."
        ) from None


def read_card(folder: Path) -> tuple[StoreCard, int]:
    """The card of a store, and the number of classes of its teacher.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = folder / STORE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != STORE_FORMAT:
            raise DataError(
                f"{path} is of another version of ddkmix, which this one (format {STORE_FORMAT}) cannot "
                "read; capture again, or use the version that wrote it."
            )
        num_classes = tree.pop("num_classes")
        if not isinstance(num_classes, int):
            raise TypeError("num_classes")
        tree["kept"] = Kept(**tree["kept"])
        tree["members"] = tuple(tree["members"])
        tree["temperatures"] = tuple(float(value) for value in tree["temperatures"])
        return StoreCard(**tree), num_classes
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); capture again.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a store.json that ddkmix wrote ({reason}); capture again.") from None


def find_store(folder: Path, wanted: StoreCard) -> Path:
    """The store in a folder of stores that serves a run.

    Args:
        folder: of stores, or of one.
        wanted: what the run asks for.

    Raises:
        DataError: there is none; the message says what the nearest one differs in.
    """
    if (found := serving_store(folder, wanted)) is not None:
        return found
    others = {path: read_card(path)[0].differences(wanted) for path in _stores(folder)}
    if not others:
        raise DataError(f"{folder} holds no logits store; make one with `ddkmix capture CONFIG`.")
    nearest = min(others, key=lambda path: len(others[path]))
    raise DataError(
        f"no logits store in {folder} fits this run; the nearest, {nearest.name}, has "
        f"{', '.join(others[nearest])}. Capture again with `ddkmix capture CONFIG`, or change the config."
    )


def serving_store(folder: Path, wanted: StoreCard) -> Path | None:
    """The store in a folder of stores that serves a run, if there is one.

    Args:
        folder: of stores, or of one.
        wanted: what the run asks for.

    Raises:
        DataError: a store.json is damaged.
    """
    if (folder / wanted.key / STORE).exists() and read_card(folder / wanted.key)[0].serves(wanted):
        return folder / wanted.key
    return next((path for path in _stores(folder) if read_card(path)[0].serves(wanted)), None)


def _stores(folder: Path) -> Sequence[Path]:
    own = [folder] if (folder / STORE).exists() else []
    return own + sorted(path.parent for path in folder.glob(f"*/{STORE}"))


def _names(folder: Path) -> dict[str, Any]:
    """The fields of a written card that are only for people."""
    card = read_card(folder)[0]
    return {field.name: getattr(card, field.name) for field in fields(card)[:2]}
