"""Decoding: the responses of the slowest way, the same in any company, and models that cannot are refused."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddkmix.errors import DataError, ModelError, NumericsError
from ddkmix.generation import slots as slots_module
from ddkmix.generation.decode import Decoder, Prompt, prove, slot_length
from ddkmix.generation.sampling import Sampling
from ddkmix.generation.slots import Slots
from tests.generation.models import CLASSES, decoder_of, one_by_one, prompts_of, small_model


def as_lists(responses: list[np.ndarray]) -> list[list[int]]:
    """Comparable with ==."""
    return [response.tolist() for response in responses]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"attn_implementation": "eager"}),
        ("Qwen2", {"use_sliding_window": False}),
        ("Mistral", {"sliding_window": 128}),
        ("Gemma3Text", {"sliding_window": 128, "head_dim": 8}),
        ("GPTNeoX", {}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("sampling", [Sampling(temperature=1.3, top_p=0.97), Sampling(temperature=0.0)])
def test_responses_are_those_of_whole_passes_without_cache_or_batch(
    kind: str, changes: dict[str, Any], sampling: Sampling
) -> None:
    """Token for token, in float64, where rounding decides nothing: positions, masks and caches of rows of
    different lengths are right, for rotary and learned positions, windows, and both attentions."""
    model = small_model(kind, **changes).double()
    prompts = prompts_of(9)
    actual = decoder_of(model, sampling=sampling).responses(prompts)
    for prompt, response in zip(prompts, actual, strict=True):
        expected = one_by_one(model, prompt, sampling, max_new_tokens=24, stop_ids=[0, 5])
        assert expected == response.tolist(), prompt.name


def test_greedy_responses_are_those_of_transformers() -> None:
    """`generate` of one row at a time: the same tokens, up to and with the one that ends it."""
    model = small_model(seed=3).double()
    prompts = prompts_of(8, seed=2)
    actual = decoder_of(model, sampling=Sampling(temperature=0.0), stop_ids=[0, 5, 7, 11]).responses(prompts)
    for prompt, response in zip(prompts, actual, strict=True):
        ids = torch.from_numpy(prompt.ids)[None]
        theirs = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=[0, 5, 7, 11],
        )
        assert theirs[0, ids.shape[1] :].tolist() == response.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_rows", [1, 4, 7])
def test_a_response_is_the_same_in_any_company(dtype: torch.dtype, block_rows: int) -> None:
    """All together, one at a time, reversed, some of them, beside others: not one token differs."""
    decoder = decoder_of(small_model().to(dtype), block_rows=block_rows)
    prompts = prompts_of(17)
    expected = as_lists(decoder.responses(prompts))
    assert {24} < {len(response) for response in expected}  # some end by themselves, some are cut
    assert expected == [as_lists(decoder.responses([prompt]))[0] for prompt in prompts]
    assert expected[::-1] == as_lists(decoder.responses(prompts[::-1]))
    assert expected[3:11] == as_lists(decoder.responses(prompts[3:11]))
    others = prompts_of(9, seed=5)
    mixed = [prompt for pair in zip(others, prompts, strict=False) for prompt in pair]
    assert expected[:9] == as_lists(decoder.responses(mixed))[1::2]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


WIDE = {"hidden_size": 576, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_do_not_depend_on_the_thread_that_has_them(
    threads: Callable[[int], None], count: int, dtype: torch.dtype
) -> None:
    """Of SmolLM2's heads, whose numbers differed from the first thread's to the second's."""
    threads(count)
    model = small_model(**WIDE).to(dtype)
    with torch.no_grad():
        prove(Slots(model, 8, 96), model)


def test_the_fused_kernel_of_cpus_would_be_noticed(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads the second half of the rows differs from the first, on the machines seen so far."""
    threads(2)
    monkeypatch.setattr(Slots, "_attention", lambda self: nullcontext())
    model = small_model(**WIDE)
    try:
        with torch.no_grad():
            prove(Slots(model, 8, 96), model)
    except ModelError as error:
        assert "depend on its place among 8 rows" in str(error)
    else:
        pytest.skip("here the fused kernel treats all rows alike")


def test_logits_are_the_same_in_any_company_bit_for_bit() -> None:
    """Stronger than tokens: every logit that a token was chosen from, in float32."""
    seen: dict[str, list[torch.Tensor]] = {}

    class Watched(Decoder):
        def _choose(self, logits: Any, rows: Any, prompts: Any) -> None:
            for row, own in zip(rows, logits, strict=True):
                if row is not None:
                    seen.setdefault(prompts[row.number].name, []).append(own.clone())
            super()._choose(logits, rows, prompts)

    decoder = Watched(
        small_model(hidden_size=40, intermediate_size=101),  # no multiples of a vector's width
        sampling=Sampling(),
        max_new_tokens=20,
        stop_ids=[0],
        num_classes=CLASSES,
        block_rows=32,
    )
    prompts = prompts_of(13)
    decoder.responses(prompts)
    expected, seen = seen, {}
    for prompt in prompts[::-1]:
        decoder.responses([prompt])
    assert expected.keys() == seen.keys()
    for name, logits in expected.items():
        assert torch.equal(torch.stack(logits), torch.stack(seen[name])), name


def test_a_batch_of_another_shape_has_other_logits() -> None:
    """Why all this: a row in ordinary batches of 1 and 16 differs in the last digits (in float32, here)."""
    model = small_model(hidden_size=64, intermediate_size=192, num_hidden_layers=4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, CLASSES, (16, 1)))
    with torch.no_grad():
        alone = model(input_ids=ids[:1]).logits[0]
        together = model(input_ids=ids).logits[0]
    assert 0 < (alone - together).abs().max() < 1e-3


def test_random_numbers_belong_to_the_row() -> None:
    """Another key, another response; another limit, the same beginning."""
    decoder = decoder_of(small_model(), stop_ids=[])
    (prompt,) = prompts_of(1)
    same, other = (Prompt(ids=prompt.ids, key=key, name="row") for key in ((0, 0), (0, 1)))
    first, again, third = as_lists(decoder.responses([prompt, same, other]))
    assert first == again != third
    short = decoder_of(small_model(), stop_ids=[], max_new_tokens=9).responses([prompt])
    assert first[:9] == short[0].tolist()


def test_a_response_ends_with_a_stop_token_or_at_the_limit() -> None:
    """And nowhere else; one that ends with its first token has that alone."""
    model = small_model(seed=1)
    responses = as_lists(decoder_of(model, stop_ids=[0, 5, 9]).responses(prompts_of(20)))
    for response in responses:
        assert not {0, 5, 9} & set(response[:-1])
        assert response[-1] in (0, 5, 9) or len(response) == 24
    every = as_lists(decoder_of(model, stop_ids=range(CLASSES)).responses(prompts_of(5)))
    assert [1] * 5 == [len(response) for response in every]
    assert [1] * 5 == [len(r) for r in decoder_of(model, max_new_tokens=1).responses(prompts_of(5))]


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    """Classes behind the tokenizer's stay out, even where they are the likeliest."""
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[90:] = 40 * model.lm_head.weight[:7]  # type: ignore[index, operator]
    decoder = decoder_of(model, sampling=Sampling(temperature=3.0), num_classes=90)
    assert max(int(response.max()) for response in decoder.responses(prompts_of(6))) < 90
    whole = decoder_of(model, sampling=Sampling(temperature=3.0)).responses(prompts_of(6))
    assert max(int(response.max()) for response in whole) >= 90


def test_the_mode_of_the_model_comes_back_and_nothing_has_a_gradient() -> None:
    """A student in training goes on training; dropout is off meanwhile."""
    model = small_model(attention_dropout=0.5)
    expected = as_lists(decoder_of(model).responses(prompts_of(3)))
    model.train()
    assert expected == as_lists(decoder_of(model).responses(prompts_of(3)))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_may_change_between_calls() -> None:
    """A decoder keeps the model, not what it was: that of a student in training is made once."""
    model, prompts = small_model(), prompts_of(5)
    decoder = decoder_of(model)
    before = as_lists(decoder.responses(prompts))
    model.load_state_dict(small_model(seed=8).state_dict())
    after = as_lists(decoder.responses(prompts))
    assert before != after == as_lists(decoder_of(small_model(seed=8)).responses(prompts))


def test_slot_lengths_are_few_and_fit() -> None:
    """Powers of two and one and a half times these; a row's length alone decides."""
    lengths = [slot_length(n) for n in range(1, 4097)]
    assert all(n <= length for n, length in enumerate(lengths, 1))
    assert all(length < 1.5 * max(n, 32) for n, length in enumerate(lengths, 1) if n > 32)
    assert [32, 48, 64, 96, 128, 192, 256] == sorted(set(lengths))[:7]
    assert sorted(lengths) == lengths


# --- what cannot be decoded -----------------------------------------------------------------------------


def test_a_model_without_keys_and_values_is_refused() -> None:
    """One line."""
    model = small_model("Mamba", state_size=4)
    with pytest.raises(ModelError, match=r"Mamba\w+ keeps more of a text than keys and values \(\w+\)"):
        decoder_of(model).responses(prompts_of(2))


def test_prompts_that_are_empty_or_leave_no_room_are_refused() -> None:
    """By name, before anything is computed; up to the last position all is well."""
    model = small_model(max_position_embeddings=64)
    for length, message in (
        (0, "row 9: the prompt is empty"),
        (41, "row 9: a prompt of 41 tokens and a resp"),
    ):
        prompt = Prompt(ids=np.ones(length, dtype=np.int64), key=(0,), name="row 9")
        with pytest.raises(DataError, match=message):
            decoder_of(model).responses([*prompts_of(2), prompt])
    whole = Prompt(ids=np.ones(40, dtype=np.int64), key=(0,), name="row 9")
    assert [24] == [len(response) for response in decoder_of(model, stop_ids=[]).responses([whole])]
    assert [] == decoder_of(model).responses([])


def test_a_window_that_is_too_short_is_refused() -> None:
    """Keys that a model forgets would be seen here; rows that fit are served."""
    model = small_model("Mistral", sliding_window=60)
    with pytest.raises(ModelError, match="sees only the last 60 tokens, and prompt and response may have 64"):
        decoder_of(model).responses(prompts_of(12))
    decoder_of(model, max_new_tokens=8).responses(prompts_of(4, longest=30))


class Disturbed(nn.Module):
    """A small model whose logits are changed."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.model, self.change = small_model(), change
        self.config = self.model.config

    def get_input_embeddings(self) -> Any:
        """Of the model."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    def forward(self, **inputs: Any) -> Any:
        """As the model, but."""
        out = self.model(**inputs)
        out.logits = self.change(out.logits)
        return out


def by_place(logits: torch.Tensor) -> torch.Tensor:
    """Another rounding for every row."""
    return logits * (1 + 1e-6 * torch.arange(len(logits)))[:, None, None]


def by_neighbours(logits: torch.Tensor) -> torch.Tensor:
    """A term from the other rows."""
    return logits + 1e-5 * logits.mean(0, keepdim=True)


@pytest.mark.parametrize("change", [by_place, by_neighbours])
def test_a_model_whose_rows_depend_on_each_other_is_refused(change: Any) -> None:
    """By place or by neighbours, if only in the last digits; alone in its block it is served."""
    with pytest.raises(ModelError, match=r"depend on its place among 4 rows .* set generate.block_rows to a"):
        decoder_of(Disturbed(change)).responses(prompts_of(2))
    decoder_of(Disturbed(change), block_rows=1).responses(prompts_of(2))


def test_a_place_that_a_processor_treats_differently_is_found() -> None:
    """No made-up case: 101 x 5 numbers fill no whole number of vectors, and the last few are computed by
    another exponential. 32 rows always do."""
    odd = small_model(intermediate_size=101)
    with pytest.raises(ModelError, match="depend on its place among 5 rows"):
        decoder_of(odd, block_rows=5).responses(prompts_of(2))
    decoder_of(odd, block_rows=32).responses(prompts_of(2))


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_positions_or_masks_is_refused(lost: str) -> None:
    """Its responses would be wrong, not only different."""
    model = small_model()
    forward = model.forward
    model.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != lost})
    with pytest.raises(ModelError, match=r"logits with a cache differ from the model's own by \d"):
        decoder_of(model).responses(prompts_of(2))


def test_a_slot_that_kept_an_earlier_rows_keys_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: with a mask that shows one key too many, responses depend on who was
    there."""
    good = slots_module.Slots._mask

    def shows_too_much(self: Any, seen: torch.Tensor) -> torch.Tensor:
        return good(self, torch.cat([seen[:, :1], seen[:, :-1]], dim=1))

    model, prompts = small_model(), prompts_of(9)
    expected = as_lists(decoder_of(model).responses(prompts))
    monkeypatch.setattr("ddkmix.generation.decode.prove", lambda slots, model, *, section: None)
    monkeypatch.setattr(slots_module.Slots, "_mask", shows_too_much)
    assert expected != as_lists(decoder_of(model).responses(prompts))


def test_logits_that_are_no_numbers_name_the_row_and_the_token() -> None:
    """At once for a damaged model; for one that overflows on the way, where it does."""
    broken = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        broken.lm_head.weight[:] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(ModelError, match="not finite; its parameters are damaged"):
        decoder_of(broken).responses(prompts_of(2))
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = float("nan")  # type: ignore[union-attr, operator, index]
    prompt = Prompt(ids=np.array([3, 40, 4]), key=(0,), name="math/train-000001.tar#7")
    with pytest.raises(NumericsError, match=r"math/train-000001\.tar#7: the largest logit of token 0 of its"):
        decoder_of(model).responses([prompt])
