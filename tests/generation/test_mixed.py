"""Two models that draw together: p~ = a p + (1 - a) q at every token, and the same responses in any batch."""

import numpy as np
import pytest
import torch
from torch import nn

from ddkmix.generation.decode import Beside, Prompt
from ddkmix.generation.sampling import Sampling, choose
from ddkmix.generation.slots import MixedSlots, Slots
from ddkmix.truncation import seeded_uniforms
from tests.generation.models import CLASSES, decoder_of, prompts_of, small_model

PLAIN = Sampling()
SHARE = 0.3
NEW, STOP = 10, [0, 5]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A student, and a teacher of another depth whose vocabulary has more padding; in float64."""
    student = small_model(seed=1, num_hidden_layers=1, vocab_size=CLASSES + 3)
    return student.double(), small_model(seed=2, vocab_size=CLASSES + 8).double()


@torch.no_grad()
def mixture(models: tuple[nn.Module, nn.Module], ids: list[int], share: float) -> torch.Tensor:
    """(V,) a p + (1 - a) q behind some tokens, by whole passes; each model's mass is on the tokens."""
    logits = (model(input_ids=torch.tensor([ids])).logits[0, -1, :CLASSES] for model in models)
    q, p = (values.double().softmax(-1) for values in logits)
    return share * p + (1 - share) * q


def slowest(models: tuple[nn.Module, nn.Module], prompt: Prompt, share: float) -> list[int]:
    """The response by the inverse of the mixture's distribution function, a token at a time."""
    response: list[int] = []
    for number in seeded_uniforms(list(prompt.key), NEW, 1)[:, 0]:
        ends = mixture(models, [*prompt.ids.tolist(), *response], share).cumsum(-1)
        response.append(int((ends <= number * ends[-1]).sum()))
        if response[-1] in STOP:
            break
    return response


def mixed_decoder(models: tuple[nn.Module, nn.Module], share: float, **changes: object) -> object:
    """With the teacher beside the student."""
    settings = {"sampling": PLAIN, "max_new_tokens": NEW, "stop_ids": STOP, **changes}
    return decoder_of(models[0], beside=Beside(model=models[1], share=share), **settings)


def test_responses_are_drawn_from_the_mixture(models: tuple[nn.Module, nn.Module]) -> None:
    """Token for token what whole passes of both models, their mean and one random number give."""
    prompts = prompts_of(7)
    found = mixed_decoder(models, SHARE).responses(prompts)  # type: ignore[attr-defined]
    expected = [slowest(models, prompt, SHARE) for prompt in prompts]
    assert expected == [response.tolist() for response in found]
    assert expected != [slowest(models, prompt, 0.0) for prompt in prompts]  # the comparison can fail


def test_the_mixture_is_one_of_probabilities(models: tuple[nn.Module, nn.Module]) -> None:
    """a p + (1 - a) q behind a prompt and behind a token more, to 1e-6, and not of logits; as many of a
    grid of random numbers fall on each class."""
    slots = MixedSlots(*(Slots(m, 2, 32) for m in models), share=SHARE, num_classes=CLASSES)
    ids = torch.tensor([3, 14, 15, 92])
    with torch.no_grad():
        read = slots.read(ids)
        slots.fill(0, read)
        slots.fill(1, read)
        after = slots.step(torch.tensor([6, 53]), torch.tensor([4, 4]))
    expected = mixture(models, ids.tolist(), SHARE)
    torch.testing.assert_close(read.logits[0].double().exp(), expected, rtol=1e-5, atol=1e-7)
    for row, token in enumerate((6, 53)):
        truth = mixture(models, [*ids.tolist(), token], SHARE)
        torch.testing.assert_close(after[row].double().exp(), truth, rtol=1e-5, atol=1e-7)
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = choose(read.logits.expand(len(grid), -1), grid, PLAIN)
    shares = torch.bincount(drawn, minlength=CLASSES) / len(grid)
    assert (shares - expected).abs().max() < 1.01 / len(grid)
    logits = [m(input_ids=ids[None]).logits[0, -1, :CLASSES] for m in models]
    of_logits = ((1 - SHARE) * logits[0] + SHARE * logits[1]).softmax(-1)
    assert (of_logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("block_rows", [1, 3, 8])
def test_neither_batch_nor_block_changes_a_response(
    models: tuple[nn.Module, nn.Module], block_rows: int
) -> None:
    """All prompts at once, turned round, or one after the other."""
    prompts, decoder = prompts_of(6, seed=4), mixed_decoder(models, SHARE, block_rows=block_rows)
    whole = [r.tolist() for r in decoder.responses(prompts)]  # type: ignore[attr-defined]
    turned = [r.tolist() for r in decoder.responses(prompts[::-1])]  # type: ignore[attr-defined]
    alone = [decoder.responses([prompt])[0].tolist() for prompt in prompts]  # type: ignore[attr-defined]
    assert whole == turned[::-1] == alone


def test_with_no_share_the_student_speaks_and_with_all_of_it_the_teacher(
    models: tuple[nn.Module, nn.Module],
) -> None:
    """In the limit: 1e-12 and 1 - 1e-12."""
    prompts = prompts_of(5, seed=2)
    settings = {"sampling": PLAIN, "max_new_tokens": NEW, "stop_ids": STOP}
    for share, model in ((1e-12, models[0]), (1 - 1e-12, models[1])):
        alone = decoder_of(model, **settings).responses(prompts)
        found = mixed_decoder(models, share).responses(prompts)  # type: ignore[attr-defined]
        assert [r.tolist() for r in alone] == [r.tolist() for r in found]
    assert all(not model.training for model in models)


def test_under_autocast_a_model_proves_what_its_type_allows() -> None:
    """Parameters in float32 and products in bfloat16: rounding is that of bfloat16, and responses are the
    same in any company."""
    model, prompts = small_model(seed=3, num_hidden_layers=8), prompts_of(4)
    decoder = decoder_of(model, max_new_tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        whole = [r.tolist() for r in decoder.responses(prompts)]
        alone = [decoder.responses([prompt])[0].tolist() for prompt in prompts]
    assert whole == alone
    assert np.mean([len(response) for response in whole]) > 1
