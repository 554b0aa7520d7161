"""Chat templates: what transformers writes, and nothing that changes from day to day or runs free."""

import json
from pathlib import Path
from typing import Any

import pytest

from ddkmix.errors import ModelError
from ddkmix.prompts.chat import TEMPLATE_FILE, Refused, named_tokens, read_chat_template, render
from tests.conftest import CHAT_TEMPLATE, TEACHER

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


def folder_with(folder: Path, config: dict[str, Any], template: str | None = None) -> str:
    """A tokenizer's folder as far as templates go."""
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template)
    return str(folder)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, checked to be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# --- reading ----------------------------------------------------------------------------------------


def test_a_template_in_the_config(tmp_path: Path) -> None:
    """As most tokenizers have had it."""
    assert "a{{ 1 }}" == read_chat_template(folder_with(tmp_path, {"chat_template": "a{{ 1 }}"}))


def test_a_template_in_its_own_file_comes_first(tmp_path: Path) -> None:
    """As transformers 5 saves it, and reads it."""
    assert "own" == read_chat_template(folder_with(tmp_path, {"chat_template": "config"}, "own"))


def test_one_of_several_templates(tmp_path: Path) -> None:
    """The one called default."""
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert "d" == read_chat_template(folder_with(tmp_path, {"chat_template": several}))


@pytest.mark.parametrize("template", [None, "", 7, [{"name": "rag", "template": "r"}]])
def test_no_template(tmp_path: Path, template: object) -> None:
    """One line with both ways out."""
    name = folder_with(tmp_path, {"chat_template": template})
    with pytest.raises(ModelError) as info:
        read_chat_template(name)
    assert (
        f"{name} has no chat template (neither chat_template.jinja nor chat_template in "
        "tokenizer_config.json); use a tokenizer that has one, or name plain fields in the card: "
        "prompt_response: {prompt: ..., response: ...}."
    ) == one_line(info)


def test_named_tokens(tmp_path: Path) -> None:
    """Strings, and the objects that transformers once wrote; what is not there is left out."""
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    assert {"bos_token": "<s>", "eos_token": "</s>"} == named_tokens(folder_with(tmp_path, config))


# --- rendering --------------------------------------------------------------------------------------

LLAMA = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set day = 'today' %}{%- else %}"
    "{%- set day = '26 Jul 2024' %}{%- endif %}{{ day }}\n"
    "{% for message in messages %}\n    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "{{ message.content | trim }}{{ eos_token }}\n{%- endfor %}"
)
GENERATION = (
    "{%- set ns = namespace(seen=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% set ns.seen = true %}{% else %}"
    "{{ m | tojson }}{% endif %}{% endfor %}{{ ns.seen }}{{ dict(a=1)['a'] }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION])
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [[QUESTION], [SYSTEM, QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION]])
def test_what_transformers_writes(
    template: str, generation_prompt: bool, messages: list[dict[str, str]]
) -> None:
    """The same text from transformers' own function."""
    from transformers.utils.chat_template_utils import render_jinja_template

    ((expected,), _) = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=generation_prompt,
        bos_token="<s>",
    )
    assert expected == render(template, messages, {"bos_token": "<s>"}, generation_prompt=generation_prompt)


def test_the_template_of_the_real_teacher() -> None:
    """As its tokenizer writes a conversation."""
    if not (TEACHER / "tokenizer.json").exists():
        pytest.skip("make teacher fetches it")
    from transformers import AutoTokenizer

    messages = [QUESTION, ANSWER, QUESTION]
    expected = AutoTokenizer.from_pretrained(TEACHER).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    template, tokens = read_chat_template(str(TEACHER)), named_tokens(str(TEACHER))
    assert expected == render(template, messages, tokens, generation_prompt=True)


def test_no_template_writes_today() -> None:
    """Its own date instead; and loop controls, `trim` and white space are as in transformers."""
    messages = [SYSTEM, QUESTION, ANSWER]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    text = render(LLAMA, messages, tokens, generation_prompt=False)
    assert "<s>26 Jul 2024\nWhy?</s>Because.</s>" == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system\nrole') }}", "no system role"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "a namespace has no _x"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "a namespace has no __class__"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ dict.mro() }}", "no attribute"),
    ],
)
def test_what_a_template_may_not_do(template: str, reason: str) -> None:
    """It is refused with Jinja's reason, in one line."""
    with pytest.raises(Refused) as info:
        render(template, [dict(QUESTION)], {}, generation_prompt=False)
    assert reason in one_line(info)
