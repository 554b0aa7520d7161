"""Train a small student on eight domains with the Trainer of transformers.

python PROGRAM [STEPS]
"""

import sys
from pathlib import Path

import datasets
from ddkmix import GapEvaluator
from ddkmix.integrations.transformers import MixtureTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

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
    shards = datasets.load_dataset("webdataset", data_files=f"domains/{domain}/{split}-*.tar", split="train")
    return shards.map(cut, batched=True, remove_columns=shards.column_names)


domains = {card.stem: rows(card.stem) for card in sorted(Path("domains").glob("*.yaml"))}
small = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2, hidden_size=192, num_attention_heads=3)
student = AutoModelForCausalLM.from_config(small)
args = TrainingArguments(
    "runs/trainer",
    max_steps=STEPS,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=50,
)
evaluator = GapEvaluator({name: rows(name, "held_out") for name in domains}, teacher=TEACHER, rows=2)
trainer = MixtureTrainer(student, args, train_dataset=domains, evaluator=evaluator, interval_steps=10)
trainer.train()
