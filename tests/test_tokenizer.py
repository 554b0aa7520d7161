"""Tokenizer cards: what decides how text becomes ids, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ddkmix.errors import ConfigError, ModelError
from ddkmix.tokenizer import (
    TokenizerCard,
    check_separator,
    read_tokenizer,
    special_tokens,
    stop_ids,
    token_ids,
)
from tests.conftest import EOS, TEACHER, WORDS

Tree = dict[str, Any]


@pytest.fixture
def tree(tokenizer_folder: Path) -> Tree:
    """The content of the small tokenizer's tokenizer.json."""
    return json.loads((tokenizer_folder / "tokenizer.json").read_text())


def card_of(folder: Path, tree: Any, *, config: Any = None, separator: str | None = None) -> TokenizerCard:
    """The card of a tokenizer with this tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = {"eos_token": EOS} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_tokenizer(str(folder), separator=separator)


def test_a_card_says_what_packing_needs(tokenizer_folder: Path, tree: Tree, tmp_path: Path) -> None:
    """Path, separator and its id, the size of the vocabulary, and where it came from."""
    card = read_tokenizer(str(tokenizer_folder))
    assert str(tokenizer_folder) == card.name
    assert tokenizer_folder / "tokenizer.json" == card.path
    assert (EOS, 0) == (card.separator, card.separator_id)
    assert Tokenizer.from_file(str(card.path)).get_vocab_size() == card.vocab_size == 300
    assert card.fingerprint == card_of(tmp_path / "copy", tree).fingerprint


# --- the fingerprint --------------------------------------------------------------------------------

PADDING = {
    "strategy": {"Fixed": 8},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": EOS,
}


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"padding": PADDING},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}},
        {"post_processor": None},
        {"decoder": None},
        {"version": "2.0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parts_that_do_not_encode_are_left_out_of_the_fingerprint(
    tmp_path: Path, tree: Tree, change: Tree
) -> None:
    """Teacher and student saved with other lengths, padding or templates still read text alike."""
    changed = card_of(tmp_path / "b", {**tree, **change})
    assert card_of(tmp_path / "a", tree).fingerprint == changed.fingerprint


def test_neither_place_nor_layout_is_in_the_fingerprint(tmp_path: Path, tree: Tree) -> None:
    """Keys in another order, another indentation, other neighbours."""
    expected = card_of(tmp_path / "a", tree).fingerprint
    shuffled = {key: tree[key] for key in reversed(tree)}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(shuffled, indent=7))
    assert expected == read_tokenizer(str(tmp_path / "b"), separator=EOS).fingerprint


def with_model(tree: Tree, **changes: Any) -> Tree:
    """A tokenizer whose model has other keys."""
    return {**tree, "model": {**tree["model"], **changes}}


def swapped(vocab: dict[str, int]) -> dict[str, int]:
    """The same tokens; two of them have changed places."""
    return {**vocab, "a": vocab["b"], "b": vocab["a"]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tree: with_model(tree, vocab=swapped(tree["model"]["vocab"])), id="ids"),
        pytest.param(lambda tree: with_model(tree, merges=tree["model"]["merges"][:-1]), id="merges"),
        pytest.param(lambda tree: with_model(tree, merges=tree["model"]["merges"][::-1]), id="merge order"),
        pytest.param(lambda tree: with_model(tree, ignore_merges=True), id="ignore_merges"),
        pytest.param(lambda tree: {**tree, "normalizer": {"type": "NFC"}}, id="normalizer"),
        pytest.param(lambda tree: {**tree, "pre_tokenizer": {"type": "Whitespace"}}, id="pre_tokenizer"),
        pytest.param(lambda tree: {**tree, "added_tokens": []}, id="added_tokens"),
    ],
)
def test_parts_that_encode_change_the_fingerprint(
    tmp_path: Path, tree: Tree, change: Callable[[Tree], Tree]
) -> None:
    """Any of these may give a text other ids."""
    changed = card_of(tmp_path / "b", change(tree), separator="a").fingerprint
    assert card_of(tmp_path / "a", tree, separator="a").fingerprint != changed


def test_the_separator_is_not_in_the_tokenizers_fingerprint(tokenizer_folder: Path) -> None:
    """It is a choice of packing, which fingerprints it beside the tokenizer."""
    default = read_tokenizer(str(tokenizer_folder))
    other = read_tokenizer(str(tokenizer_folder), separator="a")
    assert default.fingerprint == other.fingerprint
    assert default.separator_id != other.separator_id


# --- ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [" ".join(words) for words in WORDS.values()] + ["  中文 😀\n\té\r\n", "don't", "x" * 300]
)
def test_ids_equal_those_of_transformers(tokenizer_folder: Path, text: str) -> None:
    """The file alone gives the ids that a model's own tokenizer gives, and the separator is its eos."""
    from transformers import AutoTokenizer

    card = read_tokenizer(str(tokenizer_folder))
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    ours = Tokenizer.from_file(str(card.path)).encode(text, add_special_tokens=False).ids
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours
    assert theirs.eos_token_id == card.separator_id
    assert len(theirs) == card.vocab_size


# --- the separator ----------------------------------------------------------------------------------


def test_another_separator(tokenizer_folder: Path) -> None:
    """Any token will do."""
    card = read_tokenizer(str(tokenizer_folder), separator="a")
    assert Tokenizer.from_file(str(card.path)).token_to_id("a") == card.separator_id


def test_an_eos_token_that_is_a_dict(tmp_path: Path, tree: Tree) -> None:
    """Older configs write the token with its properties."""
    config = {"eos_token": {"content": EOS, "lstrip": False, "__type": "AddedToken"}}
    assert EOS == card_of(tmp_path, tree, config=config).separator


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": {}}, {"eos_token": 0}])
def test_a_tokenizer_without_eos_needs_a_separator(tmp_path: Path, tree: Tree, config: Any) -> None:
    """The message says which setting to use; with it, the config is not needed."""
    with pytest.raises(ConfigError, match="names no eos_token; set pack"):
        card_of(tmp_path, tree, config=config)
    (tmp_path / "tokenizer_config.json").unlink()
    assert "a" == read_tokenizer(str(tmp_path), separator="a").separator


def test_an_unknown_separator_is_refused(tokenizer_folder: Path) -> None:
    """The message shows the special tokens that there are."""
    with pytest.raises(ConfigError) as info:
        read_tokenizer(str(tokenizer_folder), separator="<eos>")
    assert (
        f"pack.separator = '<eos>' is not a token of {tokenizer_folder}; use one of its special tokens: "
        f"['{EOS}']."
    ) == str(info.value)


def test_added_tokens_count_in_the_vocabulary(tmp_path: Path, tree: Tree) -> None:
    """A token behind the model's own vocabulary makes it larger, gaps included."""
    added = {**tree["added_tokens"][0], "content": "<pad>", "id": 310}
    card = card_of(tmp_path, {**tree, "added_tokens": [*tree["added_tokens"], added]}, separator="<pad>")
    assert (310, 311) == (card.separator_id, card.vocab_size)


def test_a_unigram_vocabulary_is_a_list(tmp_path: Path) -> None:
    """SentencePiece's unigram models list (token, score); the id is the place."""
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]}
    card = card_of(tmp_path, {"version": "1.0", "added_tokens": [], "model": model}, separator="</s>")
    assert (1, 3) == (card.separator_id, card.vocab_size)


# --- files that are missing or wrong ----------------------------------------------------------------


def refusal(name: str) -> str:
    """The message of a tokenizer that cannot be read; checked to be one line."""
    with pytest.raises(ModelError) as info:
        read_tokenizer(name)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A slow tokenizer has no tokenizer.json."""
    assert (
        f"{tmp_path} has no tokenizer.json; save the model and its tokenizer with save_pretrained."
    ) == refusal(str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path, tree: Tree) -> None:
    """The config names the end-of-sequence token."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert f"{tmp_path} has no tokenizer_config.json" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"model": {}}',
        b'{"model": null}',
        b'{"model": {"vocab": null}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [3]}',
    ],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever is wrong with it, one line with the path."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    assert f"{tmp_path}/tokenizer.json is not " in refusal(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, tree: Tree, content: bytes) -> None:
    """One line with the path."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert f"{tmp_path}/tokenizer_config.json" in refusal(str(tmp_path))


# --- separators that no text contains ---------------------------------------------------------------


def test_a_special_token_separates(tokenizer_folder: Path) -> None:
    """Written in a document it is read as text, so every one in a row is a document's end."""
    check_separator(read_tokenizer(str(tokenizer_folder)))


def test_the_teachers_separator_separates() -> None:
    """SmolLM2's, which its pre-training put between documents."""
    if not TEACHER.exists():
        pytest.skip("no teacher here; `make teacher` fetches it (`make test` does)")
    check_separator(read_tokenizer(str(TEACHER), separator=EOS))


def check_refused(card: TokenizerCard, reason: str) -> None:
    """One line with the separator, the reason and special tokens that there are."""
    with pytest.raises(ConfigError, match=reason) as info:
        check_separator(card)
    assert "\n" not in str(info.value)
    assert f"pack.separator = {card.separator!r}" in str(info.value)
    assert "document_boundaries" in str(info.value)


def test_a_word_does_not_separate(tokenizer_folder: Path) -> None:
    """Every document holds it."""
    check_refused(read_tokenizer(str(tokenizer_folder), separator="a"), r"is not a special token.*endoftext")


def test_an_added_token_that_is_not_special_does_not_separate(tmp_path: Path, tree: Tree) -> None:
    """The library reads such tokens in text, whatever it is told about special ones."""
    tree["added_tokens"][0]["special"] = False
    check_refused(card_of(tmp_path, tree), "is not a special token")


def small(model: Tree, separator: str) -> Tree:
    """A tokenizer.json with this model, whose one special token is the separator."""
    added = {"id": model["vocab"][separator], "content": separator, "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    nothing = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [added], "model": model, **dict.fromkeys(nothing)}


def test_a_special_token_that_the_model_can_spell_does_not_separate(tmp_path: Path) -> None:
    """The text </s> is a word of this vocabulary, with the separator's id."""
    tree = small({"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}, "</s>")
    check_refused(card_of(tmp_path, tree, separator="</s>"), r"also reads it in the text '</s>'")


def test_the_token_for_unknown_text_does_not_separate(tmp_path: Path) -> None:
    """Some tokenizers have one token for both; here a character that is not one of eight is the separator."""
    vocab = {"<unk>": 0} | {letter: i for i, letter in enumerate("<unk> ab", start=1)}
    tree = small({"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}, "<unk>")
    check_refused(card_of(tmp_path, tree, separator="<unk>"), r"also reads it in the text '\\x00")


def test_special_tokens_and_all_tokens(tokenizer_folder: Path, tmp_path: Path, tree: Tree) -> None:
    """With their ids; one without a name would stand in every text."""
    card = read_tokenizer(str(tokenizer_folder))
    assert {"<|endoftext|>": 0} == special_tokens(card)
    assert 300 == len(token_ids(card))
    nameless = {"id": 301, "content": "", "special": True}
    tree["added_tokens"] += [nameless, {"id": 302, "content": "<think>", "special": False}]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    changed = replace(card, path=path)
    assert {"<|endoftext|>": 0} == special_tokens(changed)
    assert 302 == token_ids(changed)["<think>"]


def test_the_ends_of_a_response_are_the_named_tokens_or_the_end_of_sequence(
    tree: Tree, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Ids, each once, increasing; what is no token, and a tokenizer that names none, are one line."""
    folder = str(tokenizer_folder)
    a, b = (tree["model"]["vocab"][letter] for letter in "ab")
    assert (0,) == stop_ids(folder, ())
    assert tuple(sorted({0, a, b})) == stop_ids(folder, ("b", "<|endoftext|>", "a", "b"))
    with pytest.raises(ConfigError, match=r"generate\.stop = \['a', 'nix'\]: 'nix' is not a token of"):
        stop_ids(folder, ("a", "nix"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"names no eos_token; set generate\.stop to the token that ends"):
        stop_ids(str(tmp_path), ())
    assert (a,) == stop_ids(str(tmp_path), ("a",))
