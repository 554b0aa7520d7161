"""Load the teacher, build the student, and check that they can learn from each other.

Models are split into a backbone (token ids -> hidden states) and a head (hidden states -> logits), so that
logits can be made a few tokens at a time. `head_of` proves the split on each model: if backbone and head do
not give the model's own logits, the model is refused.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.batch import Head
from ddkmix.config import Student, Teacher
from ddkmix.errors import ConfigError, ModelError
from ddkmix.hub import check_layers, read_model_config
from ddkmix.tokenizer import TokenizerCard

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_NOT_PER_LAYER = ("architectures", "_token_id", "_tokens")
"""Endings of config fields whose lists are as long as there are layers only by chance."""


def load_model(name: str, *, revision: str | None = None, dtype: str = "float32") -> nn.Module:
    """A causal language model from a local folder or the Hub; safetensors only, no remote code.

    Raises:
        ModelError: transformers cannot load it, or the files lack some of its parameters.
    """
    from transformers import AutoModelForCausalLM

    read_model_config(name, revision)  # a clear message for the usual mistakes
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,  # unset, transformers would ask on the terminal
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises a dozen types here; all mean the same to a user
        raise ModelError(f"{name} cannot be loaded as a causal language model: {_reason(error)}") from None
    model: nn.Module = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers fills them with random numbers
        raise ModelError(
            f"{name} lacks {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}; save "
            "the whole model with save_pretrained."
        )
    return model


def load_teacher(config: Teacher) -> nn.Module:
    """The teacher, in evaluation mode, without gradients."""
    model = load_model(config.model, revision=config.revision, dtype=config.dtype)
    return model.eval().requires_grad_(False)


def build_student(config: Student, teacher: Teacher, *, seed: int) -> nn.Module:
    """The student in float32, in training mode.

    Raises:
        ConfigError: a layer to keep does not exist, or an override is not a field.
        ModelError: a model cannot be loaded.
    """
    if config.init == "load":
        assert config.model is not None
        student = load_model(config.model, revision=config.revision)
    elif config.init == "prune":
        assert config.layers is not None
        student = prune_depth(load_model(teacher.model, revision=teacher.revision), config.layers)
    else:
        student = _from_config(config, teacher, seed)
    return student.float().train()


def prune_depth(model: nn.Module, layers: tuple[int, ...]) -> nn.Module:
    """A model with only some of another's layers, renumbered from 0; all other parameters are copied.

    Raises:
        ConfigError: a layer does not exist.
        ModelError: the model's layers cannot be found under one numbered prefix.
    """
    from transformers import AutoModelForCausalLM

    config: Any = model.config
    check_layers(layers, config.num_hidden_layers)
    state = model.state_dict()
    prefix = layer_prefix(state, config.num_hidden_layers)
    new_of = {old: new for new, old in enumerate(layers)}
    kept = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            kept[key] = value
            continue
        number, _, rest = key[len(prefix) :].partition(".")
        if int(number) in new_of:
            kept[f"{prefix}{new_of[int(number)]}.{rest}"] = value
    tree = _kept_layers(config.to_dict(), layers, config.num_hidden_layers)
    pruned_config = type(config).from_dict(tree)
    pruned: nn.Module = AutoModelForCausalLM.from_config(pruned_config, dtype=torch.float32)
    missing, unexpected = pruned.load_state_dict(kept, strict=False)
    if missing or unexpected:
        raise ModelError(
            f"pruning {type(model).__name__} to layers {list(layers)} left parameters {missing[:3]} without "
            f"a value and {unexpected[:3]} without a place; this architecture cannot be pruned by depth."
        )
    return pruned


def backbone_of(model: nn.Module) -> nn.Module:
    """The part from token ids to the last hidden states."""
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    return backbone


def head_of(model: nn.Module, vocab_size: int | None = None, *, check: bool = True) -> Head:
    """The output layer of a model, checked against the model's own logits.

    Args:
        model: a transformers causal language model.
        vocab_size: classes to keep; all of them when None.
        check: compare with the model's own logits on a few tokens (one small forward pass).

    Raises:
        ModelError: the model has no output layer, or backbone and head do not give its logits.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    if output is None or not isinstance(output.weight, Tensor):
        raise ModelError(f"{type(model).__name__} has no linear output layer; its logits cannot be chunked.")
    config: Any = model.config
    scaling = getattr(config, "logits_scaling", None)
    head = Head(
        weight=output.weight,
        bias=getattr(output, "bias", None),
        scale=getattr(config, "logit_scale", None) or (1.0 / scaling if scaling else 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=vocab_size,
    )
    if check:
        _check_head(model, head)
    return head


def hidden_states(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"] | None = None,
    *,
    embeddings: Float[Tensor, "B T D"] | None = None,
) -> Float[Tensor, "B T D"]:
    """The last hidden states, after the final norm, of tokens or in their place of `embeddings`. Rows are
    padded at the end only, so causal attention needs no mask; where `position_ids` restart, so does attention
    (`boundaries.check_isolation`)."""
    source = {"input_ids": input_ids} if embeddings is None else {"inputs_embeds": embeddings}
    positions = {} if position_ids is None else {"position_ids": position_ids}
    hidden: Float[Tensor, "B T D"] = backbone_of(model)(
        **source, use_cache=False, **positions
    ).last_hidden_state
    return hidden


def save_student(student: nn.Module, tokenizer: TokenizerCard, folder: Path) -> None:
    """Write a folder that transformers loads: the model in safetensors and the tokenizer's own files."""
    student.save_pretrained(folder)  # type: ignore[operator]
    for name in _TOKENIZER_FILES:
        source = tokenizer.path.parent / name
        if source.exists():
            shutil.copyfile(source, folder / name)


def _from_config(config: Student, teacher: Teacher, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    name, revision = (config.model, config.revision) if config.model else (teacher.model, teacher.revision)
    read_model_config(name, revision)
    try:
        base = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # as in `load_model`
        raise ModelError(f"{name} has no config that transformers can use: {_reason(error)}") from None
    known = base.to_dict()
    for key in config.overrides:
        if key not in known:
            raise ConfigError(f"student.overrides.{key} is not a field of {type(base).__name__}.")
    tree = {**known, **config.overrides}
    try:
        if "num_hidden_layers" in config.overrides:
            layers = tuple(range(int(config.overrides["num_hidden_layers"])))
            tree = _kept_layers(tree, layers, base.num_hidden_layers)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            student: nn.Module = AutoModelForCausalLM.from_config(
                type(base).from_dict(tree), dtype=torch.float32
            )
    except Exception as error:  # every architecture has rules of its own
        raise ConfigError(
            f"student.overrides = {config.overrides} make no {type(base).__name__}: {_reason(error)}"
        ) from None
    return student


def _reason(error: Exception) -> str:
    """What transformers says, in one line of a bearable length."""
    return " ".join(str(error).split())[:300]


def _kept_layers(tree: dict[str, Any], layers: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """The config of a model with `num_layers` layers for some of them; lists with an entry a layer follow."""
    per_layer = {
        key: [value[i % num_layers] for i in layers]
        for key, value in tree.items()  # layer_types, no_rope_layers, ...
        if isinstance(value, list) and len(value) == num_layers and not key.endswith(_NOT_PER_LAYER)
    }
    return {**tree, **per_layer, "num_hidden_layers": len(layers)}


def layer_prefix(state: dict[str, Any], num_layers: int) -> str:
    """The text before the layer number in parameter names, such as `model.layers.`."""
    numbered: dict[str, set[int]] = {}
    for key in state:
        parts = key.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                numbered.setdefault(".".join(parts[:i]) + ".", set()).add(int(part))
                break
    found = [prefix for prefix, numbers in numbered.items() if numbers == set(range(num_layers))]
    if len(found) != 1:
        raise ModelError(
            f"the {num_layers} layers are numbered under {found or sorted(numbered)}; pruning and matching "
            "need exactly one such prefix."
        )
    return found[0]


@torch.no_grad()
def _check_head(model: nn.Module, head: Head) -> None:
    device = head.weight.device
    input_ids = torch.arange(8, device=device).remainder(len(head.weight))[None]
    was_training = model.training
    model.eval()
    hidden = hidden_states(model, input_ids)[0]
    ours = head.finish(
        nn.functional.linear(hidden, head.weight, head.bias).float()  # as the model computes it
    )
    theirs = model(input_ids=input_ids, use_cache=False).logits[0].float()
    model.train(was_training)
    if not theirs.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives logits that are not finite on a few tokens; its parameters are "
            "damaged. Load another copy."
        )
    error = (ours - theirs).abs().max().item()
    if not error <= 1e-2 * theirs.abs().max().item():  # bfloat16 rounds to 4e-3
        raise ModelError(
            f"{type(model).__name__}: hidden states and output layer give logits that differ by {error:.3g} "
            "from the model's own; it changes its logits in a way that ddkmix does not know. Open an issue "
            "with the model's name."
        )
