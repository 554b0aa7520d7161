"""Which teacher a domain has, from cards and config, and how teachers are told apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import parse_config
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.preflight import check
from ddkmix.teachers import Teachers, find_teachers
from tests.conftest import ConfigTree, save_tiny_model, write_domain

Make = Callable[..., ConfigTree]


def found(tree: ConfigTree) -> Teachers:
    """The teachers of a config tree."""
    config = parse_config(tree, where="test")
    return find_teachers(config, load_domains(config.domains))


def one_line(info: Any) -> str:
    """The message, which is one line."""
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """Three domains, two of whose cards name a teacher."""
    for name, teacher in (("code", None), ("math", "expert"), ("prose", "both")):
        write_domain(tmp_path / "cards", name, shards=1, teacher=teacher)
    return tmp_path / "cards"


@pytest.fixture
def expert(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A second teacher."""
    return save_tiny_model(tmp_path / "expert", tokenizer_folder, seed=5)


@pytest.fixture
def tree(tiny_config: Make, cards: Path, expert: Path) -> ConfigTree:
    """A config with a second teacher and an ensemble of both."""
    teachers = {
        "expert": {"model": str(expert), "dtype": "float32"},
        "both": {"ensemble": {"teacher": 1.0, "expert": 3.0}},
    }
    return tiny_config(domains=[str(cards)], teachers=teachers)


def test_a_config_of_one_teacher_has_it_everywhere(tiny_config: Make) -> None:
    """As before there were several: one model, in every domain."""
    teachers = found(tiny_config())
    assert {"code": "teacher", "math": "teacher", "prose": "teacher"} == teachers.of_domain
    assert {"teacher": {"teacher": 1.0}} == teachers.members
    assert ["teacher"] == list(teachers.models)


def test_a_card_names_the_teacher_of_its_domain(tree: ConfigTree) -> None:
    """The others have the default; weights of an ensemble are normalised."""
    teachers = found(tree)
    assert {"code": "teacher", "math": "expert", "prose": "both"} == teachers.of_domain
    assert {"teacher": 0.25, "expert": 0.75} == teachers.members["both"]
    assert ["teacher", "expert"] == list(teachers.models)
    assert ("prose",) == teachers.domains_of("both")


def test_the_default_can_be_an_ensemble(tiny_config: Make, expert: Path) -> None:
    """Without a word in any card."""
    teachers = {"expert": {"model": str(expert)}, "both": {"ensemble": {"teacher": 1, "expert": 1}}}
    assert {"both"} == set(found(tiny_config(teachers=teachers, default_teacher="both")).of_domain.values())


def test_teachers_that_nobody_has_are_not_wanted(tiny_config: Make, expert: Path) -> None:
    """They are not loaded, nor even looked for."""
    teachers = found(tiny_config(teachers={"x": {"model": "nowhere"}, "expert": {"model": str(expert)}}))
    assert ["teacher"] == list(teachers.models)
    only = found(tiny_config(teachers={"expert": {"model": str(expert)}}, default_teacher="expert"))
    assert ["expert"] == list(only.models)


def test_a_card_with_an_unknown_teacher_is_named(tiny_config: Make, cards: Path) -> None:
    """The card, what it says, and what there is."""
    with pytest.raises(DataError) as info:
        found(tiny_config(domains=[str(cards)], teachers={"experts": {"model": "m"}, "both": {"model": "n"}}))
    expected = (
        f"{cards / 'math.yaml'}: teacher = 'expert' is no entry of the config's `teachers`; did you mean "
        "'experts'?"
    )
    assert expected == one_line(info)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"default_teacher": "maths"}, "default_teacher = 'maths' is no entry of `teachers`; did you mean"),
        (
            {"teachers": {"teacher": {"model": "m"}}},
            "teachers.teacher would be a second 'teacher'; that name",
        ),
        (
            {"teachers": {"a": {"ensemble": {"b": 1}}}},
            "teachers.a.ensemble names 'b', which is no entry of `teachers`; members are models: teacher.",
        ),
        (
            {"teachers": {"a": {"ensemble": {"b": 1}}, "b": {"ensemble": {"teacher": 1}}}},
            "teachers.a.ensemble names 'b', which is an ensemble itself; members are models: teacher.",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(tiny_config: Make, changes: ConfigTree, message: str) -> None:
    """One line each, before anything is loaded."""
    with pytest.raises(ConfigError) as info:
        found(tiny_config(**{"teachers": {"math": {"model": "m"}}, **changes}))
    assert one_line(info).startswith(message)


# --- checks without loading -------------------------------------------------------------------------


def test_all_vocabularies_are_cut_to_the_shortest(
    tmp_path: Path, tree: ConfigTree, tokenizer_folder: Path
) -> None:
    """320, 320 and 308 classes for 300 tokens: 308 are left, as all of them have."""
    other = save_tiny_model(tmp_path / "short", tokenizer_folder, vocab_size=308)
    tree["teachers"]["expert"]["model"] = str(other)
    assert 308 == check(parse_config(tree, where="test")).vocab_size


def test_a_teacher_that_reads_differently_is_refused(
    tmp_path: Path, tree: ConfigTree, tokenizer_folder: Path
) -> None:
    """Rows are packed once; its token ids would mean other text."""
    own = tmp_path / "tokenizer"
    own.mkdir()
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (own / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(tokenizer_folder / "tokenizer_config.json", own)
    tree["teachers"]["expert"]["model"] = str(save_tiny_model(tmp_path / "strange", own))
    with pytest.raises(ModelError, match=r"teachers\.expert .* have different tokenizers \("):
        check(parse_config(tree, where="test"))


def test_a_teacher_with_too_few_positions_is_refused(
    tmp_path: Path, tree: ConfigTree, tokenizer_folder: Path
) -> None:
    """Each teacher reads whole rows."""
    short = save_tiny_model(tmp_path / "short", tokenizer_folder, max_position_embeddings=16)
    tree["teachers"]["expert"]["model"] = str(short)
    with pytest.raises(ConfigError, match=r"seq_len = 32; the teachers\.expert has 16 positions"):
        check(parse_config(tree, where="test"))


# --- fingerprints -----------------------------------------------------------------------------------


def test_fingerprints_tell_teachers_apart_and_nothing_else(
    tree: ConfigTree, tiny_teacher: Path, expert: Path
) -> None:
    """Other parameters, dtype or shares; not the names, the order or the scale of the weights."""

    def prints(**teachers: Any) -> dict[str, str]:
        for name, entry in teachers.items():
            tree["teachers"][name] = entry
        prepared = check(parse_config(tree, where="test"))
        return {domain: prepared.teacher_fingerprint(domain) for domain in ("code", "math", "prose")}

    before = prints()
    assert 3 == len(set(before.values()))
    assert before == prints(both={"ensemble": {"expert": 6.0, "teacher": 2.0}})
    assert before["prose"] != prints(both={"ensemble": {"expert": 6.0, "teacher": 1.0}})["prose"]
    same = prints(expert={"model": str(tiny_teacher), "dtype": "float32"})
    assert before["code"] == same["code"] == same["math"]
    assert before["math"] != prints(expert={"model": str(expert), "dtype": "bfloat16"})["math"]


def test_the_fingerprint_knows_the_classes_and_the_boundaries(tree: ConfigTree) -> None:
    """Whatever else changes what a teacher says about a token."""
    config = parse_config(tree, where="test")
    apart = {**tree, "trainer": {**tree["trainer"], "document_boundaries": True}}
    longer = {**tree, "student": {"init": "config", "overrides": {"vocab_size": 304}}}
    others = [check(parse_config(other, where="test")) for other in (apart, longer)]
    assert 3 == len({prepared.teacher_fingerprint("code") for prepared in (check(config), *others)})
