"""What packing needs of a tokenizer, read from its files: no transformers, no torch, no remote code.

`tokenizer.json` is the whole tokenizer. Two saved copies of one tokenizer can differ in parts that do not
change how text becomes ids (truncation, padding, the template of special tokens), so the fingerprint
leaves those out: it answers "do teacher and student read text alike?".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkmix.errors import ConfigError, ModelError
from ddkmix.fingerprint import hash_json
from ddkmix.hub import model_file, read_json_object

_STRANGE = "\x00 \U000e0001 \U0010fffd \u0378"
"""Characters that a vocabulary without bytes does not have."""
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
    revision: str | None = None
    """Hub revision."""


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
        fingerprint=_fingerprint(tree),
        separator=token,
        separator_id=ids[token],
        vocab_size=max(ids.values()) + 1,
        revision=revision,
    )


def tokenizer_fingerprint(name: str, revision: str | None = None) -> str:
    """`TokenizerCard.fingerprint` of a model's tokenizer, whatever its separator.

    Raises:
        ModelError: the files are not there or are not a fast tokenizer's.
    """
    return _fingerprint(read_json_object(model_file(name, "tokenizer.json", revision)))


def token_ids(tokenizer: TokenizerCard) -> dict[str, int]:
    """Every token of a tokenizer, as it is written, with its id."""
    return _token_ids(read_json_object(tokenizer.path))


def special_tokens(tokenizer: TokenizerCard) -> dict[str, int]:
    """The tokens that no ordinary text is made of, with their ids, in the tokenizer's order."""
    added = read_json_object(tokenizer.path).get("added_tokens", [])
    return {entry["content"]: entry["id"] for entry in added if entry.get("special") and entry["content"]}


def stop_ids(name: str, tokens: Sequence[str], revision: str | None = None) -> tuple[int, ...]:
    """The ids of the tokens that end a response, increasing.

    Args:
        name: local folder or Hub id of a model.
        tokens: of its tokenizer; the end-of-sequence token when there are none.
        revision: Hub revision.

    Raises:
        ModelError: the tokenizer's files are not there.
        ConfigError: something is no token, or nothing is named and there is no end-of-sequence token.
    """
    ids = _token_ids(read_json_object(model_file(name, "tokenizer.json", revision)))
    wanted = tokens or (_eos_token(name, revision, "generate.stop to the token that ends a response"),)
    for token in wanted:
        if token not in ids:
            raise ConfigError(
                f"generate.stop = {list(tokens)}: {token!r} is not a token of {name}; name the token that "
                "its template puts behind a response."
            )
    return tuple(sorted({ids[token] for token in wanted}))


def check_separator(tokenizer: TokenizerCard) -> None:
    """Check that no text contains the separator, so that each one in a row is a document's end.

    Special tokens written in a document are read as text; a word of the vocabulary is not, a Unigram model
    may spell even a special token, and some tokenizers use the end-of-sequence token for unknown text.

    Raises:
        ConfigError: it is no special token, or a text contains it.
    """
    from tokenizers import Tokenizer

    special = list(special_tokens(tokenizer))
    separator = tokenizer.separator
    if separator not in special:
        raise ConfigError(
            f"pack.separator = {separator!r} is not a special token of {tokenizer.name}; "
            f"trainer.document_boundaries needs one, which no text contains: {special[:8]}."
        )
    library = Tokenizer.from_file(str(tokenizer.path))
    library.encode_special_tokens = True
    for text in (separator, f" {separator} ", f"a{separator}b", _STRANGE):
        if tokenizer.separator_id in library.encode(text, add_special_tokens=False).ids:
            raise ConfigError(
                f"pack.separator = {separator!r}: {tokenizer.name} also reads it in the text {text!r}, so "
                "trainer.document_boundaries cannot tell where documents begin; use another special token: "
                f"{special[:8]}."
            )


def _fingerprint(tree: dict[str, Any]) -> str:
    return hash_json({k: v for k, v in tree.items() if k not in _NOT_ENCODING})


def _token_ids(tree: dict[str, Any]) -> dict[str, int]:
    vocab = tree["model"]["vocab"]
    ids: dict[str, int] = (
        dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    )
    ids.update({entry["content"]: entry["id"] for entry in tree.get("added_tokens", [])})
    return ids


def _eos_token(
    name: str, revision: str | None, setting: str = "pack.separator to the token between documents"
) -> str:
    path = model_file(name, "tokenizer_config.json", revision)
    token = read_json_object(path).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise ConfigError(f"{path} names no eos_token; set {setting}.")
    return token
