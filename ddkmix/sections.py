"""The sections of a config: frozen, strict, every field with its meaning, default and rule.

`config.RunConfig` is made of them and gives them their public names.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[a-z0-9][a-z0-9_-]*$"
"""Names of domains and teachers: lower-case letters, digits, _ and -."""

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["float32", "bfloat16", "float16"]
Measure = Literal["excess_loss", "forward_kl"]
DecayShape = Literal["cosine", "linear", "sqrt"]


class Section(BaseModel):
    """A part of the config: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Named(BaseModel):
    """`name` and the parameters of a policy, an objective, a loss or a selection, which checks them."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    name: str
    """An entry of `POLICIES`, `OBJECTIVES`, `LOSSES` or `SELECTIONS`, or `package.module:Class`."""


class Student(Section):
    """The model to train: pruned from the teacher, built from a config, or loaded."""

    init: Literal["prune", "config", "load"]
    """`prune`: the teacher with only `layers`. `config`: random parameters. `load`: `model` as it is."""
    layers: tuple[Count, ...] | None = None
    """For `prune`: teacher layers to keep, counted from 0, in order."""
    model: str | None = None
    """For `load`: local folder or Hub id. For `config`: where the base config comes from (or the teacher)."""
    revision: str | None = None
    """Hub revision of `model`."""
    overrides: dict[str, int | float | bool | str] = {}
    """For `config`: fields of the transformers config to change (`num_hidden_layers: 6`)."""

    @model_validator(mode="after")
    def _complete(self) -> "Student":
        if self.init == "prune" and not self.layers:
            raise ValueError("init = 'prune' needs `layers`, the teacher layers to keep")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers = {list(self.layers)} must increase without repeats")
        if self.init == "load" and self.model is None:
            raise ValueError("init = 'load' needs `model`, a local folder or a Hub id")
        return self


class Pack(Section):
    """How documents become rows."""

    seq_len: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a row."""
    separator: str | None = None
    """Token between documents; the tokenizer's end-of-sequence token when unset."""
    strategy: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate`: documents end to end, cut where a row ends. `best_fit`: a document that fits into a row
    is never cut; the rest of a row is padding."""
    processes: Count = 0
    """Parallel processes; 0 means one per core."""


class Mixture(Section):
    """Which domain serves which row, and what happens when one is used up."""

    interval_steps: PositiveInt = 1000
    """Optimizer steps between weight updates (DDK's K)."""
    max_epochs: Positive | None = None
    """Passes allowed over any domain; a card's own limit wins where it is smaller."""
    on_cap: Literal["renormalize", "stop", "error"] = "renormalize"
    """At a domain's limit: share its weight among the others, end the run, or fail."""
    count: Literal["rows", "tokens"] = "rows"
    """What a weight is a share of: rows, or tokens without padding."""
    block_rows: PositiveInt = 8192
    """Rows are permuted inside blocks of this many; larger mixes better, smaller reads more locally."""


class Guards(Section):
    """What holds the weights of any policy (see `ddkmix.policies.Guarded`); `off`: they are as published."""

    floor: Share | None = None
    """Smallest share of a domain. Unset: 0.1 / N, for domains that begin above it."""
    cap: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share. Unset: (1 + 1 / N) / 2, all that DDK's alpha = 0.5 gives, for those that begin below."""
    max_move: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest change of any share in one update; 1 is no limit."""
    warmup_intervals: Count = 0
    """Updates, from the first, that leave the shares as they began; the policy sees all losses."""
    evidence: NonNegative = 1.0
    """Moves are shortened by so many standard errors of the new share, which those of the gaps give it."""

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """YAML reads the words off and on as booleans; a Python caller may write them as words."""
        if value is False or value == "off":
            return {"floor": 0.0, "cap": 1.0, "evidence": 0.0}
        return {} if value is True or value == "on" else value

    @model_validator(mode="after")
    def _in_order(self) -> "Guards":
        if self.floor is not None and self.cap is not None and self.floor > self.cap:
            raise ValueError(f"floor = {self.floor:g} is above cap = {self.cap:g}; lower it or raise the cap")
        return self


class Signal(Section):
    """Where the trainer takes the teacher's signal from."""

    source: Literal["live", "store"] = "live"
    """`live`: the teacher reads every batch. `store`: what `ddkmix capture` has kept of it (see `capture`);
    the teacher is loaded only to measure held-out rows that it was not measured on before."""
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"
    """What becomes of the mass outside the kept classes: one class more, on both sides; nothing, the kept
    classes scaled up to 1; or nothing at all. The last two are biased: see `ddkmix.batch.TruncatedSignal`."""
    missing: Literal["error", "live"] = "error"
    """Rows of shards that were not captured: an error before the run begins, or the live teacher."""


class Optimizer(Section):
    """AdamW."""

    lr: Positive = 3e-5
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the mean of the gradients, per step."""
    beta2: Decay = 0.95
    """Decay of the mean of their squares, per step."""
    eps: Positive = 1e-8
    """Added to the root of that mean."""
    weight_decay: NonNegative = 0.1
    """Applied to matrices; not to norms and biases."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""


class Schedule(Section):
    """The learning rate as a multiple of its peak."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: warm-up, then a cosine over the rest. `wsd`: warm-up, stable, then a decay."""
    warmup_steps: Count = 0
    """Linear warm-up from 0."""
    warmup_share: Share = 0.0
    """The same as a share of the run's steps (pre-training distillation: 0.1); not both."""
    decay_steps: Count = 0
    """Length of the decay; only for `wsd`."""
    decay_share: Share = 0.0
    """The same as a share of the run's steps; not both."""
    decay: DecayShape = "cosine"
    """How `wsd` falls: along a cosine, a line, or 1 - sqrt(x) (arXiv 2405.18392)."""
    final_ratio: Share = 0.1
    """Learning rate of the last step as a share of the peak."""

    @model_validator(mode="after")
    def _one_length_each(self) -> "Schedule":
        for part in ("warmup", "decay"):
            steps, share = getattr(self, f"{part}_steps"), getattr(self, f"{part}_share")
            if steps and share:
                raise ValueError(
                    f"{part}_steps = {steps} and {part}_share = {share} both say how long the {part} is; "
                    "remove one"
                )
        return self


class Loader(Section):
    """How rows are read. No setting here changes which rows are served."""

    workers: Count = 0
    """Reader processes per rank."""
    prefetch_steps: PositiveInt = 2
    """Steps that each worker reads ahead."""
    max_substitutes: Count = 100
    """Rows whose bytes are damaged and that another row of their domain may stand in for, over the run and
    all ranks together; 0 stops at the first."""


class Storage(Section):
    """How remote shards are read. No setting here changes which rows are served."""

    mode: Literal["auto", "ranged", "spool"] = "auto"
    """`ranged`: read the bytes of single rows. `spool`: copy whole shards to `folder` first. `auto`: copy
    them ahead of time, and read rows by ranges, where the store can, until the copy is there."""
    folder: Path | None = None
    """Spooled shards, shared by all processes of a machine; `<cache_dir>/shards` when unset."""
    max_gb: Positive = 100.0
    """Shards are evicted, oldest use first, to keep the folder below this many gigabytes (10^9 bytes)."""
    attempts: PositiveInt = 6
    """Tries of one request, with exponential back-off, before the run stops."""
    timeout_s: Positive = 60.0
    """Seconds without an answer after which a try has failed."""
    allow_pipe: bool = False
    """Allow `pipe:COMMAND` locations in cards, which run COMMAND in a shell."""


class Evaluation(Section):
    """Held-out losses per domain."""

    rows: PositiveInt = 500
    """Held-out rows per domain (DDK: 500); all of them where a domain has fewer."""
    batch_rows: PositiveInt = 8
    """Rows in a forward pass."""
    measures: tuple[Measure, ...] = ()
    """To be measured although the policy does without; `forward_kl` has the teacher read the rows anew."""
    reference: Literal["teacher", "cards"] = "teacher"
    """What the gap is to: the teacher's loss, or the `reference_loss` that every card names."""


class Trainer(Section):
    """The loop."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    batch_rows: PositiveInt = 128
    """Rows in an optimizer step, over all ranks and micro-batches."""
    microbatch_rows: PositiveInt | None = None
    """Rows in one forward and backward pass of one rank; unset means all of the rank's rows."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16`: the student computes in bfloat16 over float32 parameters."""
    logits_memory_mb: Positive = 512.0
    """Megabytes for logits of student and teacher; more than a few hundred make no difference in speed."""
    logits_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at one time, in the place of `logits_memory_mb`."""
    document_boundaries: bool = False
    """Attention and positions restart at every document of a row: a token sees its own document and the
    separator before it."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass."""
    checkpoint_steps: PositiveInt = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Older checkpoints are deleted."""
    log_steps: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""


class Tracking(Section):
    """Experiment trackers beside the JSONL files, by Accelerate's names."""

    trackers: tuple[str, ...] = ()
    """For example [tensorboard], [wandb], [mlflow], [trackio], which must be installed; or the name of a
    class that was given to `accelerate.tracking.register_tracker_class`."""
    project: str = "ddkmix"
    """The project's name at the tracker."""
