"""Models as files: found in a folder or on the Hub, and read without loading them."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ddkmix.errors import ConfigError, ModelError
from ddkmix.hub import (
    check_layers,
    common_vocab,
    model_file,
    model_fingerprint,
    optional_model_file,
    parameter_counts,
    read_model_config,
)
from tests.conftest import save_tiny_model


@pytest.fixture
def model(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may change."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, checked to be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# --- finding files ----------------------------------------------------------------------------------


def test_a_file_of_a_local_folder(tiny_teacher: Path) -> None:
    """Its path in the folder."""
    assert tiny_teacher / "config.json" == model_file(str(tiny_teacher), "config.json")


def test_a_file_that_the_folder_lacks(tmp_path: Path) -> None:
    """The message says how to get it."""
    with pytest.raises(ModelError) as info:
        model_file(str(tmp_path), "config.json")
    assert (
        f"{tmp_path} has no config.json; save the model and its tokenizer with save_pretrained."
    ) == one_line(info)


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone/model", "~/gone", "a/b/c", "models/tiny/"])
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(name: str) -> None:
    """What can only be a path is called a missing folder."""
    with pytest.raises(ModelError, match="no such folder; give a local model folder or a Hub id") as info:
        model_file(name, "config.json")
    assert one_line(info).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "not an id", "bad//id", "a/-b-"])
def test_a_hub_model_that_cannot_be_had(name: str) -> None:
    """Offline or not an id: one line with the name and the way out, however long the Hub's own message."""
    with pytest.raises(ModelError) as info:
        model_file(name, "config.json")
    message = one_line(info)
    assert name in message
    assert "give a local" in message


def test_a_hub_model_in_the_cache_needs_no_network(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was downloaded before is found offline, by its revision too."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(tiny_teacher, snapshot)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert snapshot / "config.json" == model_file("owner/name", "config.json")
    assert snapshot / "config.json" == model_file("owner/name", "config.json", revision=commit)
    with pytest.raises(ModelError, match="cannot be had from the Hub"):
        model_file("owner/name", "config.json", revision="v2")


def test_a_file_that_a_model_need_not_have(tiny_teacher: Path, tmp_path: Path) -> None:
    """None where it is not, in a folder or a cache; what is wrong with the name itself is an error still."""
    assert tiny_teacher / "config.json" == optional_model_file(str(tiny_teacher), "config.json")
    assert optional_model_file(str(tiny_teacher), "chat_template.jinja") is None
    assert optional_model_file("owner/name-that-is-not-here", "chat_template.jinja") is None
    with pytest.raises(ModelError, match="no such folder"):
        optional_model_file("./gone", "chat_template.jinja")


# --- configs and fingerprints -----------------------------------------------------------------------


def test_a_config_is_read_as_a_dict(tiny_teacher: Path) -> None:
    """Nothing else is loaded for it."""
    config = read_model_config(str(tiny_teacher))
    assert (320, 2) == (config["vocab_size"], config["num_hidden_layers"])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null"])
def test_what_is_no_config_is_refused(model: Path, content: bytes) -> None:
    """One line with the path."""
    (model / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as info:
        read_model_config(str(model))
    assert f"{model}/config.json is not JSON" in one_line(info)


def test_a_models_fingerprint_follows_its_content(model: Path, tmp_path: Path) -> None:
    """Not its place and not its time; the config, the parameters and further shards."""

    def fingerprint(folder: Path) -> str:
        return model_fingerprint(str(folder), None, tmp_path / "cache")

    expected = fingerprint(model)
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    (copy / "README.md").write_text("not part of the model")
    assert expected == fingerprint(copy)

    (copy / "config.json").write_text((model / "config.json").read_text().replace('"rms_norm', '"x_rms_norm'))
    assert expected != fingerprint(copy)
    shutil.copyfile(model / "config.json", copy / "config.json")
    assert expected == fingerprint(copy)

    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert expected != fingerprint(copy)
    shutil.copyfile(model / "model.safetensors", copy / "model.safetensors")
    shutil.copyfile(model / "model.safetensors", copy / "more.safetensors")
    assert expected != fingerprint(copy)


def test_a_model_without_safetensors_has_no_fingerprint(model: Path, tmp_path: Path) -> None:
    """Pickled parameters are never read."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError) as info:
        model_fingerprint(str(model), None, tmp_path)
    assert f"{model} has no *.safetensors; save it with save_pretrained." == one_line(info)


# --- parameters -------------------------------------------------------------------------------------


def test_parameters_are_counted_from_headers(tiny_teacher: Path) -> None:
    """Name by name as torch counts them; tied embeddings are stored once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    assert {name: p.numel() for name, p in model.named_parameters()} == parameter_counts(str(tiny_teacher))


def test_parameters_of_several_files_are_counted_together(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A model in shards has the parameters of the model in one file."""
    from transformers import AutoModelForCausalLM

    one = save_tiny_model(tmp_path / "one", tokenizer_folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert parameter_counts(str(one)) == parameter_counts(str(tmp_path / "many"))


def test_parameters_that_are_not_here_are_not_counted(model: Path) -> None:
    """A config alone does not say."""
    (model / "model.safetensors").unlink()
    assert parameter_counts(str(model)) is None


@pytest.mark.parametrize("keep", [0, 5, 8, 100])
def test_a_cut_safetensors_file_is_refused(model: Path, keep: int) -> None:
    """A download that broke off gives one line with the path."""
    os.truncate(model / "model.safetensors", keep)
    with pytest.raises(ModelError) as info:
        parameter_counts(str(model))
    assert str(model / "model.safetensors") in one_line(info)


def test_a_header_without_end_is_not_read(model: Path) -> None:
    """Eight bytes that claim a header of exabytes do not cost that much memory."""
    (model / "model.safetensors").write_bytes(b"\xff" * 8 + json.dumps({}).encode())
    with pytest.raises(ModelError):
        parameter_counts(str(model))


# --- layers and vocabularies ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2, 3), (3,)])
def test_layers_that_exist(layers: tuple[int, ...]) -> None:
    """Of a teacher with four layers."""
    check_layers(layers, 4)


@pytest.mark.parametrize("layers", [(4,), (0, 9)])
def test_layers_that_do_not_exist(layers: tuple[int, ...]) -> None:
    """The message shows what was asked and what there is."""
    with pytest.raises(ConfigError) as info:
        check_layers(layers, 4)
    assert f"student.layers = {list(layers)}; the teacher has layers 0 to 3." == one_line(info)


@pytest.mark.parametrize(
    ("expected", "student", "teacher", "tokenizer"),
    [
        (None, 300, 300, 300),
        (None, 320, 320, 300),
        (300, 300, 320, 300),
        (300, 320, 300, 300),
        (304, 304, 320, 300),
    ],
)
def test_heads_share_the_classes_of_the_smaller_one(
    expected: int | None, student: int, teacher: int, tokenizer: int
) -> None:
    """Heads that differ by padding are cut to the shorter; equal ones are left alone."""
    assert expected == common_vocab({"student": student, "teacher": teacher}, tokenizer)


def test_all_heads_are_cut_to_the_smallest_of_many() -> None:
    """Several teachers and a student keep the classes that all of them have."""
    assert common_vocab({"student": 320, "teacher": 320, "teachers.math": 320}, 300) is None
    assert 304 == common_vocab({"student": 320, "teacher": 320, "teachers.math": 304}, 300)


@pytest.mark.parametrize(("who", "student", "teacher"), [("student", 299, 300), ("teacher", 300, 299)])
def test_a_head_smaller_than_the_tokenizer_is_refused(who: str, student: int, teacher: int) -> None:
    """Some tokens would have no class."""
    with pytest.raises(ModelError) as info:
        common_vocab({"student": student, "teacher": teacher}, 300)
    assert one_line(info).startswith(f"the {who} has 299 output classes and the tokenizer 300 tokens; ")
