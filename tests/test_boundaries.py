"""Documents of a row that do not see each other, and the models that cannot do that."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from ddkmix import prepare
from ddkmix.boundaries import check_isolation, document_positions
from ddkmix.config import RunConfig, parse_config
from ddkmix.distillation import DistillationModel
from ddkmix.domains import load_domains
from ddkmix.errors import ConfigError, DataError, ModelError
from ddkmix.gaps import measure_gaps
from ddkmix.losses import build_terms
from ddkmix.models import backbone_of, hidden_states, load_model
from ddkmix.pack import pack_domains
from ddkmix.predicted_tokens import predicted
from ddkmix.preflight import check
from ddkmix.records import read_lines
from ddkmix.rows import RowReader
from ddkmix.segments import document_positions as numpy_positions
from ddkmix.setup import train
from ddkmix.teacher import LiveTeacher
from ddkmix.teaching import teacher_cache
from ddkmix.tokenizer import read_tokenizer
from tests.conftest import ConfigTree
from tests.test_resume import assert_same_outcome, rewound, run

Make = Callable[..., ConfigTree]
SEP = 0
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**TINY, "num_key_value_heads": 2}
KEEP_APART: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama eager": ("Llama", {**GROUPED, "attn_implementation": "eager"}),
    "gpt-neox": ("GPTNeoX", TINY),
    "qwen2": ("Qwen2", GROUPED),
    "sliding window": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "soft caps": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"}),
    "learned positions": ("GPT2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "experts": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
}
LEAK: dict[str, tuple[str, dict[str, Any]]] = {
    "state space": ("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
    "convolutions": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    "no position_ids": ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "positions without attention": (
        "Falcon",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}


def model_of(name: str, settings: dict[str, Any], *, seed: int = 0) -> Any:
    """A small random model of a transformers architecture, in evaluation mode."""
    settings = dict(settings)
    options = {"attn_implementation": settings.pop("attn_implementation", "sdpa")}
    if name in ("Mamba", "Bloom", "Mpt"):
        options = {}
    torch.manual_seed(seed)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, head)._from_config(config, **options).eval()


def segments_of(row: list[int]) -> list[list[int]]:
    """The documents of a row; a separator begins the one behind it."""
    found: list[list[int]] = []
    for i, token in enumerate(row):
        if i == 0 or token == SEP:
            found.append([])
        found[-1].append(token)
    return found


ROWS = torch.tensor(
    [
        [5, 6, 7, 8, 0, 9, 10, 11, 12, 13, 14, 0, 15, 16, 0, 0],
        [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35],
        [0, 40, 0, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 0],
    ]
)


# --- positions --------------------------------------------------------------------------------------


def test_positions_are_those_of_numpy() -> None:
    """The trainer and somebody else's loop see the same documents; without a separator there are none."""
    random = torch.randint(0, 4, (50, 40), generator=torch.Generator().manual_seed(0))
    for rows in (ROWS, random, random[:, :1]):
        assert numpy_positions(rows.numpy(), SEP).tolist() == document_positions(rows, SEP).tolist()
    assert document_positions(ROWS, None) is None


# --- rows and their documents alone -----------------------------------------------------------------


def alone(model: Any, row: list[int]) -> torch.Tensor:
    """The hidden states of each document of a row, which knows of no other, joined."""
    return torch.cat(
        [backbone_of(model)(torch.tensor([part])).last_hidden_state[0] for part in segments_of(row)]
    )


@pytest.mark.parametrize("architecture", KEEP_APART)
def test_a_row_has_the_hidden_states_of_its_documents(architecture: str) -> None:
    """Documents in a row of a batch and alone differ by rounding only.

    That is 1e-15 where attention computes in float64; eager attention takes its softmax in float32, and
    grouped experts know no float64.
    """
    model = model_of(*KEEP_APART[architecture])
    model = model if architecture == "experts" else model.double()
    exact = architecture not in ("experts", "llama eager", "soft caps")
    close = {"rtol": 1e-10, "atol": 1e-10} if exact else {"rtol": 1e-5, "atol": 1e-6}
    check_isolation(model, SEP)
    hidden = LiveTeacher(model, separator_id=SEP).signal({"input_ids": ROWS}).hidden
    expected = torch.stack([alone(model, row) for row in ROWS.tolist()])
    torch.testing.assert_close(expected, hidden, **close)
    open_row = LiveTeacher(model).signal({"input_ids": ROWS}).hidden
    assert (open_row - expected)[0].abs().max() > 1e-3
    torch.testing.assert_close(expected[1], open_row[1], **close)


TERMS = build_terms(RunConfig.model_fields["loss"].default)


def objective(model: Any, teacher: Any, separator_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """DDK's objective of the rows without their padding, and its values at each predicted token."""
    labels = ROWS.clone()
    labels[0, -1] = -100
    signal = LiveTeacher(teacher, separator_id=separator_id).signal({"input_ids": ROWS})
    ours = DistillationModel(model, separator_id=separator_id, chunk_tokens=5)
    return ours(ROWS, labels, 1 / int(predicted(labels).sum()), TERMS, signal)


def literal(model: Any, teacher: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from documents alone, with full logits."""
    values = []
    for number, row in enumerate(ROWS.tolist()):
        targets = torch.tensor(row[1:-1] if number == 0 else row[1:])
        hidden = [alone(one, row)[: len(targets)] for one in (model, teacher)]
        log_q, log_p = (
            F.log_softmax(one.get_output_embeddings()(states), dim=-1)
            for one, states in zip((model, teacher), hidden, strict=True)
        )
        cross_entropy = F.nll_loss(log_q, targets, reduction="none")
        values.append(torch.stack([cross_entropy, (log_p.exp() * (log_p - log_q)).sum(-1)]))
    joined = torch.cat(values, dim=1)
    return (joined[0] + 0.2 * joined[1]).mean(), joined.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_the_documents(attention: str) -> None:
    """The distillation objective over packed rows is that of documents that were never packed."""
    settings = {**GROUPED, "attn_implementation": attention}
    model, teacher = (model_of("Llama", settings, seed=seed).double() for seed in (0, 1))
    expected, expected_values = literal(model, teacher.requires_grad_(False))
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    value, values = objective(model, teacher, SEP)
    # the loss is chunked in float32
    torch.testing.assert_close(expected_values.float(), values.float(), rtol=1e-5, atol=1e-5)
    assert expected.item() == pytest.approx(value.item(), rel=1e-6)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    for name, theirs, own in zip(dict(model.named_parameters()), expected_gradients, gradients, strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_comparison_notices_open_rows() -> None:
    """Without a separator the same rows have other losses, by far more than rounding."""
    model, teacher = (model_of("Llama", GROUPED, seed=seed).double() for seed in (0, 1))
    _, expected = literal(model, teacher)
    _, values = objective(model, teacher, None)
    assert (expected - values)[0].abs().max() > 1e-3


def test_nothing_changes_without_the_option() -> None:
    """Bit for bit the model's own causal attention."""
    model = model_of("Llama", GROUPED)
    assert torch.equal(
        backbone_of(model)(ROWS, use_cache=False).last_hidden_state, hidden_states(model, ROWS)
    )
    assert torch.equal(hidden_states(model, ROWS), LiveTeacher(model).signal({"input_ids": ROWS}).hidden)


# --- the proof --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", KEEP_APART)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_documents_apart_are_accepted(architecture: str, dtype: torch.dtype) -> None:
    """Also in bfloat16, where a document in a row and alone differ by a hundredth."""
    check_isolation(model_of(*KEEP_APART[architecture]).to(dtype), SEP)


@pytest.mark.parametrize("architecture", LEAK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_leak_are_refused(architecture: str, dtype: torch.dtype) -> None:
    """Real architectures that ignore `position_ids` or take them for positions only; one line says so."""
    model = model_of(*LEAK[architecture]).to(dtype)
    with pytest.raises(ModelError, match="does not keep the documents of a row apart") as info:
        check_isolation(model, SEP)
    assert "\n" not in str(info.value)
    assert type(model).__name__ in str(info.value)


class WithoutPositions(torch.nn.Module):
    """A backbone somebody wrapped, whose forward takes no position ids."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.embed_tokens = backbone, backbone.embed_tokens

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        """No position ids."""
        return self.backbone(input_ids=input_ids, use_cache=use_cache)


def test_a_forward_without_position_ids_is_refused() -> None:
    """What Python says about the argument is in the message."""
    model = model_of("Llama", GROUPED)
    model.model = WithoutPositions(model.model)
    with pytest.raises(ModelError, match="unexpected keyword argument 'position_ids'"):
        check_isolation(model, SEP)


def test_positions_that_do_not_restart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention kept apart is not enough where positions are learned: the second document would be late."""
    model = model_of("GPT2", KEEP_APART["learned positions"][1])
    wpe = model.transformer.wpe
    absolute = lambda positions: F.embedding(torch.arange(positions.shape[-1])[None], wpe.weight)  # noqa: E731
    monkeypatch.setattr(wpe, "forward", absolute)
    with pytest.raises(ModelError, match=r"hidden states differ from those alone by 1\.3 of the largest"):
        check_isolation(model, SEP)


def test_only_the_first_row_of_a_batch_kept_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel does that builds one mask for all rows."""
    model = model_of("Llama", GROUPED)
    forward = model.model.forward

    def first_only(input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids[:1].expand_as(position_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, **options)

    monkeypatch.setattr(model.model, "forward", first_only)
    with pytest.raises(ModelError, match="changed by"):
        check_isolation(model, SEP)


def in_company(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tokens round otherwise in other company, as experts do that share their tokens' batches."""
    forward = model.model.forward

    def rounded(**options: Any) -> Any:
        output = forward(**options)
        output.last_hidden_state = output.last_hidden_state + 1e-4 * output.last_hidden_state.mean((0, 1))
        return output

    monkeypatch.setattr(model.model, "forward", rounded)


def test_rounding_in_company_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes as much with another row of the batch, where nothing can be seen, is noise."""
    model = model_of("Llama", GROUPED)
    in_company(model, monkeypatch)
    check_isolation(model, SEP)


def test_a_leak_louder_than_the_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions over three tokens change a random model by one part in ten thousand."""
    model = model_of(*LEAK["convolutions"])
    in_company(model, monkeypatch)
    with pytest.raises(ModelError, match="changed by"):
        check_isolation(model, SEP)


def test_the_proof_leaves_the_model_as_it_was() -> None:
    """Training mode, parameters and random numbers; any separator will do, also the last token."""
    model = model_of("Llama", GROUPED).train()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    check_isolation(model, 63)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_student_and_teacher_are_proved_when_they_are_wrapped() -> None:
    """Neither goes unnoticed, and neither is asked when rows are open."""
    model = model_of(*LEAK["positions without attention"])
    DistillationModel(model)
    LiveTeacher(model)
    for wrap in (DistillationModel, LiveTeacher):
        with pytest.raises(ModelError, match="FalconForCausalLM does not keep"):
            wrap(model, separator_id=SEP)


# --- runs -------------------------------------------------------------------------------------------

APART = {"steps": 6, "checkpoint_steps": 2, "document_boundaries": True}
BEST_FIT = {"strategy": "best_fit"}


def config_of(tree: ConfigTree) -> RunConfig:
    """The config of a tree."""
    return parse_config(tree, where="test")


@pytest.mark.parametrize("strategy", ["concatenate", "best_fit"])
def test_held_out_losses_are_those_of_the_documents(
    tiny_config: Make, tiny_teacher: Path, strategy: str
) -> None:
    """The gaps command's teacher loss, recomputed document by document from the packed rows."""
    config = config_of(
        tiny_config(trainer=APART, pack={"strategy": strategy, "seq_len": 96}, evaluation={"rows": 100})
    )
    losses, _ = measure_gaps(config)
    packed = prepare.open_rows(check(config), shown=False)["math"].held_out
    teacher, reader = load_model(str(tiny_teacher)), RowReader(packed)
    sums, count = 0.0, 0
    for number in range(packed.num_rows):
        row = reader.read(0, number).astype(np.int64).tolist()
        targets = torch.tensor(row[1 : int(packed.shards[0].num_tokens[number])])
        with torch.no_grad():
            logits = teacher.lm_head(alone(teacher, row)[: len(targets)])
        sums += F.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += len(targets)
    where = losses.domains.index("math")
    assert count == losses.num_tokens[where]
    assert sums / count == pytest.approx(losses.teacher_loss[where], rel=1e-6)


def test_open_rows_have_other_held_out_losses(tiny_config: Make) -> None:
    """Of student and teacher; the teacher's, which are kept on disk, are not taken for each other."""
    losses = {
        apart: measure_gaps(
            config_of(tiny_config(trainer={"document_boundaries": apart}, pack={"seq_len": 96}))
        )[0]
        for apart in (True, False, True)
    }
    for name in ("teacher_loss", "student_loss"):
        assert (getattr(losses[True], name) != getattr(losses[False], name)).all()
    assert losses[True].num_tokens.tolist() == losses[False].num_tokens.tolist()
    assert losses[True].num_bytes.tolist() == losses[False].num_bytes.tolist()


def test_the_teachers_cache_knows_the_setting(tiny_config: Make) -> None:
    """One file for rows with boundaries, another for open ones."""
    keys = {
        teacher_cache(
            check(config_of(tiny_config(trainer={"document_boundaries": apart}))), "math", torch.device("cpu")
        )._model
        for apart in (True, False)
    }
    assert 2 == len(keys)


def test_a_whole_run_with_boundaries_and_best_fit_resumes_exactly(tmp_path: Path, tiny_config: Make) -> None:
    """Trains, lowers the loss, and resumed in the middle it is the uninterrupted run to the last bit."""
    tree = tiny_config(trainer={**APART, "keep_checkpoints": 9}, pack=BEST_FIT, optimizer={"lr": 1e-2})
    full = run(tree, tmp_path / "full")
    first, *_, last = [line["train/objective"] for line in read_lines(full / "metrics.jsonl")]
    assert last < first
    assert_same_outcome(full, run(tree, rewound(full, tmp_path / "part", 2), resume=True))


def test_micro_batches_give_the_same_run(tmp_path: Path, tiny_config: Make) -> None:
    """Rows see nothing of each other, so a batch of six and three of two agree to rounding."""
    metrics = {}
    for rows in (None, 2):
        tree = tiny_config(
            trainer={**APART, "microbatch_rows": rows}, pack=BEST_FIT, run_dir=str(tmp_path / f"run{rows}")
        )
        train(config_of(tree))
        metrics[rows] = read_lines(tmp_path / f"run{rows}" / "metrics.jsonl")
    for whole, parts in zip(metrics[None], metrics[2], strict=True):
        assert whole["train/objective"] == pytest.approx(parts["train/objective"], rel=1e-4)
        assert whole["train/grad_norm"] == pytest.approx(parts["train/grad_norm"], rel=1e-3)


def test_training_losses_differ_from_those_of_open_rows(tmp_path: Path, tiny_config: Make) -> None:
    """The setting reaches the training step: the first step sees the same rows and other losses."""
    objectives = set()
    for apart in (True, False):
        tree = tiny_config(
            trainer={"steps": 1, "document_boundaries": apart},
            pack={"seq_len": 96},
            run_dir=str(tmp_path / f"{apart}"),
        )
        train(config_of(tree))
        objectives.add(next(iter(read_lines(tmp_path / f"{apart}" / "metrics.jsonl")))["train/objective"])
    assert 2 == len(objectives)
    assert all(math.isfinite(value) for value in objectives)


def test_a_separator_that_text_contains_is_refused_before_a_model_is_loaded(tiny_config: Make) -> None:
    """`lint` says so; without boundaries any token may separate."""
    check(config_of(tiny_config(pack={"separator": "a"})))
    with pytest.raises(ConfigError, match=r"pack.separator = 'a' is not a special token"):
        check(config_of(tiny_config(pack={"separator": "a"}, trainer={"document_boundaries": True})))


def test_rows_with_separators_inside_documents_are_refused(
    tmp_path: Path, tiny_domains: Path, tokenizer_folder: Path
) -> None:
    """The packed rows themselves are counted: here "a" separates, and the documents are full of it."""
    tokenizer = read_tokenizer(str(tokenizer_folder), separator="a")
    packed = pack_domains(
        load_domains([str(tiny_domains / "math.yaml")]),
        tokenizer,
        seq_len=32,
        cache_dir=tmp_path,
        processes=1,
    )["math"].train
    with pytest.raises(DataError, match=r"domain 'math': \d+ tokens in the text of train-000000.tar are the"):
        prepare._check_separators(packed, tokenizer)
    json.dumps(packed.shards[0].report)
