"""A run over one domain of text and one of prompts, with a tiny teacher that has answered them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddkmix.config import RunConfig, parse_config
from ddkmix.generate import generate
from ddkmix.response_store.prompts import leading_prompts
from tests.conftest import EOS, ConfigTree, save_tiny_model, write_domain
from tests.prompts.cards import prompt_domain, talk

STEPS = 4

OBJECTIVES_IN_RUNS: dict[str, dict[str, Any]] = {
    "seqkd": {"objective": {"name": "seqkd"}, "loss": [{"name": "cross_entropy"}]},
    "gkd": {"objective": {"name": "gkd", "share": 0.7}, "loss": [{"name": "jsd", "beta": 0.5}]},
    "distillm": {
        "objective": {"name": "distillm", "start": 0.8, "capacity": 6, "tolerance": 0.0},
        "loss": [{"name": "skew_kl"}],
        "rollouts": {"buffer_rows": 8},
    },
    "distillm2": {"objective": {"name": "distillm2", "fresh": 0.5, "moving_beta": True}, "loss": []},
    "distillm2 moving": {"objective": {"name": "distillm2", "moving_skew": True}, "loss": []},
    "minillm": {"objective": {"name": "minillm"}, "loss": [{"name": "cross_entropy"}]},
    "minillm alone": {"objective": {"name": "minillm", "teacher_share": 0.0, "whiten": True}, "loss": []},
    "dpkd": {"objective": {"name": "dpkd", "fresh": 0.5}, "loss": [{"name": "cross_entropy", "weight": 0.5}]},
    "dpkd alone": {"objective": {"name": "dpkd", "chosen_nll": 0.1}, "loss": []},
    "plad_ranking": {"objective": {"name": "plad_ranking"}, "loss": [{"name": "cross_entropy"}]},
    "plad_margin": {"objective": {"name": "plad_margin", "fresh": 0.6}, "loss": []},
    "ipo": {"objective": {"name": "ipo"}, "loss": []},
    "cpo": {"objective": {"name": "cpo"}, "loss": []},
    "simpo": {"objective": {"name": "simpo"}, "loss": []},
}
"""Every objective that asks for responses, in some of its forms."""


@pytest.fixture(scope="session")
def prompt_cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain of text, and one of prompts whose responses differ in length."""
    folder = tmp_path_factory.mktemp("cards")
    write_domain(folder, "code", per_shard=4)
    shards = [
        [talk(f"{i}{j}{'?' * (j % 3 + 1)}", "the sea " * (j % 4 + 1)) for j in range(9)] for i in range(2)
    ]
    prompt_domain(folder, shards, [talk(f"held {i}", "the whale " * i) for i in range(1, 4)])
    return folder


@pytest.fixture(scope="session")
def chat_teacher(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_folder: Path) -> Path:
    """A small model that has the chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("chat-teacher"), chat_tokenizer_folder)


@pytest.fixture(scope="session")
def answered(tmp_path_factory: pytest.TempPathFactory, prompt_cards: Path, chat_teacher: Path) -> Path:
    """A cache with packed rows and the teacher's responses."""
    cache = tmp_path_factory.mktemp("answered")
    tree = run_tree(cache, prompt_cards, chat_teacher, cache / "unused")
    generate(parse_config(tree, where="test"), "teacher", prompts_of=leading_prompts)
    return cache


def run_tree(cache: Path, cards: Path, teacher: Path, run_dir: Path, /, **sections: Any) -> ConfigTree:
    """A config of a few steps."""
    tree: ConfigTree = {
        "run_dir": str(run_dir),
        "cache_dir": str(cache),
        "domains": [str(cards)],
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "student": {"init": "config", "overrides": {"num_hidden_layers": 1}},
        "pack": {"seq_len": 48, "separator": EOS},
        "policy": {"name": "static"},
        "mixture": {"interval_steps": 2},
        "evaluation": {"rows": 3, "batch_rows": 3},
        "optimizer": {"lr": 1e-3},
        "generate": {"max_new_tokens": 8, "block_rows": 4},
        "trainer": {"steps": STEPS, "batch_rows": 6, "checkpoint_steps": 2, "log_steps": 1},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


@pytest.fixture
def make_run(
    tmp_path: Path, answered: Path, prompt_cards: Path, chat_teacher: Path
) -> Callable[..., RunConfig]:
    """A config with changed sections, each with a run directory of its own name."""

    def make(run: str = "run", **sections: Any) -> RunConfig:
        tree = run_tree(answered, prompt_cards, chat_teacher, tmp_path / run, **sections)
        return parse_config(tree, where="test")

    return make
