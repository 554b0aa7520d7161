"""Hidden-state matching: the published sum from the models' own states, and what is trained and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddkmix.batch import DenseSignal, RoutedSignal
from ddkmix.config import Named, Student, Teacher, parse_config
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ConfigError
from ddkmix.losses import build_terms
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch
from ddkmix.matching import Layers, Matching, partners
from ddkmix.models import build_student, hidden_states, load_teacher
from ddkmix.predicted_tokens import predicted
from ddkmix.preflight import check
from ddkmix.records import read_lines
from ddkmix.setup import train
from ddkmix.teacher import LiveTeacher
from tests.conftest import ConfigTree, save_tiny_model, write_domain
from tests.test_resume import assert_same_outcome, rewound, run

Make = Callable[..., ConfigTree]
IDS = torch.randint(300, (3, 8), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[1, 5:] = LABELS[2, 2:] = -100


def objective(match: dict[str, Any] | None = None, **options: Any) -> tuple[Any, ...]:
    """Cross-entropy, matching with these parameters, and forward KL: the matching stands in the middle."""
    return build_terms(
        [
            Named.model_validate({"name": "cross_entropy", "weight": 1.0}),
            Named.model_validate({"name": "hidden_match", "weight": 0.5, **(match or {}), **options}),
            Named.model_validate({"name": "forward_kl", "weight": 0.2}),
        ]
    )


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Four layers."""
    return save_tiny_model(tmp_path_factory.mktemp("deep"), tokenizer_folder, num_hidden_layers=4)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A student with other hidden states: 16 dimensions where the teacher has 32."""
    folder = tmp_path_factory.mktemp("narrow")
    return save_tiny_model(folder, tokenizer_folder, seed=3, hidden_size=16)


@pytest.fixture
def teacher(deep_teacher: Path) -> torch.nn.Module:
    """A frozen teacher in float32."""
    return load_teacher(Teacher(model=str(deep_teacher), dtype="float32"))


@pytest.fixture
def student(narrow: Path) -> torch.nn.Module:
    """The narrow student."""
    return build_student(Student(init="load", model=str(narrow)), Teacher(model="unused"), seed=0)


def distil(
    student: torch.nn.Module, teacher: torch.nn.Module, terms: Any, **changes: Any
) -> tuple[DistillationModel, torch.Tensor, torch.Tensor]:
    """The model, its objective (a mean over tokens) and the values of the terms."""
    (loss,) = [term.loss for term in terms if isinstance(term.loss, HiddenMatch)]
    matching = Matching(loss, student, teacher, seed=1)
    model = DistillationModel(student, matching=matching, chunk_tokens=4)
    for name, value in changes.items():
        model.matching.projections[0].get_parameter(name).data.copy_(value)
    signal = LiveTeacher(teacher, layers=loss.teacher_layers).signal({"input_ids": IDS})
    return model, *model(IDS, LABELS, 1 / int(predicted(LABELS).sum()), terms, signal)


def literal(model: DistillationModel, teacher: torch.nn.Module, pairs: Any, distance: str) -> torch.Tensor:
    """TinyBERT's sum from transformers' own hidden states, token by token, in float64."""
    own = model.student(IDS, output_hidden_states=True).hidden_states
    theirs = teacher(IDS, output_hidden_states=True).hidden_states
    values = []
    for row in range(len(IDS)):
        for t in range(IDS.shape[1] - 1):
            if LABELS[row, t + 1] == -100:
                continue
            total = torch.zeros((), dtype=torch.float64)
            for (s, o), projection in zip(pairs, model.matching.projections, strict=True):
                x = projection.weight.double() @ own[s + 1][row, t].double() + projection.bias.double()
                y = theirs[o + 1][row, t].double()
                cosine = (x @ y) / (x.norm() * y.norm())
                total = total + (((x - y) ** 2).mean() if distance == "mse" else 1 - cosine)
            values.append(total / len(pairs))
    return torch.stack(values)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_values_and_gradients_are_the_literal_ones(
    student: torch.nn.Module, teacher: torch.nn.Module, distance: str
) -> None:
    """Two pairs of different layers, projections from 16 to 32 dimensions, padding left out: the distance of
    each token, and the gradients of the projections and of the student's parameters below the layers."""
    pairs = [[0, 2], [0, 1]]
    terms = objective({"pairs": pairs, "distance": distance}, weight=1.0)
    terms = (terms[0], terms[1])
    model, total, values = distil(student, teacher, terms)
    expected = literal(model, teacher, pairs, distance)
    assert (2, 7 + 4 + 1) == tuple(values.shape)
    torch.testing.assert_close(expected, values[1].double(), rtol=1e-4, atol=1e-6)
    total.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = student(IDS).logits[:, :-1][predicted(LABELS)]
    cross_entropy = F.cross_entropy(logits, LABELS[:, 1:][predicted(LABELS)])
    (cross_entropy + expected.mean().float()).backward()
    assert any("projections" in name for name in ours)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_distance_by_hand() -> None:
    """(1, 2) and (1, 4): squares 0 and 4, mean 2; a right angle and a half turn have the cosine distances 1
    and 2."""
    states = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    others = torch.tensor([[1.0, 4.0], [0.0, 3.0], [-2.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    assert [2.0, 5.0, 4.5] == HiddenMatch()(states, others, labels).tolist()
    cosines = HiddenMatch(distance="cosine")(states, others, labels)
    assert [1 - 9 / (5 * 17) ** 0.5, 1.0, 2.0] == pytest.approx(cosines.tolist(), rel=1e-4)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_gradients_of_the_distance_in_float64(distance: Any) -> None:
    """Against finite differences, of the student's states alone."""
    torch.manual_seed(0)
    states, others = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    loss = HiddenMatch(distance=distance)
    assert torch.autograd.gradcheck(lambda x: loss(x, others, None), states.requires_grad_())


def test_the_objective_is_the_weighted_sum_in_the_order_of_the_config(
    student: torch.nn.Module, teacher: torch.nn.Module
) -> None:
    """Matching between two losses on logits: values stand where the config has them."""
    terms = objective()
    model, total, values = distil(student, teacher, terms)
    expected = values[0] + 0.5 * values[1] + 0.2 * values[2]
    assert expected.mean().item() == pytest.approx(total.item(), rel=1e-5)
    signal = LiveTeacher(teacher).signal({"input_ids": IDS})
    plain, others = model(IDS, LABELS, 1 / 12, (terms[0], terms[2]), signal)
    torch.testing.assert_close(others, values[[0, 2]])
    assert plain.item() == pytest.approx((values[0] + 0.2 * values[2]).mean().item(), rel=1e-5)


def test_the_same_model_has_no_distance(deep_teacher: Path, teacher: torch.nn.Module) -> None:
    """Student and teacher alike, one hidden size: the projections begin as identities, with or without."""
    twin = build_student(Student(init="load", model=str(deep_teacher)), Teacher(model="unused"), seed=0)
    for options in ({}, {"projection": "none"}, {"distance": "cosine"}):
        _, _, values = distil(twin, teacher, objective({"pairs": [[0, 0], [2, 2], [-1, 3]], **options}))
        assert values[1].abs().max() < 1e-6


def test_the_default_is_last_to_last_before_the_final_norm(
    deep_teacher: Path, teacher: torch.nn.Module
) -> None:
    """-1 is the last layer; what the norm makes of its output is another thing."""
    with Layers("teacher", teacher, (-1, 3)).recorded(teacher) as outputs, torch.no_grad():
        last = hidden_states(teacher, IDS)
    assert torch.equal(outputs[-1], outputs[3])
    assert torch.equal(last, teacher.model.norm(outputs[3]))
    assert not torch.allclose(last, outputs[3])
    assert ((-1, -1),) == HiddenMatch().pairs


def test_only_the_layers_that_are_asked_for_are_kept(teacher: torch.nn.Module) -> None:
    """No hook is left behind, and an error inside leaves none either."""
    layers = Layers("teacher", teacher, (1,))
    with layers.recorded(teacher) as outputs, torch.no_grad():
        hidden_states(teacher, IDS)
    assert [1] == list(outputs)
    with pytest.raises(ValueError, match="stop"), layers.recorded(teacher):
        raise ValueError("stop")
    assert not any(module._forward_hooks for module in teacher.modules())
    assert {} == LiveTeacher(teacher).signal({"input_ids": IDS}).layers


def test_projections_begin_from_the_seed(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Whatever torch's random state is, and without changing it."""
    loss = HiddenMatch(pairs=((0, 0), (1, 1)))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Matching(loss, student, teacher, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    again, other = (Matching(loss, student, teacher, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projections.0.weight"], other["projections.0.weight"])
    assert not torch.equal(first["projections.0.weight"], first["projections.1.weight"])


def test_gradient_checkpointing_and_bfloat16_leave_it_as_it_is(
    student: torch.nn.Module, teacher: torch.nn.Module
) -> None:
    """Layers that are computed twice are recorded once; distances are float32 within bfloat16's precision."""
    terms = objective({"pairs": [[0, 1], [1, 2]]})
    model, total, values = distil(student, teacher, terms)
    total.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, low = distil(student, teacher, terms)
    assert torch.float32 == low.dtype
    torch.testing.assert_close(values[1], low[1], rtol=0.05, atol=0.01)
    student.activation_checkpointing_enable()
    model, total, same = distil(student, teacher, terms)
    total.backward()
    assert torch.equal(values, same)
    torch.testing.assert_close(expected, [parameter.grad for parameter in model.parameters()])


def test_a_batch_of_padding_alone_is_no_distance(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Gradients of 0 for every projection, which DDP can reduce."""
    terms = objective()
    model = DistillationModel(student, matching=Matching(terms[1].loss, student, teacher))
    signal = LiveTeacher(teacher, layers=(-1,)).signal({"input_ids": IDS})
    total, values = model(IDS, torch.full_like(IDS, -100), 1.0, terms, signal)
    total.backward()
    assert (0.0, (3, 0)) == (total.item(), tuple(values.shape))
    assert all(not parameter.grad.any() for parameter in model.matching.parameters())


# --- consistency ----------------------------------------------------------------------------------------


def mixed_objective(**options: Any) -> tuple[Any, ...]:
    """Cross-entropy and the consistency of these layers."""
    return build_terms(
        [
            Named.model_validate({"name": "cross_entropy"}),
            Named.model_validate({"name": "hidden_consistency", "weight": 0.1, **options}),
        ]
    )


def test_consistency_is_the_literal_sum(student: torch.nn.Module) -> None:
    """lam d(f(m), f(x)) + (1 - lam) d(f(m), f(x')), token by token from transformers' own hidden states of
    embeddings that were mixed here; where the partner has ended, lam is 1. Gradients of all parameters."""
    terms = mixed_objective(layers=[0, -1], seed=3)
    model = DistillationModel(student, consistency=terms[1].loss)
    partner, shares = partners(IDS, 3)
    assert (shares >= 0.5).all() and (partner != torch.arange(3)).any()
    table = student.get_input_embeddings().weight
    mixture = []
    for row in range(3):
        other = int(partner[row])
        lam = [float(shares[row]) if LABELS[other, t] != -100 else 1.0 for t in range(8)]
        rows = [lam[t] * table[IDS[row, t]] + (1 - lam[t]) * table[IDS[other, t]] for t in range(8)]
        mixture.append((lam, torch.stack(rows)))
    f = student(IDS, output_hidden_states=True).hidden_states[1]
    of_mix = torch.cat(
        [
            student.model.layers[0](
                rows[None], position_embeddings=student.model.rotary_emb(rows[None], torch.arange(8)[None])
            )
            for _, rows in mixture
        ]
    )
    expected = torch.stack(
        [
            mixture[row][0][t] * ((of_mix[row, t] - f[row, t]) ** 2).mean()
            + (1 - mixture[row][0][t]) * ((of_mix[row, t] - f[int(partner[row]), t]) ** 2).mean()
            for row in range(3)
            for t in range(7)
            if LABELS[row, t + 1] != -100
        ]
    )
    one = DistillationModel(student, consistency=HiddenConsistency(layers=(0,), seed=3))
    terms = mixed_objective(layers=[0], seed=3)
    total, values = one(IDS, LABELS, 1 / 12, terms)
    torch.testing.assert_close(expected, values[1], rtol=1e-3, atol=1e-6)
    assert (values[0] + 0.1 * values[1]).mean().item() == pytest.approx(total.item(), rel=1e-5)
    parameters = list(student.model.layers[0].parameters())
    theirs = torch.autograd.grad(0.1 * expected.mean(), parameters, retain_graph=True)
    plain = torch.autograd.grad(one(IDS, LABELS, 1 / 12, terms[:1])[0], parameters)
    ours = torch.autograd.grad(total, parameters)
    for a, b, c in zip(theirs, plain, ours, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-3, atol=1e-6)
    both = model(IDS, LABELS, 1 / 12, mixed_objective(layers=[0, -1], seed=3))[1][1]
    last = DistillationModel(student, consistency=HiddenConsistency(seed=3))
    torch.testing.assert_close((values[1] + last(IDS, LABELS, 1.0, mixed_objective(seed=3))[1][1]) / 2, both)


def test_partners_follow_from_tokens_and_seed() -> None:
    """The same again, whatever torch's random state is; others for other tokens or another seed."""
    torch.manual_seed(1)
    first = partners(IDS, 0)
    torch.manual_seed(2)
    again = partners(IDS, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ids, seed in ((IDS, 1), (IDS.roll(1, 0), 0)):
        assert not torch.equal(first[1], partners(ids, seed)[1])
    many = partners(torch.arange(4000)[:, None], 0)
    assert list(range(4000)) == sorted(many[0].tolist())
    assert (0.5, 0.75) == pytest.approx((many[1].min().item(), many[1].mean().item()), abs=0.01)


def test_a_row_alone_is_consistent(student: torch.nn.Module) -> None:
    """It is its own mixture."""
    model = DistillationModel(student, consistency=HiddenConsistency())
    values = model(IDS[:1], LABELS[:1], 1.0, mixed_objective())[1]
    assert values[1].abs().max() < 1e-8
    with pytest.raises(ConfigError, match="was made without `consistency`"):
        DistillationModel(student)(IDS, LABELS, 1.0, mixed_objective())


# --- in a run -----------------------------------------------------------------------------------------


def run_tree(tiny_config: Make, narrow: Path, **sections: Any) -> ConfigTree:
    """A run of a narrow student with two pairs of layers."""
    loss = [
        {"name": "cross_entropy", "weight": "rest"},
        {"name": "hidden_consistency", "weight": {"schedule": "linear", "start": 0, "end": 0.1}},
        {
            "name": "hidden_match",
            "pairs": [[0, 0], [1, 1]],
            "weight": {"schedule": "linear", "start": 0.8, "end": 0},
        },
    ]
    student = {"init": "load", "layers": None, "model": str(narrow)}
    return tiny_config(**{"loss": loss, "student": student, **sections})


def test_a_run_learns_the_teachers_states_and_saves_the_student_alone(
    tmp_path: Path, tiny_config: Make, narrow: Path
) -> None:
    """The distance falls; projections are in the checkpoints, not in the student that transformers loads."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    tree = run_tree(tiny_config, narrow, trainer={"steps": 12}, optimizer={"lr": 1e-2})
    folder = run(tree, tmp_path / "run")
    lines = list(read_lines(folder / "metrics.jsonl"))
    assert lines[-1]["train/hidden_match"] < 0.95 * lines[0]["train/hidden_match"]
    for line in lines:
        names = ("cross_entropy", "hidden_consistency", "hidden_match")
        expected = sum(line[f"loss/weight/{name}"] * line[f"train/{name}"] for name in names)
        assert line["train/hidden_consistency"] > 0
        assert expected == pytest.approx(line["train/objective"], rel=1e-5)
    saved = [
        folder / "checkpoints" / "step-000012" / "model.safetensors",
        folder / "student/model.safetensors",
    ]
    names = []
    for path in saved:
        with safe_open(path, framework="pt") as file:
            names.append({name for name in file.keys() if "projections" in name})  # noqa: SIM118
    assert (
        {f"matching.projections.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")},
        set(),
    ) == tuple(names)
    assert 16 == AutoModelForCausalLM.from_pretrained(folder / "student").config.hidden_size


def test_projections_go_on_exactly(tmp_path: Path, tiny_config: Make, narrow: Path) -> None:
    """Resumed within a log window and between two: the very bits, of projections and optimizer too."""
    sizes = {"steps": 6, "checkpoint_steps": 1, "keep_checkpoints": 99, "log_steps": 2, "microbatch_rows": 4}
    tree = run_tree(tiny_config, narrow, trainer=sizes)
    full = run(tree, tmp_path / "full")
    for step in (1, 4):
        assert_same_outcome(full, run(tree, rewound(full, tmp_path / f"part{step}", step), resume=True))


def test_weight_zero_is_a_run_without_it(tmp_path: Path, tiny_config: Make, narrow: Path) -> None:
    """Matching that only watches changes no bit of the student."""
    student = {"init": "load", "layers": None, "model": str(narrow)}
    plain = [{"name": "cross_entropy"}]
    watched = [*plain, {"name": "hidden_match", "weight": 0}]
    for name, loss in (("plain", plain), ("watched", watched)):
        tree = tiny_config(loss=loss, student=student, trainer={"steps": 2}, optimizer={"max_grad_norm": 0})
        run(tree, tmp_path / name)
    first, second = (tmp_path / name / "student/model.safetensors" for name in ("plain", "watched"))
    assert first.read_bytes() == second.read_bytes()
    record = json.loads((tmp_path / "watched/metrics.jsonl").read_text().splitlines()[0])
    assert record["train/hidden_match"] > 0


# --- mistakes -----------------------------------------------------------------------------------------


def refused(tree: ConfigTree) -> str:
    """What `lint` says, in one line."""
    with pytest.raises(ConfigError) as error:
        check(parse_config(tree, where="test"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (
            {"pairs": [[0, 2]]},
            "loss: layer 2 of the teacher is to be compared, which has layers 0 to 1 (-1",
        ),
        (
            {"pairs": [[1, 0]]},
            "loss: layer 1 of the student is to be compared, which has layers 0 to 0",
        ),
        (
            {"pairs": [[0, -3]]},
            "loss: layer -3 of the teacher is to be compared, which has layers 0 to",
        ),
        ({"pairs": []}, "loss.1.pairs = []: Tuple should have at least 1 item"),
        ({"pairs": [[0]]}, "loss.1.pairs = [[0]]: Field required"),
        ({"pairs": [[0, 0], [0, 0]]}, "loss.1: a pair stands there twice."),
        ({"distance": "l1"}, "loss.1.distance = 'l1': Input should be 'mse' or 'cosine'."),
        ({"layers": [1]}, "loss.1 (hidden_match) has no parameter 'layers'; known: distance, pairs"),
    ],
)
def test_a_wrong_matching_is_one_line(tiny_config: Make, match: dict[str, Any], message: str) -> None:
    """Before any model is loaded: the student keeps layer 0 of two."""
    loss = [{"name": "cross_entropy"}, {"name": "hidden_match", **match}]
    assert refused(tiny_config(loss=loss)).startswith(message)


def test_matching_alone_teaches_nothing_about_the_next_token(tiny_config: Make) -> None:
    """The output layer would have no gradient."""
    message = refused(tiny_config(loss=[{"name": "hidden_match"}]))
    assert message.startswith("loss: hidden_match teaches nothing about the next token; name another loss")


def test_a_layer_of_the_consistency_exists(tiny_config: Make) -> None:
    """It is looked for in the student alone, which keeps one layer of two."""
    loss = [{"name": "cross_entropy"}, {"name": "hidden_consistency", "layers": [1]}]
    assert refused(tiny_config(loss=loss)).startswith("loss: layer 1 of the student is to be compared, which")


def test_one_live_teacher_is_needed(tmp_path: Path, tiny_config: Make, tiny_teacher: Path) -> None:
    """Neither a store nor an ensemble has hidden states to compare with."""
    loss = [{"name": "cross_entropy"}, {"name": "hidden_match"}]
    way = "set signal.source to live and let one teacher teach all domains"
    store = {"source": "store"}
    assert "use the live teacher" in refused(tiny_config(loss=loss, signal=store))
    assert way in refused(tiny_config(loss=loss, signal=store, capture={"keep": "hidden"}))
    write_domain(tmp_path / "cards", "code", shards=1, teacher="both")
    teachers = {
        "other": {"model": str(tiny_teacher), "dtype": "float32"},
        "both": {"ensemble": {"teacher": 1.0, "other": 1.0}},
    }
    assert way in refused(tiny_config(loss=loss, teachers=teachers, domains=[str(tmp_path / "cards")]))


def test_sizes_that_differ_need_a_projection(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """16 and 32."""
    with pytest.raises(
        ConfigError, match="hidden states of 16 dimensions, the teacher of 32; leave projection"
    ):
        Matching(HiddenMatch(projection="none"), student, teacher)


def test_signals_without_the_layers_are_refused(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Those of a teacher that was not asked for them, of several teachers, and of nobody."""
    terms = objective({"pairs": [[0, 1]]})
    model = DistillationModel(student, matching=Matching(terms[1].loss, student, teacher))
    said = LiveTeacher(teacher).signal({"input_ids": IDS})
    assert isinstance(said, DenseSignal)
    routed = RoutedSignal(rows=(torch.arange(3),), signals=(said,))
    for signal, name in ((said, "DenseSignal"), (routed, "RoutedSignal"), (None, "NoneType")):
        with pytest.raises(
            ConfigError, match=rf"teacher's layers \[1\].*\({name}\) does not hold them; set sig"
        ):
            model(IDS, LABELS, 1.0, terms, signal)
    with pytest.raises(ConfigError, match="was made without `matching`"):
        DistillationModel(student)(IDS, LABELS, 1.0, terms, said)


def test_the_objective_on_logits_refuses_it(teacher: torch.nn.Module) -> None:
    """`distillation_objective` would compare logits as if they were states."""
    from ddkmix.losses.objective import distillation_objective

    signal = LiveTeacher(teacher).signal({"input_ids": IDS}).at(0)
    with pytest.raises(ConfigError, match="loss hidden_match compares hidden states of other layers"):
        distillation_objective(signal.hidden, signal.head, IDS[0], torch.ones(8), objective(), signal=signal)


def test_training_is_told_before_the_first_step(tmp_path: Path, tiny_config: Make, narrow: Path) -> None:
    """`projection: none` between different sizes ends the run before anything is measured twice."""
    tree = run_tree(tiny_config, narrow)
    tree["loss"][2]["projection"] = "none"
    with pytest.raises(ConfigError, match="leave projection out"):
        train(parse_config({**tree, "run_dir": str(tmp_path / "x")}, where="test"))
