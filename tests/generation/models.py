"""Small models of several architectures, and what decoding is to give, computed in the slowest way."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ddkmix.generation.decode import Decoder, Prompt
from ddkmix.generation.sampling import Sampling
from ddkmix.truncation import seeded_uniforms

CLASSES = 97
SMALL: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def small_model(kind: str = "Llama", *, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of some architecture, in evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def prompts_of(count: int, *, seed: int = 0, longest: int = 40) -> list[Prompt]:
    """Prompts of different lengths, one of them of a single token."""
    random = np.random.default_rng(seed)
    lengths = [1, *random.integers(2, longest + 1, count - 1).tolist()]
    return [
        Prompt(ids=random.integers(1, CLASSES, n), key=(seed, i), name=f"row {i}")
        for i, n in enumerate(lengths)
    ]


def decoder_of(model: nn.Module, **changes: Any) -> Decoder:
    """A decoder with settings that most tests share."""
    settings: dict[str, Any] = {
        "sampling": Sampling(temperature=1.3, top_p=0.97),
        "max_new_tokens": 24,
        "stop_ids": [0, 5],
        "num_classes": CLASSES,
        "block_rows": 4,
    }
    return Decoder(model, **{**settings, **changes})


@torch.no_grad()
def one_by_one(
    model: nn.Module,
    prompt: Prompt,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: list[int],
    num_classes: int = CLASSES,
) -> list[int]:
    """The response, by whole forward passes without a cache, a batch or a shortcut."""
    from ddkmix.generation.sampling import choose

    uniforms = torch.from_numpy(seeded_uniforms(list(prompt.key), max_new_tokens, 1)[:, 0])
    ids = torch.from_numpy(prompt.ids)[None]
    response: list[int] = []
    while len(response) < max_new_tokens and not (response and response[-1] in stop_ids):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1, :num_classes].float()
        (token,) = choose(logits, uniforms[len(response)][None], sampling).tolist()
        response.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return response


def save(model: nn.Module, folder: Path) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
