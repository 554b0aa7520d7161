"""What a store of responses was made of: the card that says whom they are of, and how stores are found.

A store is a folder named after everything that its responses depend on but the rows: the model, the tokens
that it may use and stop at, how they are chosen, and the shape of its forward passes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddkmix.errors import DataError
from ddkmix.fingerprint import hash_json, write_atomically

STORE = "store.json"
STORE_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseCard:
    """Everything that responses depend on, but the rows."""

    by: str
    """Whose they are, in the words of a config; only for people to read."""
    name: str
    """Folder or Hub id of the model; likewise."""
    model: str
    """Fingerprint of its config and parameters, and of their type."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    num_classes: int
    """Tokens that may be chosen; what the model has behind them is padding."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response, increasing."""
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    block_rows: int
    """Rows in a forward pass."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal; JSON-able. Settings without effect are None."""
        tree = asdict(self)
        del tree["by"], tree["name"]
        if self.temperature == 0:
            tree |= {"top_k": None, "top_p": None, "seed": None}
        return {**tree, "stop_ids": list(self.stop_ids)}

    @property
    def key(self) -> str:
        """The name of the store's folder."""
        return hash_json([STORE_FORMAT, self.identity])[:16]

    def differences(self, wanted: "ResponseCard") -> list[str]:
        """What keeps responses of this card from being those of another: `seed 1 (wanted: 0)`."""
        own, other = self.identity, wanted.identity
        return [
            f"{name} {_short(value)} (wanted: {_short(other[name])})"
            for name, value in own.items()
            if value != other[name]
        ]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def write_card(folder: Path, card: ResponseCard) -> None:
    """Write store.json of a store, unless it is there.

    Args:
        folder: of the store.
        card: what its responses are made of.

    Raises:
        DataError: the folder cannot be written, or holds another store.
    """
    path = folder / STORE
    if path.exists():
        if read_card(folder).identity != card.identity:
            raise DataError(f"{path} describes another store than its folder's name; delete the folder.")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": STORE_FORMAT, **asdict(card)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or set generate.folder."
        ) from None


def read_card(folder: Path) -> ResponseCard:
    """The card of a store.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = folder / STORE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != STORE_FORMAT:
            raise DataError(
                f"{path} is of another version of ddkmix, which this one (format {STORE_FORMAT}) cannot "
                "read; generate again, or use the version that wrote it."
            )
        return ResponseCard(**{**tree, "stop_ids": tuple(int(token) for token in tree["stop_ids"])})
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); generate again.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a store.json that ddkmix wrote ({reason}); generate again.") from None


def find_store(folder: Path, wanted: ResponseCard) -> Path:
    """The store of a card in a folder of stores.

    Args:
        folder: of stores, each with the name of its card's key.
        wanted: whose responses, and how chosen.

    Raises:
        DataError: it is not there; the message says what the nearest one differs in.
    """
    found = folder / wanted.key
    if (found / STORE).exists() and read_card(found).identity == wanted.identity:
        return found
    cards = {path.parent: _card_or_none(path.parent) for path in sorted(folder.glob(f"*/{STORE}"))}
    others: Mapping[Path, list[str]] = {
        path: card.differences(wanted) for path, card in cards.items() if card is not None
    }
    if not others:
        command = f"ddkmix generate CONFIG --by {wanted.by}"
        raise DataError(f"{folder} holds no responses; make them with `{command}`.")
    nearest = min(others, key=lambda path: len(others[path]))
    differences = ", ".join(others[nearest]) or "the right card, but not its name"
    raise DataError(
        f"no responses in {folder} are of the {wanted.by} of this run; the nearest, {nearest.name}, have "
        f"{differences}. Generate them with `ddkmix generate CONFIG --by {wanted.by}`, or change the config."
    )


def _card_or_none(folder: Path) -> ResponseCard | None:
    """A damaged neighbour is not what the message is about."""
    try:
        return read_card(folder)
    except DataError:
        return None
