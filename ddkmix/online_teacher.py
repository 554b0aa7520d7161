"""A teacher that adapts to its student: small trainable modules on frozen weights (OKD).

OUR RECONSTRUCTION of Online Knowledge Distillation (arXiv 2409.12512), of which only the abstract could be
read and no code was found: modules on the teacher are trained jointly with the student, so that its
distribution comes nearer to what the student can learn, without the student's samples. Here a module is a
low-rank correction of a linear layer (LoRA, arXiv 2106.09685), and its loss cross-entropy with the text and
the KL from the detached student. The student learns from the adapted teacher as from any other: a dense
signal.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddkmix.batch import DenseSignal
from ddkmix.boundaries import document_positions
from ddkmix.config import OnlineModules
from ddkmix.errors import ConfigError, RunError
from ddkmix.fingerprint import replacing
from ddkmix.losses import LossTerm
from ddkmix.losses.objective import distillation_objective
from ddkmix.models import hidden_states
from ddkmix.predicted_tokens import about_predicted, predicted
from ddkmix.teacher import LiveTeacher, SignalSource


class LowRank(nn.Module):
    """A frozen linear layer and a correction of it: W x + alpha / rank B A x, with B = 0 at first."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        """A is uniform as a linear layer's weights are; both are float32 whatever the type of `base`."""
        super().__init__()
        self.base, self._scale, self.off = base, alpha / rank, False
        bound = 1 / math.sqrt(base.in_features)
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, states: Float[Tensor, "*b D"]) -> Float[Tensor, "*b E"]:
        """The layer's output and its correction, in the layer's type; without the correction where `off`."""
        out: Tensor = self.base(states)
        if self.off:
            return out
        correction = states.float() @ self.down.T @ self.up.T
        return out + (self._scale * correction).to(out.dtype)


class OnlineTeacher(LiveTeacher):
    """A frozen model with trainable modules, in the place of a `LiveTeacher`.

    A step asks for the `signal` of its batch, trains the student on it, and then asks for the `objective` of
    the modules, whose forward pass was that of the signal. Whoever trains gives `parameters` to an
    optimizer of their own; `state` is all that a checkpoint needs of the teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int | None = None,
        separator_id: int | None = None,
        layers: Sequence[int] = (),
        targets: Sequence[str] = ("q_proj", "v_proj"),
        rank: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
    ) -> None:
        """`model` is changed in place: linear layers whose names end in one of `targets` get a module each.

        Raises:
            ConfigError: a target is the name of no linear layer.
        """
        model.requires_grad_(False)
        self._modules = _adapt(model, targets, rank, alpha, seed)
        super().__init__(model, vocab_size=vocab_size, separator_id=separator_id, layers=layers)
        self._states: Tensor | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Those of the modules, in a fixed order; no others have a gradient."""
        return [part for module in self._modules.values() for part in (module.down, module.up)]

    def signal(self, batch: Mapping[str, Tensor]) -> DenseSignal:
        """What the adapted teacher says, without a gradient; where autograd is on, kept for `objective`."""
        input_ids = batch["input_ids"]
        positions = document_positions(input_ids, self._separator_id)
        with self._layers.recorded(self.model) as outputs:
            states = hidden_states(self.model, input_ids, positions)
        self._states = states if states.requires_grad else None
        layers = {number: output.detach() for number, output in outputs.items()}
        return DenseSignal(hidden=states.detach(), head=self._head, layers=layers)

    def objective(
        self,
        labels: Int[Tensor, "B T"],
        token_weight: float | Tensor,
        student: DenseSignal,
        terms: Sequence[LossTerm],
        *,
        chunk_tokens: int | None = None,
        memory_mb: float = 512.0,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "terms n"]]:
        """The modules' objective on the batch of the last `signal`, differentiable in `parameters`.

        In `terms` the roles are exchanged: the teacher learns, and the student is the one who says something.
        `cross_entropy` and `forward_kl`, KL(student || teacher), are the reconstruction's.

        Args:
            labels: of that batch, -100 where nothing is predicted.
            token_weight: share of every predicted token.
            student: the student's states of that batch and its head; no gradient reaches them.
            terms: the weighted losses.
            chunk_tokens: tokens whose logits exist at one time; None: as many as `memory_mb` holds.
            memory_mb: megabytes for the logits of a chunk.

        Returns:
            As `distillation_objective`.
        """
        assert self._states is not None, "ask for the signal of a batch first, with autograd on, and once"
        states, self._states = self._states, None
        where = predicted(labels)
        targets = labels[:, 1:][where]
        weight = torch.as_tensor(token_weight, dtype=torch.float32, device=states.device).expand(len(targets))
        said = about_predicted(DenseSignal(hidden=student.hidden.detach(), head=student.head), where)
        return distillation_objective(
            states[:, :-1][where],
            self._head,
            targets,
            weight,
            terms,
            signal=said,
            chunk_tokens=chunk_tokens,
            memory_mb=memory_mb,
        )

    @contextmanager
    def modules_off(self) -> Iterator[None]:
        """Inside the block the model is the one that was loaded, to the bit."""
        for module in self._modules.values():
            module.off = True
        try:
            yield
        finally:
            for module in self._modules.values():
                module.off = False

    def state(self) -> dict[str, Tensor]:
        """The modules' parameters by name, for safetensors."""
        return {
            f"{name}.{part}": getattr(module, part).detach().clone()
            for name, module in self._modules.items()
            for part in ("down", "up")
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            RunError: it is of other modules.
        """
        own = {name: value.shape for name, value in self.state().items()}
        if own != {name: value.shape for name, value in state.items()}:
            raise RunError(
                f"the saved teacher has {len(state)} parameters of modules and this one {len(own)} of other "
                "names or sizes; resume with the targets and the rank of the run that saved it."
            )
        with torch.no_grad():
            for name, value in state.items():
                module, _, part = name.rpartition(".")
                getattr(self._modules[module], part).copy_(value)


class _AsLoaded:
    """The model of an `OnlineTeacher` without its modules, as a teacher of its own."""

    def __init__(self, teacher: OnlineTeacher) -> None:
        self._teacher = teacher

    def signal(self, batch: Mapping[str, Tensor]) -> DenseSignal:
        """What the model says that was loaded."""
        with self._teacher.modules_off():
            return LiveTeacher.signal(self._teacher, batch)


def as_loaded(teacher: SignalSource) -> SignalSource:
    """The teacher that gaps are to: one with modules without them, any other itself."""
    return _AsLoaded(teacher) if isinstance(teacher, OnlineTeacher) else teacher


def save_modules(teacher: OnlineTeacher, settings: OnlineModules, path: Path) -> None:
    """Write the modules to a safetensors file, with what `load_modules` must know to build them again."""
    told = {"ddkmix.online": settings.model_dump_json(include={"targets", "rank", "alpha"})}
    with replacing(path) as file:
        file.write(save(teacher.state(), metadata=told))


def load_modules(model: nn.Module, path: Path, **options: Any) -> OnlineTeacher:
    """A teacher as a run has left it: RUN/teacher_modules.safetensors on the model that the run loaded.

    Args:
        model: that model, which is changed in place; it is the adapted one, to be called as any other.
        path: what `save_modules` wrote.
        options: of `OnlineTeacher`, such as `vocab_size`.

    Raises:
        RunError: the file cannot be read, or is of another model.
        ConfigError: the model lacks the layers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["ddkmix.online"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = {"targets": told["targets"], "rank": told["rank"], "alpha": told["alpha"]}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} holds no modules of a teacher ({reason}); a run writes them last.") from None
    teacher = OnlineTeacher(model, **shape, **options)
    teacher.load_state(state)
    return teacher


def _adapt(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int
) -> dict[str, LowRank]:
    """Put a module around each layer that is meant; their random numbers come in the order of names."""
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for target in targets:
        if not any(name.split(".")[-1] == target for name in linear):
            known = ", ".join(sorted({name.split(".")[-1] for name in linear})) or "none"
            raise ConfigError(
                f"teacher.online.targets has {target!r}, which is no linear layer of {type(model).__name__}; "
                f"its linear layers are called: {known}."
            )
    output = model.get_output_embeddings()  # type: ignore[operator]
    if any(part is output and name.split(".")[-1] in targets for name, part in linear.items()):
        raise ConfigError(
            f"teacher.online.targets has the output layer of {type(model).__name__}, whose logits are made a "
            "chunk at a time without its forward pass; leave it out."
        )
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name in sorted(name for name in linear if name.split(".")[-1] in targets):
        module = LowRank(linear[name], rank=rank, alpha=alpha, generator=generator)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, module)
        modules[name] = module
    return modules
