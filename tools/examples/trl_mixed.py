"""Train a small student on eight domains with the SFTTrainer of TRL.

python PROGRAM [STEPS]
"""

import sys
from pathlib import Path

import datasets
from ddkmix import GapEvaluator
from ddkmix.integrations.transformers import mixture_trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

TEACHER = "models/smollm2-135m-instruct"
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer = AutoTokenizer.from_pretrained(TEACHER)


def texts(domain):
    """The training documents of a domain."""
    shards = datasets.load_dataset("webdataset", data_files=f"domains/{domain}/train-*.tar", split="train")
    return shards.rename_column("txt", "text").select_columns("text")


domains = {card.stem: texts(card.stem) for card in sorted(Path("domains").glob("*.yaml"))}
small = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=2, hidden_size=192, num_attention_heads=3)
student = AutoModelForCausalLM.from_config(small)
args = SFTConfig(
    "runs/sft",
    max_length=128,
    bf16=False,
    max_steps=STEPS,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_steps=50,
)
evaluator = GapEvaluator.from_cards("domains", tokenizer=TEACHER, seq_len=128, teacher=TEACHER, rows=2)
trainer = mixture_trainer(SFTTrainer)(
    student, args, train_dataset=domains, processing_class=tokenizer, evaluator=evaluator, interval_steps=10
)
trainer.train()
