"""Train a small student on eight domains by a plain loop with Accelerate.

accelerate launch PROGRAM [STEPS]
"""

import sys
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from ddkmix import DomainMixture, GapEvaluator, Reweighter
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


accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
domains = {card.stem: rows(card.with_suffix("")) for card in sorted(Path("domains").glob("*.yaml"))}
held_out = {name: rows(f"domains/{name}", "held_out") for name in domains}
mixture = DomainMixture.from_datasets(domains, batch_rows=4 * ACCUMULATE * accelerator.num_processes)
loader = mixture.loader(steps=STEPS, microbatches=ACCUMULATE, device=accelerator.device)
reweighter = Reweighter(mixture, GapEvaluator(held_out, teacher=TEACHER, rows=2), interval_steps=10)
accelerator.register_for_checkpointing(reweighter)
student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
done = 0
reweighter.step(student, done)
for batch in loader:
    with accelerator.accumulate(student):
        loss = student(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        done += 1
        reweighter.step(student, done)
        accelerator.print(f"step {done}: loss {loss.item():.3f}")
    if done == STEPS:
        break
