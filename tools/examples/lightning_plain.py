"""Train a small student on eight domains with Lightning; every domain is drawn equally often.

python tools/examples/lightning_plain.py [STEPS]
"""

import sys
from pathlib import Path

import datasets
import lightning
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEACHER = "models/smollm2-135m-instruct"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer = AutoTokenizer.from_pretrained(TEACHER)


def cut(batch, length=128):
    """Documents to rows of tokens."""
    ids = [i for text in batch["txt"] for i in tokenizer(text + "<|endoftext|>")["input_ids"]]
    return {"input_ids": [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]}


def rows(domain):
    """The rows of a domain's training text."""
    shards = datasets.load_dataset("webdataset", data_files=f"{domain}/train-*.tar", split="train")
    return shards.map(cut, batched=True, remove_columns=shards.column_names).with_format("torch")


class Student(lightning.LightningModule):
    """The teacher's architecture with two layers, trained on the next token."""

    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2)
        )

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


domains = {card.stem: rows(card.with_suffix("")) for card in Path("domains").glob("*.yaml")}
mixed = datasets.interleave_datasets(list(domains.values()), stopping_strategy="all_exhausted")
data = torch.utils.data.DataLoader(mixed, batch_size=4, shuffle=True)
trainer = lightning.Trainer(max_steps=STEPS, accumulate_grad_batches=2)
trainer.fit(Student(), data)
