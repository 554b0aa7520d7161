"""The sections of what teachers and students say: kept before a training for later, or said during it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ddkmix.sections import NonNegative, PositiveInt, Section, Seed


class Capture(Section):
    """What the logits store keeps of what the teacher says (`ddkmix capture`)."""

    keep: Literal["top_p_k", "top_k", "drawn", "top_k_drawn", "hidden"] = "top_p_k"
    """`top_p_k`: the smallest set of classes with mass `p`, at most `k` (arXiv 2410.16215).
    `top_k`: the `k` likeliest. `drawn`: `draws` draws with replacement (arXiv 2503.16870). `top_k_drawn`: the
    `k` likeliest, and draws from the rest. `hidden`: the last hidden states, which give all classes."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the mass that `top_p_k` keeps."""
    k: Annotated[int, Field(ge=1, le=65_535)] = 50
    """Most classes kept for a token, beside drawn ones."""
    draws: Annotated[int, Field(ge=1, le=255)] = 12
    """Draws for a token, of `drawn` and `top_k_drawn`."""
    log_prob_bytes: Literal[1, 2] = 1
    """Bytes of a log-probability: 1, a grid, or 2, a half-precision number."""
    hidden_bytes: Literal[1, 2, 4] = 2
    """Bytes of a number in a hidden state: 1, an integer with a scale for each token; 2, half precision, or
    the teacher's own bfloat16; 4, single precision."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = ()
    """Temperatures that tempered probabilities are exact at, beside those that `loss` names."""
    folder: Path | None = None
    """Stores lie in here, a folder each; `<cache_dir>/logits` when unset."""
    batch_rows: PositiveInt = 8
    """Rows in a forward pass of the teacher."""


class Generate(Section):
    """How models answer prompts (`ddkmix generate`), and where the responses are kept."""

    max_new_tokens: PositiveInt = 256
    """Tokens of a response at most, the one that ends it included."""
    temperature: NonNegative = 1.0
    """Logits are divided by it; 0 is the likeliest token, always."""
    top_k: PositiveInt | None = None
    """Only the k likeliest classes are drawn from, after the temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest classes with this share of the mass that `top_k` leaves."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response; when empty the tokenizer's end-of-sequence token, and the one that ends a
    turn in the domain."""
    seed: Seed = 0
    """Seeds the draws, together with the model and the row, and nothing else."""
    block_rows: PositiveInt = 16
    """Rows in a forward pass of one token each, always, if need be with empty places. A model's numbers
    depend on it in their last digits, so responses of another size are another store."""
    batch_rows: PositiveInt = 64
    """Rows taken in hand at once, and lost by a kill. It changes no response; the more there are, the fewer
    places of a block are empty."""
    folder: Path | None = None
    """Stores lie in here, a folder each; `<cache_dir>/responses` when unset."""


class Rollouts(Section):
    """The student's own responses during training, for objectives that learn from them. Their length
    and the tokens that end them are those of `generate`."""

    temperature: NonNegative = 1.0
    """Logits are divided by it; 0 is the likeliest token, always."""
    top_k: PositiveInt | None = None
    """Only the k likeliest classes are drawn from, after the temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest classes with this share of the mass that `top_k` leaves."""
    block_rows: PositiveInt = 16
    """Rows in a forward pass of one token each, always, if need be with empty places: best the prompts that a
    rank has in a step."""
    buffer_rows: PositiveInt = 1000
    """The newest responses are kept, with their prompts, for steps that generate none (DistiLLM: 1000)."""
