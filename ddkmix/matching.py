"""Outputs of single layers, and the learned maps between those of student and teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddkmix.batch import DenseSignal
from ddkmix.errors import ConfigError
from ddkmix.losses import LossTerm
from ddkmix.losses.hidden_consistency import HiddenConsistency
from ddkmix.losses.hidden_match import HiddenMatch, check_layers_exist
from ddkmix.models import hidden_states, layer_prefix
from ddkmix.sources import IGNORE


class Layers:
    """Some layers of a model, whose outputs are kept while `recorded` is open.

    Hooks on those layers alone: `output_hidden_states` would keep every layer's. They are gone before the
    backward pass, so that layers which are computed again there are not seen twice.
    """

    def __init__(self, who: str, model: nn.Module, wanted: Sequence[int]) -> None:
        """Layers are counted from 0, or from the end: -1 is the last one.

        Raises:
            ConfigError: a layer does not exist.
            ModelError: the model's layers cannot be found under one numbered prefix.
        """
        config: Any = model.config
        self._wanted = tuple(wanted)
        self._path = ""
        if self._wanted:
            check_layers_exist(who, self._wanted, config.num_hidden_layers)
            self._path = layer_prefix(model.state_dict(), config.num_hidden_layers).removesuffix(".")

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[dict[int, Float[Tensor, "B T D"]]]:
        """The outputs (B, T, D) of the layers in a forward pass of the model inside the block, by number."""
        outputs: dict[int, Tensor] = {}
        handles = []
        for number in self._wanted:
            modules: Any = model.get_submodule(self._path)
            handles.append(modules[number].register_forward_hook(_keeping(outputs, number)))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


class Matching(nn.Module):
    """The projections of a HiddenMatch, which are trained beside the student and are no part of it."""

    def __init__(self, loss: HiddenMatch, student: nn.Module, teacher: nn.Module, *, seed: int = 0) -> None:
        """Identities where both models have one hidden size, else torch's own start of a linear layer.

        Args:
            loss: what is compared.
            student: the model to train.
            teacher: the model to learn from.
            seed: of the random projections.

        Raises:
            ConfigError: a layer does not exist, or the sizes differ and there is to be no projection.
            ModelError: a model's layers cannot be found.
        """
        super().__init__()
        Layers("teacher", teacher, loss.teacher_layers)
        self.loss, self.layers = loss, Layers("student", student, loss.student_layers)
        sizes: tuple[Any, Any] = (student.config.hidden_size, teacher.config.hidden_size)  # type: ignore[union-attr]
        if loss.projection == "none" and sizes[0] != sizes[1]:
            raise ConfigError(
                f"loss hidden_match: projection = 'none' and the student has hidden states of {sizes[0]} "
                f"dimensions, the teacher of {sizes[1]}; leave projection out, or use models of one size."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            maps = [nn.Linear(*sizes) for _ in loss.pairs] if loss.projection == "linear" else []
        for projection in maps:
            if sizes[0] == sizes[1]:
                nn.init.eye_(projection.weight)
                nn.init.zeros_(projection.bias)
        self.projections = nn.ModuleList(maps)

    def forward(
        self, student: Mapping[int, Float[Tensor, "n D"]], teacher: Mapping[int, Float[Tensor, "n E"]]
    ) -> Float[Tensor, " n"]:
        """The mean distance of the pairs at n tokens, float32 whatever autocast says.

        Args:
            student: outputs of the student's layers, by number.
            teacher: outputs of the teacher's layers, by number.
        """
        with torch.autocast(next(iter(student.values())).device.type, enabled=False):
            distances = []
            for i, (own, other) in enumerate(self.loss.pairs):
                states = student[own].float()
                if self.projections:
                    states = self.projections[i](states)
                distances.append(self.loss(states, teacher[other].detach().float(), None))
            return torch.stack(distances).mean(0)


class Mixing:
    """The states of mixtures of rows, for a HiddenConsistency."""

    def __init__(self, loss: HiddenConsistency, student: nn.Module) -> None:
        """Refuses layers that the student does not have.

        Raises:
            ConfigError: a layer does not exist.
            ModelError: the student's layers cannot be found.
        """
        self.loss, self.layers = loss, Layers("student", student, loss.layers)

    def values(
        self,
        student: nn.Module,
        plain: Mapping[int, Float[Tensor, "B T D"]],
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, " n"]:
        """The regulariser at the n predicted tokens of a micro-batch, in row order; one forward pass.

        Args:
            student: the model to train.
            plain: outputs of the layers for the rows as they are, by number.
            input_ids: rows of tokens.
            labels: the same, -100 where there is only padding.
            position_ids: those of the rows as they are.
        """
        partner, shares = partners(input_ids, self.loss.seed)
        shares = torch.where(labels[partner] == IGNORE, 1.0, shares[:, None])
        embedded: Tensor = student.get_input_embeddings()(input_ids)  # type: ignore[operator]
        mixed = torch.lerp(embedded[partner], embedded, shares[..., None].to(embedded.dtype))
        with self.layers.recorded(student) as outputs:
            hidden_states(student, input_ids, position_ids, embeddings=mixed)
        where = labels[:, 1:] != IGNORE
        share, distances = shares[:, :-1][where], []
        for layer in self.loss.layers:
            of_mix, own, other = (
                states[:, :-1][where].float()
                for states in (outputs[layer], plain[layer], plain[layer][partner])
            )
            distances.append(
                share * self.loss(of_mix, own, None) + (1 - share) * self.loss(of_mix, other, None)
            )
        return torch.stack(distances).mean(0)


def partners(input_ids: Int[Tensor, "B T"], seed: int) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """The row that each row of a micro-batch is mixed with, and its own share max(u, 1 - u) of the mixture.

    Drawn from the tokens and `seed` alone, so that nothing has to be saved; Beta(1, 1) is uniform.
    """
    odd = torch.arange(input_ids.numel(), device=input_ids.device) * 2 + 1
    content = int((input_ids.flatten() * odd).sum())
    generator = torch.Generator().manual_seed(crc32(f"{content} {seed}".encode()))  # it takes 32 bits
    partner = torch.randperm(len(input_ids), generator=generator)
    uniform = torch.rand(len(input_ids), generator=generator)
    return partner.to(input_ids.device), torch.maximum(uniform, 1 - uniform).to(input_ids.device)


def teacher_states(signal: object, loss: HiddenMatch) -> Mapping[int, Float[Tensor, "n E"]]:
    """What a signal about n tokens holds of the teacher's layers, by number.

    Raises:
        ConfigError: it holds nothing of them.
    """
    held = signal.layers if isinstance(signal, DenseSignal) else None
    if held is None or any(layer not in held for layer in loss.teacher_layers):
        raise ConfigError(
            f"loss hidden_match needs outputs of the teacher's layers {list(loss.teacher_layers)}, and the "
            f"teacher's signal ({type(signal).__name__}) does not hold them; set signal.source to live, with "
            "one teacher for all domains, or leave the loss out."
        )
    return held


def hidden_match_of(terms: Sequence[LossTerm]) -> HiddenMatch | None:
    """The hidden-state matching of an objective, if it has one."""
    return next((term.loss for term in terms if isinstance(term.loss, HiddenMatch)), None)


def consistency_of(terms: Sequence[LossTerm]) -> HiddenConsistency | None:
    """The consistency of hidden states in an objective, if it has one."""
    return next((term.loss for term in terms if isinstance(term.loss, HiddenConsistency)), None)


def _keeping(outputs: dict[int, Tensor], number: int) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs[number] = output[0] if isinstance(output, tuple) else output

    return keep
