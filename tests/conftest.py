"""Small real things that many tests need: a tokenizer, models, domains of real sentences, configs.

Nothing here stands in for a part of ddkmix. The models are transformers models with two layers, the
tokenizer is a byte-level BPE, the shards are written by webdataset.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"

import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
TEACHER = REPO / "models" / "smollm2-135m-instruct"
WORDS = {
    "code": [
        "def",
        "return",
        "self",
        "for",
        "in",
        "range",
        "len",
        "print",
        "import",
        "class",
        "if",
        "else",
        "not",
        "None",
        "True",
    ],
    "math": [
        "theorem",
        "lemma",
        "proof",
        "let",
        "be",
        "a",
        "group",
        "ring",
        "field",
        "then",
        "hence",
        "implies",
        "QED",
        "forall",
        "exists",
    ],
    "prose": [
        "the",
        "old",
        "man",
        "and",
        "sea",
        "whale",
        "ship",
        "said",
        "she",
        "looked",
        "out",
        "of",
        "window",
        "night",
        "was",
        "dark",
    ],
}
EOS = "<|endoftext|>"


def reset_accelerate() -> None:
    """Forget Accelerate's state, which it keeps for the whole process."""
    import sys

    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Every test starts without any state of Accelerate."""
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with 300 tokens, saved as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The same tokenizer with <|im_start|> (300) and <|im_end|> (301), and a chat template (ChatML)."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("chat-tokenizer")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_tiny_model(folder: Path, tokenizer: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama with two layers and tied embeddings beside the tokenizer's files."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The folder of a small random teacher."""
    return save_tiny_model(tmp_path_factory.mktemp("teacher"), tokenizer_folder)


def save_tokenizer(folder: Path, tokenizer: Any, eos: str) -> Path:
    """A tokenizer as transformers saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a byte-level tokenizer of 400 tokens and a separator of its own name and id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 20, trainer)
    own = save_tokenizer(tmp_path_factory.mktemp("other-tokenizer"), tokenizer, "</s>")
    folder = tmp_path_factory.mktemp("other-teacher")
    return save_tiny_model(folder, own, seed=9, vocab_size=410, hidden_size=16, num_key_value_heads=4)


@pytest.fixture(scope="session")
def sentence_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is of the SentencePiece kind: no bytes, a word's space first, a BOS, an UNK."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=list("0123456789"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = save_tokenizer(tmp_path_factory.mktemp("sentence-tokenizer"), tokenizer, "</s>")
    return save_tiny_model(tmp_path_factory.mktemp("sentence-teacher"), own, seed=4, vocab_size=150)


def domain_losses(
    gaps: Sequence[float], *, teacher_loss: float = 2.0, domains: Sequence[str] | None = None
) -> Any:
    """`DomainLosses` with these loss gaps in nats, over domains a, b, c, ... with one teacher loss."""
    import numpy as np

    from ddkmix.types import DomainLosses

    count = len(gaps)
    return DomainLosses(
        domains=tuple(domains or "abcdefghijklmnopqrstuvwxyz"[:count]),
        student_loss=teacher_loss + np.array(gaps, dtype=np.float64),
        teacher_loss=np.full(count, teacher_loss),
        student_error=np.full(count, 0.02),
        gap_error=np.full(count, 0.01),
        num_tokens=np.full(count, 1000),
        num_bytes=np.full(count, 4000),
    )


def documents(domain: str, count: int, *, seed: int = 0, words: int = 60) -> list[str]:
    """Documents of a domain: its words in random order, different for each seed."""
    generator = random.Random(f"{domain} {seed}")
    vocabulary = WORDS[domain] if domain in WORDS else WORDS["prose"]
    return [f"{i} " + " ".join(generator.choices(vocabulary, k=words)) for i in range(count)]


def write_shard(path: Path, texts: Sequence[str], *, extension: str = "txt") -> Path:
    """A WebDataset tar of documents, written by webdataset."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for i, text in enumerate(texts):
            writer.write({"__key__": f"{i:05d}", extension: text.encode()})
    return path


def write_domain(folder: Path, name: str, *, shards: int = 2, per_shard: int = 12, **card: Any) -> Path:
    """A card and its shards; extra keywords become keys of the card."""
    for shard in range(shards):
        texts = documents(name, per_shard, seed=shard)
        write_shard(folder / name / f"train-{shard:06d}.tar", texts)
    write_shard(folder / name / "held_out-000000.tar", documents(name, 8, seed=1000))
    content = {
        "name": name,
        "text_field": "txt",
        "train": f"{name}/train-{{000000..{shards - 1:06d}}}.tar",
        "held_out": f"{name}/held_out-000000.tar",
        "license": "CC0-1.0",
        **card,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


@pytest.fixture(scope="session")
def tiny_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cards of three small domains of different size."""
    folder = tmp_path_factory.mktemp("domains")
    for i, name in enumerate(WORDS):
        write_domain(folder, name, per_shard=10 + 6 * i)
    return folder


ConfigTree = dict[str, Any]


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_teacher: Path, tiny_domains: Path) -> Callable[..., ConfigTree]:
    """A function that gives the config tree of a small run; keywords are merged into its sections."""

    def make(**sections: Any) -> ConfigTree:
        tree: ConfigTree = {
            "run_dir": str(tmp_path / "run"),
            "cache_dir": str(tiny_domains / "cache"),
            "domains": [str(tiny_domains)],
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"init": "prune", "layers": [0]},
            "pack": {"seq_len": 32, "processes": 1},
            "mixture": {"interval_steps": 4},
            "trainer": {
                "steps": 10,
                "batch_rows": 6,
                "checkpoint_steps": 3,
                "log_steps": 1,
                "logits_chunk_tokens": 64,
            },
            "optimizer": {"lr": 1e-3},
            "evaluation": {"rows": 8},
        }
        for name, value in sections.items():
            if isinstance(value, Mapping) and isinstance(tree.get(name), dict) and name != "policy":
                tree[name] = {**tree[name], **value}
            else:
                tree[name] = value
        return tree

    return make


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[[ConfigTree], Path]:
    """A function that writes a config tree to a file."""

    def write(tree: ConfigTree) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


warnings.filterwarnings("error")
