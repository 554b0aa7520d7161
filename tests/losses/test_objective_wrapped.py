"""The objective inside what wraps a student: FSDP2 on two real ranks, and torch.compile.

Both in processes without the type checks of the tests, which neither would survive.
"""

import json

import pytest
import torch

from ddkmix.config import Student, Teacher
from ddkmix.distillation import DistillationModel
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
from ddkmix.models import build_student, load_teacher
from ddkmix.teacher import LiveTeacher
from tests.test_elastic import torchrun

TERMS = (LossTerm("cross_entropy", 1.0, CrossEntropy()), LossTerm("forward_kl", 0.2, ForwardKL()))

PROGRAM = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from ddkmix.config import Student, Teacher
from ddkmix.distillation import DistillationModel
from ddkmix.errors import ModelError
from ddkmix.losses import CrossEntropy, ForwardKL, LossTerm
from ddkmix.models import build_student, load_teacher
from ddkmix.teacher import LiveTeacher

folder = sys.argv[1]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
teacher = load_teacher(Teacher(model=folder, dtype="float32"))
mesh = torch.distributed.init_device_mesh("cpu", (world,))
ids = torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(0))[2 * rank : 2 * rank + 2]
terms = (LossTerm("cross_entropy", 1.0, CrossEntropy()), LossTerm("forward_kl", 0.2, ForwardKL()))
signal = LiveTeacher(teacher).signal({"input_ids": ids})


def make():
    student = build_student(Student(init="prune", layers=(1,)), Teacher(model=folder), seed=0)
    return DistillationModel(student, chunk_tokens=4)


def run(model, called=None):  # FSDP takes the mean over ranks
    objective, _ = (model if called is None else called)(ids, ids, world / 28, terms, signal)
    objective.backward()
    total = objective.detach() / world
    dist.all_reduce(total)
    whole = (p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in model.parameters())
    norms = [gradient.double().norm().item() for gradient in whole]
    return {"objective": total.item(), "gradients": norms}


def shard(model):
    for layer in model.student.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


results = {"sharded": run(shard(make()))}

model = make()
classes, hidden = model.student.get_output_embeddings().weight.shape
model.student.set_output_embeddings(torch.nn.Linear(hidden, classes, bias=False))
fully_shard(model.student.get_output_embeddings(), mesh=mesh)
try:
    run(shard(model))
except ModelError as error:
    results["alone"] = str(error)

results["eager"] = run(make())
model = make()
results["compiled"] = run(model, torch.compile(model, backend="aot_eager"))
results["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
if rank == 0:
    print(json.dumps(results), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory, tiny_teacher):
    """What two ranks said."""
    path = tmp_path_factory.mktemp("ranks") / "rank.py"
    path.write_text(PROGRAM)
    return json.loads(torchrun(2, str(path), str(tiny_teacher)).stdout.splitlines()[-1])


def test_two_ranks_of_fsdp_give_the_objective_and_gradients_of_one_process(wrapped, tiny_teacher):
    """fully_shard on layers and root: every parameter is sharded, the tied output weights too; the sum over
    ranks is the objective, and gradients are those of the unsharded student."""
    teacher = load_teacher(Teacher(model=str(tiny_teacher), dtype="float32"))
    student = build_student(Student(init="prune", layers=(1,)), Teacher(model=str(tiny_teacher)), seed=0)
    ids = torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(0))
    model = DistillationModel(student, chunk_tokens=4)
    objective, _ = model(ids, ids, 1 / 28, TERMS, LiveTeacher(teacher).signal({"input_ids": ids}))
    objective.backward()
    assert objective.item() == pytest.approx(wrapped["sharded"]["objective"], rel=1e-5)
    expected = [p.grad.double().norm().item() for p in model.parameters()]
    assert expected == pytest.approx(wrapped["sharded"]["gradients"], rel=1e-4)


def test_an_output_layer_that_is_sharded_by_itself_is_one_line(wrapped):
    """No hook would gather it: an error that says how to wrap, not a wrong gradient."""
    assert wrapped["alone"].startswith("the student's output weights are a shard (DTensor); FSDP gathers")


def test_a_compiled_student_has_the_same_objective_and_gradients(wrapped):
    """torch.compile leaves the objective alone and compiles what is before it."""
    assert wrapped["graphs"] > 0
    assert wrapped["eager"]["objective"] == pytest.approx(wrapped["compiled"]["objective"], rel=1e-5)
    assert wrapped["eager"]["gradients"] == pytest.approx(wrapped["compiled"]["gradients"], rel=1e-4)
