"""How a tokenizer ends a turn, found before anything is packed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddkmix.card import PromptResponse
from ddkmix.errors import ConfigError, DdkmixError, ModelError
from ddkmix.prompts import PromptFormat, find_format
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import CHAT_TEMPLATE, EOS

MESSAGES: dict[str, Any] = {"messages": "m"}
FIELDS: dict[str, Any] = {"prompt": "q", "response": "a"}
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def format_of(folder: Path, card: dict[str, Any], **config: Any) -> PromptFormat:
    """The format of a card with a tokenizer whose config is changed so."""
    path = folder / "tokenizer_config.json"
    tree = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    tokenizer = read_tokenizer(str(folder), separator=EOS)
    return find_format(PromptResponse.model_validate(card), tokenizer, where="card.yaml")


@pytest.fixture
def folder(chat_tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy of the chat tokenizer that a test may change."""
    return Path(shutil.copytree(chat_tokenizer_folder, tmp_path / "tokenizer"))


def test_the_end_of_a_turn_is_what_the_template_writes(folder: Path) -> None:
    """And not the end of a sequence, which base models have as well."""
    found = format_of(folder, MESSAGES, eos_token=EOS)
    assert ("<|im_end|>", 301, None) == (found.end_of_turn, found.end_of_turn_id, found.tail)
    assert {EOS: 0, "<|im_start|>": 300, "<|im_end|>": 301} == found.special_tokens


def test_the_end_of_a_plain_response_is_that_of_a_sequence(folder: Path) -> None:
    """A template that is not asked for need not be there."""
    found = format_of(folder, FIELDS, eos_token=EOS, chat_template=None)
    assert (EOS, 0, None) == (found.end_of_turn, found.end_of_turn_id, found.chat_template)


@pytest.mark.parametrize("card", [MESSAGES, FIELDS])
def test_the_card_names_another(folder: Path, card: dict[str, Any]) -> None:
    """And it is the one."""
    found = format_of(folder, {**card, "end_of_turn": "<|im_start|>"}, eos_token=EOS)
    assert ("<|im_start|>", 300) == (found.end_of_turn, found.end_of_turn_id)


def test_a_template_without_an_end_of_turn(folder: Path) -> None:
    """One line; with a name in the card, what the template writes instead is known."""
    with pytest.raises(ConfigError) as info:
        format_of(folder, MESSAGES, chat_template=NO_END)
    assert (
        f"card.yaml: the chat template of {folder} ends an answer with '\\n', which has no special token, so "
        "a model could not say that it has finished; name one under prompt_response: end_of_turn: "
        "['<|endoftext|>', '<|im_start|>', '<|im_end|>']."
    ) == str(info.value)
    found = format_of(folder, {**MESSAGES, "end_of_turn": "<|im_end|>"})
    assert ("<|im_end|>", "\n") == (found.end_of_turn, found.tail)


def test_the_first_of_several_tokens_ends_a_turn(folder: Path) -> None:
    """Some templates end turn and sequence; a model stops at the first."""
    template = CHAT_TEMPLATE.replace("<|im_end|>", f"<|im_end|>{EOS}")
    assert "<|im_end|>" == format_of(folder, MESSAGES, chat_template=template).end_of_turn
    template = CHAT_TEMPLATE.replace("<|im_end|>", f"{EOS}<|im_end|>")
    assert format_of(folder, MESSAGES, chat_template=template).end_of_turn == EOS


def test_an_end_of_sequence_that_is_not_special(folder: Path) -> None:
    """It counts where the template writes it."""
    template = NO_END.replace("\n", "the")
    assert "the" == format_of(folder, MESSAGES, chat_template=template, eos_token="the").end_of_turn


@pytest.mark.parametrize(
    ("card", "config", "kind", "message"),
    [
        ({**FIELDS, "end_of_turn": "<x>"}, {}, ConfigError, "end_of_turn = '<x>' is not a token of"),
        ({**MESSAGES, "end_of_turn": "<x>"}, {}, ConfigError, "end_of_turn = '<x>' is not a token of"),
        ({**FIELDS, "end_of_turn": "the"}, {}, ConfigError, "end_of_turn = 'the' is not a special token of"),
        ({**MESSAGES, "end_of_turn": "the"}, {}, ConfigError, "end_of_turn = 'the' is not a special token"),
        (FIELDS, {"eos_token": None}, ConfigError, "names no eos_token to end a response with"),
        (MESSAGES, {"chat_template": None}, ModelError, "has no chat template"),
        (MESSAGES, {"chat_template": "{% for %}"}, ModelError, "cannot write a question and its answer"),
        (MESSAGES, {"chat_template": "{{ raise_exception('no') }}"}, ModelError, "(no)"),
        (
            MESSAGES,
            {"chat_template": "{{ messages|length }}"},
            ModelError,
            "does not tell what a response is",
        ),
        (MESSAGES, {"chat_template": "hello"}, ModelError, "does not tell what a response is"),
    ],
)
def test_mistakes(
    folder: Path, card: dict[str, Any], config: dict[str, Any], kind: type[DdkmixError], message: str
) -> None:
    """Each is one line."""
    if config.get("eos_token", "") is None:  # else nothing reads the tokenizer
        folder.joinpath("tokenizer_config.json").write_text('{"chat_template": "x"}')
        config = {}
    with pytest.raises(kind) as info:
        format_of(folder, card, **config)
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_the_same_files_give_the_same_plain_values(folder: Path) -> None:
    """Which change with the template, and go into fingerprints as JSON."""
    one, other = format_of(folder, MESSAGES), format_of(folder, MESSAGES)
    assert json.dumps(one.to_json()) == json.dumps(other.to_json())
    changed = format_of(folder, MESSAGES, chat_template="Hi! " + CHAT_TEMPLATE)
    assert one.to_json() != changed.to_json()
