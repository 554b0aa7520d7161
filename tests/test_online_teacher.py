"""A teacher with trainable modules: identity at first, frozen underneath, and nearer to its student after."""

from hashlib import sha256

import pytest
import torch

from ddkmix.batch import DenseSignal
from ddkmix.config import OnlineModules
from ddkmix.errors import ConfigError, RunError
from ddkmix.losses import build_terms
from ddkmix.models import head_of, hidden_states, load_model
from ddkmix.online_teacher import LowRank, OnlineTeacher, as_loaded, load_modules, save_modules
from ddkmix.teacher import LiveTeacher, SignalSource

TERMS = build_terms([{"name": "cross_entropy"}, {"name": "forward_kl", "weight": 1.0}])


@pytest.fixture
def model(tiny_teacher):
    """A tiny Llama, as a teacher is loaded."""
    return load_model(str(tiny_teacher)).eval()


@pytest.fixture
def batch():
    """Two rows of tokens, the second with padding at its end."""
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def digest(model):
    """Of all parameters that are not a module's."""
    frozen = [
        (n.replace(".base", ""), p) for n, p in model.named_parameters() if not n.endswith(("down", "up"))
    ]
    return sha256(b"".join(n.encode() + p.detach().numpy().tobytes() for n, p in sorted(frozen))).hexdigest()


def student_of(tiny_teacher, batch):
    """What a student says: the teacher without its last layer."""
    student = load_model(str(tiny_teacher)).eval()
    student.model.layers = student.model.layers[:1]
    hidden = hidden_states(student, batch["input_ids"]).detach().requires_grad_()
    return DenseSignal(hidden=hidden, head=head_of(student, check=False))


def step(teacher, batch, student, optimizer, terms=TERMS):
    """One step of the modules."""
    teacher.signal(batch)
    weight = 1 / int((batch["labels"][:, 1:] != -100).sum())
    objective, values = teacher.objective(batch["labels"], weight, student, terms)
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()
    return values.mean(1).tolist()


def test_it_starts_as_the_teacher_and_says_what_a_live_one_says(model, batch):
    """Bit for bit, as a dense signal without a gradient; modules on q and v of both layers."""
    expected = LiveTeacher(model).signal(batch)
    teacher = OnlineTeacher(model, rank=2)
    found = teacher.signal(batch)
    assert isinstance(teacher, SignalSource)
    assert torch.equal(expected.hidden, found.hidden) and not found.hidden.requires_grad
    assert 8 == len(teacher.parameters())
    trainable = sorted((name, part) for name, part in model.named_parameters() if part.requires_grad)
    assert all(a is b for a, (_, b) in zip(teacher.parameters(), trainable, strict=True))


def test_modules_learn_the_frozen_weights_do_not(model, batch, tiny_teacher):
    """12 steps with the KL alone: nearer to the student, all other parameters the same to the bit, and no
    gradient in the student."""
    before, student = digest(model), student_of(tiny_teacher, batch)
    first, teacher = LiveTeacher(model).signal(batch), OnlineTeacher(model, rank=2)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    history = [step(teacher, batch, student, optimizer, TERMS[1:])[0] for _ in range(12)]
    assert history[-1] < 0.8 * history[0]
    assert before == digest(model)
    assert student.hidden.grad is None
    assert not torch.equal(first.hidden, teacher.signal(batch).hidden)


def test_with_the_text_beside_it_the_sum_falls(model, batch, tiny_teacher):
    """Cross-entropy pulls the other way here, and both count."""
    student, teacher = student_of(tiny_teacher, batch), OnlineTeacher(model, rank=2)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    history = [sum(step(teacher, batch, student, optimizer)) for _ in range(6)]
    assert history[-1] < 0.95 * history[0]


def test_the_gradient_is_that_of_whole_logits(model, batch, tiny_teacher):
    """CE + KL(student || teacher), mean over predicted tokens, written out with autograd."""
    student, teacher = student_of(tiny_teacher, batch), OnlineTeacher(model, rank=2)
    with torch.no_grad():
        for part in teacher.parameters():
            part.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    teacher.signal(batch)
    where = batch["labels"][:, 1:] != -100
    objective, _ = teacher.objective(batch["labels"], 1 / int(where.sum()), student, TERMS)
    found = torch.autograd.grad(objective, teacher.parameters())
    log_p = model(input_ids=batch["input_ids"]).logits[:, :-1][where].log_softmax(-1)
    log_q = (student.hidden @ student.head.weight.T)[:, :-1][where].log_softmax(-1).detach()
    ce = -log_p.gather(1, batch["labels"][:, 1:][where][:, None]).mean()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    torch.testing.assert_close(objective, ce + kl)
    for ours, literal in zip(found, torch.autograd.grad(ce + kl, teacher.parameters()), strict=True):
        torch.testing.assert_close(ours, literal, rtol=1e-3, atol=1e-6)


def test_a_correction_by_hand():
    """W x = 3, A x = 2, B = 5: 3 + alpha / rank x 10; in the type of the layer."""
    base = torch.nn.Linear(1, 1, bias=False)
    module = LowRank(base, rank=1, alpha=0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base.weight.fill_(3.0), module.down.fill_(2.0), module.up.fill_(5.0)
    assert [8.0] == module(torch.ones(1)).tolist()
    half = LowRank(base.bfloat16(), rank=1, alpha=0.5, generator=torch.Generator())
    assert torch.bfloat16 == half(torch.ones(1, dtype=torch.bfloat16)).dtype
    assert torch.float32 == half.down.dtype == half.up.dtype


def test_the_state_is_all_that_a_resume_needs(model, batch, tiny_teacher):
    """Another teacher that takes it up says the same, to the bit; the same seed makes the same modules."""
    student = student_of(tiny_teacher, batch)
    teacher, other = OnlineTeacher(model, seed=3), OnlineTeacher(load_model(str(tiny_teacher)).eval(), seed=3)
    assert all(torch.equal(value, other.state()[name]) for name, value in teacher.state().items())
    step(teacher, batch, student, torch.optim.SGD(teacher.parameters(), lr=1.0))
    other.load_state(teacher.state())
    assert torch.equal(teacher.signal(batch).hidden, other.signal(batch).hidden)
    with pytest.raises(
        RunError, match=r"the saved teacher has 7 parameters of modules and this one 8 of other"
    ):
        other.load_state(dict(list(teacher.state().items())[1:]))


def test_the_signal_is_used_once(model, batch, tiny_teacher):
    """A second objective of one forward pass, or one without autograd, is our own mistake."""
    student, teacher = student_of(tiny_teacher, batch), OnlineTeacher(model)
    with torch.no_grad():
        teacher.signal(batch)
    with pytest.raises(AssertionError, match="ask for the signal"):
        teacher.objective(batch["labels"], 1.0, student, TERMS)
    teacher.signal(batch)
    teacher.objective(batch["labels"], 1.0, student, TERMS)
    with pytest.raises(AssertionError, match="ask for the signal"):
        teacher.objective(batch["labels"], 1.0, student, TERMS)


def test_a_target_that_does_not_exist_is_one_line(model):
    """With the names that there are."""
    with pytest.raises(
        ConfigError, match=r"targets has 'qproj', which is no linear layer of LlamaForCausalLM; "
    ):
        OnlineTeacher(model, targets=["q_proj", "qproj"])


def moved(teacher):
    """The same with random modules, so that they say something."""
    with torch.no_grad():
        for part in teacher.parameters():
            part.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return teacher


def test_as_loaded_is_the_teacher_without_its_modules(model, batch):
    """To the bit, without a gradient, and they are back afterwards, after an error too; any other teacher is
    itself, and a forward pass of the loaded one takes nothing from an objective."""
    plain = LiveTeacher(model)
    expected = plain.signal(batch)
    assert plain is as_loaded(plain)
    teacher = moved(OnlineTeacher(model, rank=2))
    adapted, before = teacher.signal(batch), as_loaded(teacher).signal(batch)
    assert isinstance(as_loaded(teacher), SignalSource)
    assert torch.equal(expected.hidden, before.hidden) and not before.hidden.requires_grad
    assert not torch.equal(expected.hidden, adapted.hidden)
    teacher.objective(batch["labels"], 1.0, expected, TERMS)
    with pytest.raises(ZeroDivisionError), teacher.modules_off():
        1 / 0  # noqa: B018
    assert torch.equal(adapted.hidden, teacher.signal(batch).hidden)


def test_modules_come_back_from_a_file(model, batch, tiny_teacher, tmp_path):
    """On a freshly loaded model, with their rank, factor and layers; the same bytes each time."""
    settings = OnlineModules(targets=("o_proj", "up_proj"), rank=3, alpha=1.5)
    teacher = moved(OnlineTeacher(model, targets=settings.targets, rank=3, alpha=1.5))
    path, again = tmp_path / "modules.safetensors", tmp_path / "again.safetensors"
    save_modules(teacher, settings, path), save_modules(teacher, settings, again)
    assert path.read_bytes() == again.read_bytes()
    found = load_modules(load_model(str(tiny_teacher)).eval(), path)
    assert torch.equal(teacher.signal(batch).hidden, found.signal(batch).hidden)
    logits = found.model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(logits, model(input_ids=batch["input_ids"]).logits)


def test_a_file_of_something_else_is_one_line(model, tiny_teacher, tmp_path):
    """Another safetensors file, a torn one, none; and modules of a model with other layers."""
    path = tmp_path / "modules.safetensors"
    for other in (tiny_teacher / "model.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(RunError, match=r"holds no modules of a teacher \(.*a run writes them last\.$"):
            load_modules(model, other)
    teacher = OnlineTeacher(load_model(str(tiny_teacher)).eval())
    save_modules(teacher, OnlineModules(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(RunError, match="holds no modules of a teacher"):
        load_modules(model, path)
    path.write_bytes(whole)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(RunError, match="the saved teacher has 8 parameters of modules and this one 4"):
        load_modules(model, path)


def test_the_objective_is_the_same_in_any_chunks(model, batch, tiny_teacher):
    """A few tokens of logits at a time."""
    student, teacher = student_of(tiny_teacher, batch), moved(OnlineTeacher(model, rank=2))
    values = []
    for size in (None, 3, 64):
        teacher.signal(batch)
        values.append(teacher.objective(batch["labels"], 0.1, student, TERMS, chunk_tokens=size)[1])
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_the_output_layer_gets_no_module(model):
    """Logits are made from its weights, so a module around it would never be asked."""
    with pytest.raises(ConfigError, match=r"targets has the output layer of LlamaForCausalLM, whose logits"):
        OnlineTeacher(model, targets=["q_proj", "lm_head"])
