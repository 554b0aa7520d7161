"""What packing needs of a tokenizer, read from its files: no transformers, no torch, no remote code.

`tokenizer.json` is the whole tokenizer. Two saved copies of one tokenizer can differ in parts that do not
change how text becomes ids (truncation, padding, the template of special tokens), so the fingerprint
leaves those out: it answers "do teacher and student read text alike?".
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkmix.errors import ConfigError, ModelError
from ddkmix.fingerprint import hash_json
from ddkmix.hub import model_file, read_json_object

_NOT_ENCODING = ("version", "truncation", "padding", "post_processor", "decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerCard:
    """A tokenizer as files."""

    name: str
    """Local folder or Hub id that it was read from."""
    path: Path
    """Its tokenizer.json."""
    fingerprint: str
    """Equal for tokenizers that encode alike (SHA-256, hex)."""
    separator: str
    """Token between documents."""
    separator_id: int
    vocab_size: int
    """One more than the largest token id."""


def read_tokenizer(name: str, *, revision: str | None = None, separator: str | None = None) -> TokenizerCard:
    """Find and read a tokenizer.

    Args:
        name: local folder or Hub id.
        revision: Hub revision.
        separator: token to put between documents; the end-of-sequence token when None.

    Raises:
        ModelError: the files are not there or are not a fast tokenizer's.
        ConfigError: the separator is not a token.
    """
    path = model_file(name, "tokenizer.json", revision)
    tree = read_json_object(path)
    try:
        ids = _token_ids(tree)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a tokenizer.json ({error}); save the tokenizer again.") from None
    token = separator or _eos_token(name, revision)
    if token not in ids:
        raise ConfigError(
            f"pack.separator = {token!r} is not a token of {name}; use one of its special tokens: "
            f"{[entry['content'] for entry in tree.get('added_tokens', [])][:8]}."
        )
    return TokenizerCard(
        name=name,
        path=path,
        fingerprint=hash_json({k: v for k, v in tree.items() if k not in _NOT_ENCODING}),
        separator=token,
        separator_id=ids[token],
        vocab_size=max(ids.values()) + 1,
    )


def _token_ids(tree: dict[str, Any]) -> dict[str, int]:
    vocab = tree["model"]["vocab"]
    ids: dict[str, int] = (
        dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    )
    ids.update({entry["content"]: entry["id"] for entry in tree.get("added_tokens", [])})
    return ids


def _eos_token(name: str, revision: str | None) -> str:
    path = model_file(name, "tokenizer_config.json", revision)
    token = read_json_object(path).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise ConfigError(f"{path} names no eos_token; set pack.separator to the token between documents.")
    return token
