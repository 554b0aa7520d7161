"""Domain losses of any model beside its teacher's, without a config; what is left as it was."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ddkmix import GapEvaluator
from ddkmix.config import Teacher
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError, DataError, ModelError, NumericsError
from ddkmix.evaluator import Evaluator
from ddkmix.models import load_teacher
from ddkmix.policies import reweight
from ddkmix.predictions import logits_of
from ddkmix.trainer import token_nats
from tests.conftest import save_tiny_model, write_domain
from tests.hand_made import write_rows

VOCABULARY = 30


class Table(nn.Module):
    """A model that knows how likely each token follows another; dropout, a child in evaluation mode."""

    def __init__(self, seed: int = 0, classes: int = VOCABULARY) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(classes, classes, generator=generator))
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)
        self.frozen.eval()
        self.calls = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.calls += 1
        assert not torch.is_grad_enabled()
        return self.dropout(self.table[input_ids])  # type: ignore[no-any-return]


def items(seed: int, count: int = 5) -> list[dict[str, Any]]:
    """Random items of different length."""
    generator = np.random.default_rng(seed)
    return [
        {"input_ids": generator.integers(0, VOCABULARY, generator.integers(2, 9)).tolist()}
        for _ in range(count)
    ]


HELD_OUT = {"math": items(1), "code": items(2, 7)}


def by_hand(model: Table, dataset: list[dict[str, Any]]) -> float:
    """Mean nats of every token but each item's first, one after the other."""
    logs = model.table.detach().double().log_softmax(dim=1)
    pairs = [
        (a, b) for item in dataset for a, b in zip(item["input_ids"], item["input_ids"][1:], strict=False)
    ]
    return -sum(float(logs[a, b]) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_losses_are_means_over_predicted_tokens(batch_rows: int) -> None:
    """Of student and teacher, in evaluation mode, by hand."""
    student, teacher = Table(0), Table(1)
    losses = GapEvaluator(HELD_OUT, teacher=teacher, batch_rows=batch_rows).measure(student)
    assert ("code", "math") == losses.domains
    wanted = [[by_hand(model, HELD_OUT[name]) for name in losses.domains] for model in (student, teacher)]
    assert wanted[0] == pytest.approx(losses.student_loss.tolist(), rel=1e-5)
    assert wanted[1] == pytest.approx(losses.teacher_loss.tolist(), rel=1e-5)
    assert [sum(len(item["input_ids"]) - 1 for item in HELD_OUT[name]) for name in losses.domains] == (
        losses.num_tokens.tolist()
    )


def test_packed_rows_have_the_losses_of_our_own_trainer(tmp_path: Path, tiny_teacher: Path) -> None:
    """The same rows through the trainer's chunked loss and through whole logits: equal to float32."""
    generator = np.random.default_rng(0)
    shards = [[generator.integers(1, 300, n).tolist() for n in (16, 9, 2, 16, 12)]]
    rows = {"code": write_rows(tmp_path, "code", shards, seq_len=16, padding=0)}
    other = save_tiny_model(tmp_path / "student", tiny_teacher, seed=7)
    student = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    evaluator = GapEvaluator(rows, teacher=str(tiny_teacher), batch_rows=2, cache_dir=tmp_path / "cache")
    own = Evaluator(held_out=evaluator._held_out, batch_rows=3, device=torch.device("cpu"))
    teacher = load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))
    wanted = own.measure(
        token_nats(DistillationModel(student)), own.sums(token_nats(DistillationModel(teacher)))
    )
    found = evaluator.measure(student)
    for name in ("student_loss", "teacher_loss", "student_error", "gap_error"):
        assert getattr(wanted, name).tolist() == pytest.approx(getattr(found, name).tolist(), rel=1e-5)


def test_a_teacher_in_a_folder_is_loaded_once_for_ever(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second evaluator finds its sums; other items or another teacher it measures."""
    from ddkmix import gap_evaluator

    loaded = []

    def counting(teacher: Teacher) -> Any:
        loaded.append(teacher.model)
        return load_teacher(teacher)

    monkeypatch.setattr(gap_evaluator, "load_teacher", counting)
    folder = save_tiny_model(tmp_path / "teacher", tokenizer_folder)
    student = Table(classes=320)

    def measure(held_out: Any = HELD_OUT, teacher: Path = folder) -> list[float]:
        evaluator = GapEvaluator(held_out, teacher=teacher, cache_dir=tmp_path / "cache")
        assert evaluator.measure(student).domains == evaluator.measure(student).domains
        return evaluator.measure(student).teacher_loss.tolist()  # type: ignore[no-any-return]

    first = measure()
    assert (1, first) == (len(loaded), measure())
    assert 1 == len(loaded)
    measure({**HELD_OUT, "math": items(3)})
    assert 2 == len(loaded)
    measure(teacher=save_tiny_model(tmp_path / "other", tokenizer_folder, seed=5))
    assert 3 == len(loaded)


def test_losses_of_ones_own_logits_are_not_taken_for_those_of_the_model(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Over fewer classes a loss is another one; neither order finds the other's in the cache."""
    folder, student = save_tiny_model(tmp_path / "teacher", tokenizer_folder), Table(classes=320)

    def measure(cache: str, classes: int | None) -> list[float]:
        cut = None if classes is None else lambda model, ids: logits_of(model, ids)[..., :classes]
        evaluator = GapEvaluator(HELD_OUT, teacher=folder, cache_dir=tmp_path / cache, logits=cut)
        return evaluator.measure(student).teacher_loss.tolist()  # type: ignore[no-any-return]

    whole, cut = measure("one", None), measure("other", VOCABULARY)
    assert all(a > b + 1 for a, b in zip(whole, cut, strict=True))
    assert (cut, whole) == (measure("one", VOCABULARY), measure("other", None))
    assert measure("one", 2 * VOCABULARY) not in (whole, cut)


def test_any_string_is_a_domain_of_ones_own(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Names of domains are no names of files: nothing lies elsewhere, none is too long, none is another's."""
    folder, names = (
        save_tiny_model(tmp_path / "teacher", tokenizer_folder),
        ["../../escaped/x", "a" * 300, "b/c"],
    )
    held_out = {name: items(i) for i, name in enumerate(names)}
    evaluator = GapEvaluator(held_out, teacher=folder, cache_dir=tmp_path / "deep" / "in" / "cache")
    first = evaluator.measure(Table(classes=320))
    found = {path.parent for path in tmp_path.rglob("*.f8")}
    assert {tmp_path / "deep" / "in" / "cache" / "teacher_nats"} == found
    again = GapEvaluator(held_out, teacher=folder, cache_dir=tmp_path / "deep" / "in" / "cache")
    assert first.to_json() == again.measure(Table(classes=320)).to_json()


def test_without_a_teacher_the_gap_is_to_a_reference_or_to_nothing() -> None:
    """Given losses, or 0: then the gap is the loss itself."""
    student = Table()
    losses = GapEvaluator(HELD_OUT, reference={"code": 1.5, "math": 2.0}).measure(student)
    assert [1.5, 2.0] == pytest.approx(losses.teacher_loss.tolist())
    losses = GapEvaluator(HELD_OUT).measure(student)
    assert losses.student_loss.tolist() == losses.loss_gap.tolist()


def test_a_teacher_module_is_measured_once_and_let_go() -> None:
    """Its device, its mode and its gradients stay as they are."""
    student, teacher = Table(0), Table(1)
    evaluator = GapEvaluator(HELD_OUT, teacher=teacher, batch_rows=100)
    evaluator.measure(student)
    evaluator.measure(student)
    assert (4, 2) == (student.calls, teacher.calls)
    assert teacher.training
    assert evaluator._teacher is None


def excess_and_kl_by_hand(student: Table, teacher: Table, dataset: list[dict[str, Any]]) -> list[float]:
    """Means over every token but each item's first, in float64, over all classes."""
    log_q, log_p = (model.table.detach().double().log_softmax(dim=1) for model in (student, teacher))
    pairs = [p for item in dataset for p in zip(item["input_ids"], item["input_ids"][1:], strict=False)]
    excess = [max(0.0, float(log_p[a, b] - log_q[a, b])) for a, b in pairs]
    kl = [float((log_p[a].exp() * (log_p[a] - log_q[a])).sum()) for a, _ in pairs]
    return [sum(excess) / len(pairs), sum(kl) / len(pairs)]


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_excess_and_divergence_by_hand(batch_rows: int) -> None:
    """max(0, student - teacher) of every token, KL(teacher || student) at every position, in one pass."""
    student, teacher = Table(0), Table(1)
    options: dict[str, Any] = {"teacher": teacher, "batch_rows": batch_rows}
    evaluator = GapEvaluator(HELD_OUT, measures=["excess_loss", "forward_kl"], **options)
    losses = evaluator.measure(student)
    assert losses.excess_loss is not None
    assert losses.forward_kl is not None
    for i, name in enumerate(losses.domains):
        found = [losses.excess_loss[i], losses.forward_kl[i]]
        assert excess_and_kl_by_hand(student, teacher, HELD_OUT[name]) == pytest.approx(found, rel=1e-5)
    plain = GapEvaluator(HELD_OUT, **options).measure(student)
    for column in ("student_loss", "teacher_loss", "student_error", "gap_error"):
        assert getattr(plain, column).tolist() == getattr(losses, column).tolist()
    assert (None, None) == (plain.excess_loss, plain.forward_kl)
    calls = student.calls
    assert (calls // 2, teacher.training) == (teacher.calls - calls, True)
    again = evaluator.measure(teacher)
    assert again.forward_kl is not None
    assert again.excess_loss is not None
    assert [0.0] * 4 == pytest.approx([*again.forward_kl, *again.excess_loss], abs=1e-6)


def test_excess_needs_a_kept_teacher_once_and_divergence_every_time(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of before, without single tokens, is added to; the gap stays to the last bit."""
    from ddkmix import gap_evaluator

    loaded = []

    def counting(teacher: Teacher) -> Any:
        loaded.append(teacher.model)
        return load_teacher(teacher)

    monkeypatch.setattr(gap_evaluator, "load_teacher", counting)
    folder, student = save_tiny_model(tmp_path / "teacher", tokenizer_folder), Table(classes=320)

    def measure(*measures: str) -> Any:
        evaluator = GapEvaluator(HELD_OUT, teacher=folder, cache_dir=tmp_path / "cache", measures=measures)
        evaluator.measure(student)
        return evaluator.measure(student), len(loaded)

    plain, first = measure()
    excess, second = measure("excess_loss")
    again, third = measure("excess_loss")
    both, fourth = measure("excess_loss", "forward_kl")
    assert [1, 2, 2, 3] == [first, second, third, fourth]
    assert excess.excess_loss.tolist() == again.excess_loss.tolist() == both.excess_loss.tolist()
    assert plain.teacher_loss.tolist() == excess.teacher_loss.tolist() == both.teacher_loss.tolist()
    assert (both.forward_kl > 0).all()


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("look at a teacher token by token, and there is none", {"measures": ["excess_loss"]}),
        ("and there is none", {"measures": ["forward_kl"], "reference": {"code": 1.0, "math": 1.0}}),
        (r"measures = \['entropy'\]; give a set of excess_loss, forward_kl", {"measures": ["entropy"]}),
        ("measures = 'forward_kl'; give a set of", {"measures": "forward_kl"}),
    ],
)
def test_measures_without_a_teacher_are_refused_at_once(expected: str, options: dict[str, Any]) -> None:
    """One line, before any model is seen."""
    with pytest.raises(ConfigError, match=expected):
        GapEvaluator(HELD_OUT, **options)


def test_divergence_between_different_numbers_of_classes_is_refused() -> None:
    """Padding is cut by whoever knows that it is padding."""
    evaluator = GapEvaluator(HELD_OUT, teacher=Table(1, VOCABULARY + 2), measures=["forward_kl"])
    with pytest.raises(ModelError, match="the teacher has 32 classes and the student 30; forward_kl is over"):
        evaluator.measure(Table(0))
    cut = GapEvaluator(
        HELD_OUT,
        teacher=Table(1, VOCABULARY + 2),
        measures=["forward_kl"],
        logits=lambda model, ids: model(ids)[..., :VOCABULARY],
    )
    assert cut.measure(Table(0)).forward_kl is not None


def test_cards_give_references_where_there_is_no_teacher(tmp_path: Path, tokenizer_folder: Path) -> None:
    """In bits per byte; a teacher or other references come first; all cards or none."""
    for name in ("code", "math"):
        write_domain(tmp_path, name, reference_loss={"model": "big", "bits_per_byte": 0.5})
    options: dict[str, Any] = {
        "tokenizer": str(tokenizer_folder), "seq_len": 32, "cache_dir": tmp_path / "cache", "rows": 3
    }  # fmt: skip
    student = Table(classes=320)
    losses = GapEvaluator.from_cards(str(tmp_path), **options).measure(student)
    assert [0.5, 0.5] == pytest.approx(losses.teacher_bits_per_byte.tolist())
    given = GapEvaluator.from_cards(str(tmp_path), reference={"code": 1.0, "math": 2.0}, **options)
    assert [1.0, 2.0] == pytest.approx(given.measure(student).teacher_loss.tolist())
    write_domain(tmp_path, "math")
    with pytest.raises(DataError, match="has no reference_loss, and 1 of 2 cards have one"):
        GapEvaluator.from_cards(str(tmp_path), **options)
    GapEvaluator.from_cards(str(tmp_path), teacher=Table(1, classes=320), **options)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    """Each module in its own mode, no gradients, gradients of before kept; also after an error."""
    student = Table()
    student.table.grad = torch.ones_like(student.table)
    modes = [module.training for module in student.modules()]
    assert [True, True, False] == modes

    def failing(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        assert not any(module.training for module in model.modules())
        if fails:
            raise ValueError("out of luck")
        return model(input_ids)  # type: ignore[no-any-return]

    evaluator = GapEvaluator(HELD_OUT, logits=failing)
    if fails:
        with pytest.raises(ValueError, match="out of luck"):
            evaluator.measure(student)
    else:
        evaluator.measure(student)
    assert modes == [module.training for module in student.modules()]
    assert torch.equal(torch.ones_like(student.table), student.table.grad)
    assert torch.is_grad_enabled()


class Giving(nn.Module):
    """A model that gives its logits in some wrapping."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = Table(), wrap

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Wrapped."""
        return self.wrap(self.inner(input_ids))


def as_output(logits: torch.Tensor) -> Any:
    """What transformers' models give."""
    from transformers.modeling_outputs import CausalLMOutput

    return CausalLMOutput(logits=logits)


WRAPPINGS = {
    "tensor": lambda logits: logits,
    "output": as_output,
    "object": lambda logits: SimpleNamespace(logits=logits),
    "dict": lambda logits: {"logits": logits},
    "bfloat16": lambda logits: logits.bfloat16(),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_logits_are_found_in_what_models_give(name: str) -> None:
    """Tensors, outputs of transformers, anything with `logits`; counted in float32."""
    found = GapEvaluator(HELD_OUT).measure(Giving(WRAPPINGS[name])).student_loss.tolist()
    plain = GapEvaluator(HELD_OUT).measure(Table()).student_loss.tolist()
    assert plain == pytest.approx(found, rel=1e-2 if name == "bfloat16" else 1e-6)


@pytest.mark.parametrize(
    ("expected", "wrap"),
    [
        ("Giving gives a tuple without logits; pass logits=(model, input_ids)", lambda logits: (logits,)),
        ("Giving gives a dict without logits", lambda logits: {"scores": logits}),
        ("Giving gives a NoneType without logits", lambda logits: None),
        ("gives logits (1, 0, 30) for tokens (1,", lambda logits: logits[:1, :0]),
        ("they must be (B, T, V). Pass logits=...", lambda logits: logits[..., 0]),
        ("Giving knows 3 tokens and held-out rows have token", lambda logits: logits[..., :3]),
    ],
)
def test_what_has_no_logits_is_refused_in_one_line(expected: str, wrap: Any) -> None:
    """A tuple may begin with a loss: the user says what it is."""
    with pytest.raises(ModelError) as info:
        GapEvaluator(HELD_OUT, batch_rows=1).measure(Giving(wrap))
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


def test_a_tuple_is_unpacked_by_the_user() -> None:
    """`logits` calls the model as it wants to be called."""
    evaluator = GapEvaluator(HELD_OUT, logits=lambda model, input_ids: model(input_ids)[0])
    assert evaluator.measure(Giving(lambda logits: (logits,))).student_loss[0] > 0


@pytest.mark.parametrize("item", [{"input_ids": [1, 400]}, {"input_ids": [1, 2], "labels": [1, 400]}])
def test_a_token_that_a_model_does_not_know_is_found_before_the_model_sees_it(
    tiny_teacher: Path, item: dict[str, Any]
) -> None:
    """On a GPU it would be an assertion that the process does not survive."""
    student = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    with pytest.raises(ModelError, match="LlamaForCausalLM knows 320 tokens and held-out rows have"):
        GapEvaluator({"code": [item]}).measure(student)


def test_losses_that_are_no_numbers_reach_no_policy() -> None:
    """The measurement says nan, and asking a policy about it is an error that names the domain."""
    student = Table()
    with torch.no_grad():
        student.table.fill_(float("nan"))
    losses = GapEvaluator(HELD_OUT).measure(student)
    assert np.isnan(losses.student_loss).all()
    with pytest.raises(NumericsError, match=r"student_loss is not finite: \{'code': nan, 'math': nan\}"):
        reweight("ddk", losses)


def test_at_most_so_many_rows_are_measured() -> None:
    """The same ones for every student."""
    evaluator = GapEvaluator(HELD_OUT, rows=2, batch_rows=1)
    student = Table()
    evaluator.measure(student)
    assert 4 == student.calls


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("teacher and reference are both given", {"teacher": "x", "reference": {"code": 1.0, "math": 1.0}}),
        (
            "reference losses are of ['code'] and held-out rows of ['code', 'math']",
            {"reference": {"code": 1.0}},
        ),
        ("each must be a finite number", {"reference": {"code": 1.0, "math": float("nan")}}),
        ("rows = 0, batch_rows = 8", {"rows": 0}),
        ("rows = 500, batch_rows = 0", {"batch_rows": 0}),
    ],
)
def test_wrong_arguments_are_one_line(expected: str, options: dict[str, Any]) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError) as info:
        GapEvaluator(HELD_OUT, **options)
    assert expected in str(info.value)
    assert "\n" not in str(info.value)


def test_a_list_of_datasets_has_no_names() -> None:
    """Users do not have the type checker of the tests."""
    unchecked = inspect.unwrap(GapEvaluator.__init__)
    with pytest.raises(ConfigError, match="held_out is a list; give a dict"):
        unchecked(object.__new__(GapEvaluator), [[1], [2]])


def test_a_teacher_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    """When it is first needed."""
    evaluator = GapEvaluator(HELD_OUT, teacher=tmp_path / "nowhere", cache_dir=tmp_path)
    with pytest.raises(ModelError, match="no such folder; give a local model folder or a Hub id"):
        evaluator.measure(Table())


def test_held_out_items_are_checked_when_the_evaluator_is_made() -> None:
    """Not at the first interval."""
    with pytest.raises(DataError, match=r"held_out\['code'\]\[0\] has no input_ids"):
        GapEvaluator({"code": [{"text": "abc"}]})
