"""Train a small student on eight domains with MosaicML Composer.

python PROGRAM [STEPS]
"""

import sys
from pathlib import Path

import datasets
import torch
from composer import Trainer
from composer.models import HuggingFaceModel
from ddkmix import DomainMixture, GapEvaluator, Reweighter
from ddkmix.integrations.composer import MixtureCallback, MixtureLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEACHER = "models/smollm2-135m-instruct"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer = AutoTokenizer.from_pretrained(TEACHER)


def cut(documents, length=128):
    """Documents to rows of tokens."""
    ids = [i for text in documents["txt"] for i in tokenizer(text + "<|endoftext|>")["input_ids"]]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return {"input_ids": rows, "labels": rows}


def rows(domain, split="train"):
    """The rows of a split of a domain."""
    shards = datasets.load_dataset("webdataset", data_files=f"{domain}/{split}-*.tar", split="train")
    return shards.map(cut, batched=True, remove_columns=shards.column_names).with_format("torch")


config = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2)
student = HuggingFaceModel(AutoModelForCausalLM.from_config(config), tokenizer)
domains = {card.stem: rows(card.with_suffix("")) for card in sorted(Path("domains").glob("*.yaml"))}
held_out = {name: rows(f"domains/{name}", "held_out") for name in domains}
mixture = DomainMixture.from_datasets(domains, batch_rows=8)
reweighter = Reweighter(mixture, GapEvaluator(held_out, teacher=TEACHER, rows=2), interval_steps=10)
loader = MixtureLoader(mixture)
trainer = Trainer(
    model=student,
    train_dataloader=loader,
    callbacks=[MixtureCallback(reweighter)],
    optimizers=torch.optim.AdamW(student.parameters(), lr=1e-3),
    max_duration=f"{STEPS}ba",
    device_train_microbatch_size=4,
    progress_bar=False,
    log_to_console=True,
    console_log_interval="10ba",
)
trainer.fit()
