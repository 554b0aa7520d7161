"""Train a small student on eight domains by a plain loop in torchtitan's shape.

python PROGRAM [STEPS]
"""

import sys
from pathlib import Path

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEACHER = "models/smollm2-135m-instruct"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
ACCUMULATE = 2
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


def train_step(batches):
    """One optimizer step: first all its batches, then the loss by the tokens of all of them."""
    microbatches = [next(batches) for _ in range(ACCUMULATE)]
    tokens = sum((labels != -100).sum() for _, labels in microbatches)
    total = 0.0
    for inputs, labels in microbatches:
        logits = student(input_ids=inputs["input"]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
domains = {card.stem: rows(card.with_suffix("")) for card in sorted(Path("domains").glob("*.yaml"))}
mixed = datasets.interleave_datasets(list(domains.values()), stopping_strategy="all_exhausted").shuffle()
batches = (({"input": b["input_ids"][:, :-1]}, b["labels"][:, 1:]) for b in mixed.iter(batch_size=4))
for step in range(STEPS):
    print(f"step {step + 1}: loss {train_step(batches):.3f}")
