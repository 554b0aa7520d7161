"""Loading, pruning, splitting and saving models, on tiny ones of several architectures."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from ddkmix.config import Student, Teacher
from ddkmix.errors import ConfigError, ModelError
from ddkmix.models import (
    backbone_of,
    build_student,
    head_of,
    hidden_states,
    load_model,
    load_teacher,
    prune_depth,
    save_student,
)
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import save_tiny_model

LAYERS = 6
IDS = torch.arange(20)[None].mul(7).remainder(60)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
    "eos_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SMALL | {"tie_word_embeddings": False}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, SMALL | {"tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    # layers 0 and 1 see everything, the others four tokens
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    # every other layer sees four tokens; logits are soft-capped
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        SMALL | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    ),
    "cohere": (CohereForCausalLM, CohereConfig, SMALL | {"logit_scale": 0.0625}),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, SMALL | {"sliding_window": 4}),
    "granite": (GraniteForCausalLM, GraniteConfig, SMALL | {"logits_scaling": 4.0}),
    # layer 3 has no rotary embedding
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, SMALL),
}


def make(name, **changes):
    """A random model of an architecture."""
    model_class, config_class, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    return model_class(config_class(**settings, **changes)).eval()


@torch.no_grad()
def logits_of(model):
    """Logits of a model in evaluation mode."""
    return model.eval()(IDS, use_cache=False).logits


# --- the split into backbone and head ---------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backbone_and_head_give_the_models_own_logits(name):
    """Tied or not, scaled by a factor or its inverse, soft-capped: the split is exact."""
    model = make(name)
    head = head_of(model)
    with torch.no_grad():
        raw = F.linear(hidden_states(model, IDS)[0], head.weight, head.bias)
        torch.testing.assert_close(logits_of(model)[0], head.finish(raw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [("llama", 1.0, None), ("gemma2", 1.0, 2.0), ("cohere", 0.0625, None), ("granite", 0.25, None)],
)
def test_what_a_model_does_to_its_logits_is_read_from_its_config(name, scale, softcap):
    """logit_scale multiplies, logits_scaling divides, final_logit_softcapping caps."""
    head = head_of(make(name))
    assert (scale, softcap) == (head.scale, head.softcap)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_the_head_holds_the_models_own_parameters(name):
    """Not copies: gradients reach the model, through tied embeddings too."""
    model = make(name)
    assert head_of(model).weight is model.get_output_embeddings().weight
    assert (name != "llama") == (head_of(model).weight is model.get_input_embeddings().weight)


def test_the_number_of_classes_is_passed_on():
    """The cut itself happens where logits are made."""
    assert [None, 50] == [head_of(make("llama")).vocab_size, head_of(make("llama"), 50).vocab_size]


def test_hidden_states_come_after_the_final_norm():
    """(B, T, D), and what the output layer reads."""
    model = make("llama")
    assert (1, 20, 32) == hidden_states(model, IDS).shape
    assert isinstance(backbone_of(model), nn.Module)
    assert backbone_of(model) is model.model


class Shifted(LlamaForCausalLM):
    """A model that adds to its logits behind everybody's back."""

    def forward(self, *args, **kwargs):
        """Logits plus a ramp."""
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class Stretched(CohereForCausalLM):
    """A model with tiny logits and a factor of its own on them."""

    def forward(self, *args, **kwargs):
        """Logits times 1.1."""
        output = super().forward(*args, **kwargs)
        output.logits = 1.1 * output.logits
        return output


class Headless(LlamaForCausalLM):
    """A model that does not say what its output layer is."""

    def get_output_embeddings(self):
        """Nothing."""


def test_a_model_that_changes_its_logits_is_refused():
    """The split is checked on every model; one that does not hold is an error, not another loss."""
    model = Shifted(LlamaConfig(**SMALL)).eval()
    with pytest.raises(ModelError, match=r"^Shifted: hidden states and output layer give logits that differ"):
        head_of(model)
    assert 1.0 == head_of(model, check=False).scale


def test_the_check_is_relative_to_the_logits():
    """A factor of 1.1 is found where logits are of the order of 0.001 too."""
    model = Stretched(CohereConfig(**SMALL | {"initializer_range": 0.02, "logit_scale": 0.001})).eval()
    assert logits_of(model).abs().max() < 0.01
    with pytest.raises(ModelError, match=r"^Stretched: hidden states and output layer give logits"):
        head_of(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_check_allows_for_bfloat16(name):
    """A teacher in bfloat16 is split as one in float32 is."""
    assert head_of(make(name).to(torch.bfloat16)).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["logit_scale", "final_logit_softcapping"])
def test_a_config_that_says_what_its_model_does_not_do_is_refused(field):
    """A Llama whose config carries another architecture's field would be split wrongly."""
    model = make("llama")
    setattr(model.config, field, 0.5)
    with pytest.raises(ModelError, match="it changes its logits in a way that ddkmix does not know"):
        head_of(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_parameters_are_refused(value):
    """A model that gives no numbers is named as such, not as one that ddkmix cannot split."""
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ModelError, match="LlamaForCausalLM gives logits that are not finite"):
        head_of(model)


def test_a_model_without_an_output_layer_is_refused():
    """Without one there is nothing to make logits of."""
    with pytest.raises(ModelError, match="Headless has no linear output layer"):
        head_of(Headless(LlamaConfig(**SMALL)))


def test_the_check_leaves_the_model_as_it_was():
    """Training mode stays on, and nothing has a gradient."""
    model = make("llama").train()
    head_of(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# --- pruning ----------------------------------------------------------------------------------------


def cut_by_hand(model, layers):
    """A deep copy whose list of layers has been cut, with the config that goes with it."""
    model = copy.deepcopy(model)
    body = model.base_model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, nn.ModuleList([getattr(body, name)[i] for i in layers]))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(model.config, key, None):
            setattr(model.config, key, [getattr(model.config, key)[i] for i in layers])
    model.config.num_hidden_layers = len(layers)
    for number, layer in enumerate(getattr(body, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return model


@pytest.mark.parametrize("layers", [(1, 3, 4), (0,), (5,), tuple(range(LAYERS))], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pruned_model_is_the_one_with_only_these_layers(name, layers):
    """Its logits are those of the model whose other layers were taken out by hand: kinds of layers too."""
    model = make(name)
    pruned = prune_depth(model, layers)
    torch.testing.assert_close(logits_of(cut_by_hand(model, layers)), logits_of(pruned), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_pruned_model_has_exactly_the_parameters_of_its_layers(name):
    """Renumbered from 0 and equal bit for bit; everything outside the layers is copied."""
    model, layers = make(name), (1, 4)
    prefix = "transformer.h." if name == "gpt2" else "model.layers."
    expected = {}
    for key, value in model.state_dict().items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix):
            expected[key] = value
        elif int(number) in layers:
            expected[f"{prefix}{layers.index(int(number))}.{rest}"] = value
    actual = prune_depth(model, layers).state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[key]) for key, value in expected.items())


def test_pruning_leaves_the_model_and_its_parameters_alone():
    """The teacher is not changed by the student made of it: the copy is a copy."""
    model = make("llama")
    before = logits_of(model)
    pruned = prune_depth(model, (0, 1))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert LAYERS == model.config.num_hidden_layers
    assert torch.equal(before, logits_of(model))


def test_lists_that_are_as_long_as_the_layers_by_chance_stay():
    """Six end-of-sequence tokens in a model of six layers are still six."""
    model = make("llama")
    model.config.eos_token_id = list(range(LAYERS))
    assert list(range(LAYERS)) == prune_depth(model, (0, 1)).config.eos_token_id


@pytest.mark.parametrize("layers", [(6,), (0, 17)])
def test_a_layer_that_does_not_exist_is_one_line(layers):
    """The list, and which layers there are."""
    with pytest.raises(ConfigError) as error:
        prune_depth(make("llama"), layers)
    assert f"student.layers = {list(layers)}; the teacher has layers 0 to 5." == str(error.value)


class TwoStacks(LlamaForCausalLM):
    """A model with a second list of modules that is as long as its layers."""

    def __init__(self, config):
        """Adapters beside the layers."""
        super().__init__(config)
        self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(config.num_hidden_layers))


def test_an_architecture_whose_layers_cannot_be_told_apart_is_refused():
    """Two numbered lists of the right length: which of them are the layers?"""
    with pytest.raises(ModelError) as error:
        prune_depth(TwoStacks(LlamaConfig(**SMALL)), (0,))
    assert "the 6 layers are numbered under ['model.layers.', 'adapters.']" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_architecture_whose_layers_cannot_be_found_is_refused():
    """A config that promises more layers than there are."""
    model = make("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"the 7 layers are numbered under \['model.layers.'\]"):
        prune_depth(model, (0,))


# --- loading ----------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_in_the_type_that_was_asked_for(tiny_teacher):
    """No gradients, evaluation mode, bfloat16 by default."""
    model = load_teacher(Teacher(model=str(tiny_teacher)))
    assert not model.training
    assert {(torch.bfloat16, False)} == {(p.dtype, p.requires_grad) for p in model.parameters()}


@pytest.fixture
def broken(tmp_path, tiny_teacher):
    """A function that copies the tiny teacher and lets somebody damage the copy."""

    def make_broken(damage):
        folder = tmp_path / "broken"
        shutil.copytree(tiny_teacher, folder)
        damage(folder)
        return folder

    return make_broken


def change_config(folder, **changes):
    """Set keys of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_files(folder):
    """The parameters are gone."""
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    """The file of parameters ends too early."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_one_parameter(folder):
    """One tensor is missing; transformers would fill it with random numbers and a warning."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_wrong_shape(folder):
    """One tensor is of another model."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_an_unknown_kind(folder):
    """An architecture that transformers does not have."""
    change_config(folder, model_type="no_such_architecture")


def without_a_config(folder):
    """No config.json."""
    (folder / "config.json").unlink()


def with_a_config_that_is_no_json(folder):
    """A config.json that was cut short."""
    (folder / "config.json").write_text('{"model_type":')


DAMAGES = (
    without_files, cut_short, without_one_parameter, with_a_wrong_shape, of_an_unknown_kind, without_a_config,
    with_a_config_that_is_no_json,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_model_that_cannot_be_loaded_whole_is_one_line(broken, damage):
    """Missing or cut files, missing or foreign parameters, an unknown kind: one line with the folder."""
    folder = broken(damage)
    with pytest.raises(ModelError) as error:
        load_model(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_missing_parameter_is_named(broken):
    """A teacher with a random layer would teach noise; the message says what is missing."""
    folder = broken(without_one_parameter)
    with pytest.raises(
        ModelError, match=r"lacks 1 parameters of LlamaForCausalLM, such as model.layers.1.mlp"
    ):
        load_model(str(folder))


class Touch:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path: Path):
        """The file to write."""
        self.path = path

    def __reduce__(self):
        """What unpickling calls."""
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(broken, tmp_path):
    """A folder that has only pytorch_model.bin is refused, and what is in it is not run."""
    trap = tmp_path / "trap"

    def only_a_pickle(folder):
        without_files(folder)
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(trap)))

    folder = broken(only_a_pickle)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(str(folder))
    assert not trap.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trap.exists()  # the trap works


def test_a_sound_pickle_is_refused_too(broken):
    """The very parameters in pytorch_model.bin: what is not safetensors is not opened at all."""

    def as_a_pickle(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        without_files(folder)

    with pytest.raises(ModelError, match=r"no file named model.safetensors"):
        load_model(str(broken(as_a_pickle)))


def test_no_code_of_a_model_is_run_and_nobody_is_asked(broken, tmp_path, monkeypatch, capfd):
    """A folder that brings its own code is refused, even if somebody would answer yes."""
    trap = tmp_path / "trap"

    def with_code(folder):
        (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')\n")
        change_config(
            folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
        )

    folder = broken(with_code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(ModelError):
        load_model(str(folder))
    teacher = Teacher(model=str(folder))
    with pytest.raises(ModelError, match="custom code"):
        build_student(Student(init="config"), teacher, seed=0)
    assert not trap.exists()
    assert "custom code? [y/N]" not in "".join(capfd.readouterr())


# --- the student ------------------------------------------------------------------------------------


def parameters_of(model):
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("init", ["prune", "config", "load"])
def test_every_student_is_in_float32_and_trains(init, tiny_teacher, tmp_path, tokenizer_folder):
    """Whatever the teacher's type, and however the student is made."""
    other = save_tiny_model(tmp_path / "other", tokenizer_folder, seed=3, dtype="bfloat16")
    config = Student(init=init, layers=(1,) if init == "prune" else None, model=str(other))
    student = build_student(config, Teacher(model=str(tiny_teacher)), seed=0)
    assert student.training
    assert {(torch.float32, True)} == {(p.dtype, p.requires_grad) for p in student.parameters()}


def test_a_loaded_student_is_the_model_that_was_named(tiny_teacher, tmp_path, tokenizer_folder):
    """`load` takes another model as it is."""
    other = save_tiny_model(tmp_path / "other", tokenizer_folder, seed=3)
    student = build_student(Student(init="load", model=str(other)), Teacher(model=str(tiny_teacher)), seed=0)
    assert torch.equal(parameters_of(load_model(str(other))), parameters_of(student))


def test_a_pruned_student_comes_from_the_teacher(tiny_teacher):
    """`prune` keeps the layers of the config."""
    teacher = Teacher(model=str(tiny_teacher))
    student = build_student(Student(init="prune", layers=(1,)), teacher, seed=0)
    expected = cut_by_hand(load_model(str(tiny_teacher)), (1,))
    torch.testing.assert_close(logits_of(expected), logits_of(student))


def test_a_student_from_a_config_depends_on_the_seed_alone(tiny_teacher):
    """The same seed gives the same parameters whatever was drawn before; another seed gives others."""
    teacher = Teacher(model=str(tiny_teacher))
    students = []
    for seed, noise in ((0, 0), (0, 17), (1, 0)):
        torch.manual_seed(noise)
        students.append(parameters_of(build_student(Student(init="config"), teacher, seed=seed)))
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_building_a_student_from_a_config_moves_no_random_state(tiny_teacher):
    """The run's own random numbers are the same with every kind of student."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_student(Student(init="config"), Teacher(model=str(tiny_teacher)), seed=0)
    assert torch.equal(expected, torch.rand(3))


def test_overrides_change_the_config(tiny_teacher):
    """Fewer layers, another width; everything else is the teacher's."""
    overrides = {"num_hidden_layers": 1, "intermediate_size": 40, "rms_norm_eps": 0.001}
    student = build_student(
        Student(init="config", overrides=overrides), Teacher(model=str(tiny_teacher)), seed=0
    )
    config = student.config
    assert overrides == {name: getattr(config, name) for name in overrides}
    assert (32, 320) == (config.hidden_size, config.vocab_size)
    assert 1 == len(student.model.layers)
    assert 40 == student.model.layers[0].mlp.up_proj.out_features


def test_the_base_config_can_come_from_another_model(tiny_teacher, tmp_path, tokenizer_folder):
    """`model` names it; its parameters are not taken."""
    other = save_tiny_model(tmp_path / "other", tokenizer_folder, seed=3, intermediate_size=72)
    config = Student(init="config", model=str(other))
    student = build_student(config, Teacher(model=str(tiny_teacher)), seed=0)
    assert 72 == student.config.intermediate_size
    assert not torch.equal(parameters_of(load_model(str(other))), parameters_of(student))


@pytest.mark.parametrize("num_layers", [2, 9])
def test_lists_of_the_config_follow_the_number_of_layers(tmp_path, num_layers):
    """Layer kinds repeat in their pattern when there are more layers, and end early when there are fewer."""
    make("gemma2").save_pretrained(tmp_path / "gemma")
    student = build_student(
        Student(init="config", model=str(tmp_path / "gemma"), overrides={"num_hidden_layers": num_layers}),
        Teacher(model="unused"),
        seed=0,
    )
    pattern = ["sliding_attention", "full_attention"] * 5
    assert pattern[:num_layers] == student.config.layer_types
    assert (1, 20, 64) == logits_of(student).shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 3}, "student.overrides.hiden_size is not a field of LlamaConfig."),
        ({"hidden_size": "wide"}, "student.overrides = {'hidden_size': 'wide'} make no LlamaConfig: "),
        ({"hidden_size": 30}, "student.overrides = {'hidden_size': 30} make no LlamaConfig: "),
        (
            {"num_hidden_layers": "six"},
            "student.overrides = {'num_hidden_layers': 'six'} make no LlamaConfig",
        ),
        ({"hidden_act": "nope"}, "student.overrides = {'hidden_act': 'nope'} make no LlamaConfig: 'nope'"),
    ],
)
def test_an_override_that_makes_no_model_is_one_line(tiny_teacher, overrides, message):
    """An unknown field, a wrong type, sizes that do not fit."""
    config = Student(init="config", overrides=overrides)
    with pytest.raises(ConfigError) as error:
        build_student(config, Teacher(model=str(tiny_teacher)), seed=0)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# --- saving -----------------------------------------------------------------------------------------


def test_a_saved_student_is_what_transformers_loads(tiny_teacher, tmp_path):
    """AutoModelForCausalLM gives the same logits, AutoTokenizer the same ids, from safetensors alone."""
    teacher = Teacher(model=str(tiny_teacher))
    student = build_student(Student(init="prune", layers=(1,)), teacher, seed=0)
    folder = tmp_path / "student"
    save_student(student, read_tokenizer(str(tiny_teacher)), folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits_of(student), logits_of(loaded))
    text = "the old man and the sea"
    expected = AutoTokenizer.from_pretrained(tiny_teacher)(text)["input_ids"]
    assert expected == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ["model.safetensors"] == [path.name for path in folder.iterdir() if path.suffix != ".json"]


def test_a_saved_student_can_be_loaded_as_a_student_again(tiny_teacher, tmp_path):
    """What a run leaves is what another run starts from."""
    teacher = Teacher(model=str(tiny_teacher))
    student = build_student(Student(init="prune", layers=(0,)), teacher, seed=0)
    save_student(student, read_tokenizer(str(tiny_teacher)), tmp_path / "student")
    again = build_student(Student(init="load", model=str(tmp_path / "student")), teacher, seed=0)
    assert torch.equal(parameters_of(student), parameters_of(again))


def test_only_the_tokenizers_own_files_are_copied(tiny_teacher, tmp_path):
    """Tokenizer files byte for byte, and no other file of the teacher."""
    source = tmp_path / "source"
    shutil.copytree(tiny_teacher, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("private")
    folder = tmp_path / "student"
    save_student(make("llama"), read_tokenizer(str(source)), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (folder / name).read_bytes()
    assert not (folder / "notes.txt").exists()
