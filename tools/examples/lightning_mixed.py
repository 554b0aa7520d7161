"""Train a small student on eight domains with Lightning: python PROGRAM [STEPS]."""

import sys
from pathlib import Path

import datasets
import lightning
import torch
from ddkmix import DomainMixture, GapEvaluator, Reweighter
from ddkmix.integrations.lightning import MixtureCallback, MixtureDataModule
from lightning.pytorch.loggers import CSVLogger
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


class Student(lightning.LightningModule):
    """Two layers of the teacher's architecture."""

    def __init__(self):
        super().__init__()
        config = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2)
        self.model = AutoModelForCausalLM.from_config(config)

    def training_step(self, batch, _):
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


domains = {card.stem: rows(card.with_suffix("")) for card in sorted(Path("domains").glob("*.yaml"))}
held_out = {name: rows(f"domains/{name}", "held_out") for name in domains}
mixture = DomainMixture.from_datasets(domains, batch_rows=8)
reweighter = Reweighter(mixture, GapEvaluator(held_out, teacher=TEACHER, rows=2), interval_steps=10)
data = MixtureDataModule(mixture)
trainer = lightning.Trainer(
    max_steps=STEPS,
    logger=CSVLogger("."),
    accumulate_grad_batches=2,
    callbacks=[MixtureCallback(reweighter)],
)
trainer.fit(Student(), data)
