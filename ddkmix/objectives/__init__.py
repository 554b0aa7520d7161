"""What a step learns from: the data's responses, the teacher's, or the student's own. One family a file.

An objective is a frozen dataclass whose fields are its parameters in a config (`objective:`). It decides
where the responses of a step come from and turns the planner's rows into parts, each with its rows and its
losses; `train_step` does a forward and a backward pass of each. `loss` keeps its meaning: token losses on
the rows of data, or on the responses that stand in their place. Domains of plain text take part in that
alone. Importing these files loads no torch.

| objective | learns from | |
|---|---|---|
| `distill` | data | the default |
| `seqkd` | teacher's responses | `loss` |
| `gkd`, `distillm` | data or student's responses, by step | `loss` |
| `dpkd`, `plad_ranking`, `plad_margin`, `ipo`, `cpo`, `simpo` | pairs of both | beside `loss` on the data |
| `distillm2` | both, each side its divergence | beside `loss` on the data |
| `minillm` | student's responses | policy gradient beside `loss` on the data |
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ddkmix.errors import ConfigError, did_you_mean
from ddkmix.objectives.base import Objective, Part
from ddkmix.objectives.pairs import Pairs, PairSettings
from ddkmix.objectives.replaced import GKD, Distill, DistiLLM, SeqKD
from ddkmix.objectives.samples import MiniLLMObjective
from ddkmix.objectives.sides import DistiLLM2
from ddkmix.plugins import build
from ddkmix.preference import PAIR_LOSSES

__all__ = [
    "GKD",
    "OBJECTIVES",
    "DistiLLM",
    "DistiLLM2",
    "Distill",
    "MiniLLMObjective",
    "Objective",
    "PairSettings",
    "Pairs",
    "Part",
    "SeqKD",
    "build_objective",
]

OBJECTIVES: dict[str, type] = {
    "distill": Distill,
    "seqkd": SeqKD,
    "gkd": GKD,
    "distillm": DistiLLM,
    "distillm2": DistiLLM2,
    "minillm": MiniLLMObjective,
    **{name: loss for name, loss in PAIR_LOSSES.items() if name != "chosen_nll"},
}
"""The objectives that a config can name; the parameters of a pair loss stand beside those of `Pairs`."""


def build_objective(spec: Mapping[str, Any]) -> Objective:
    """The objective that a config names.

    Args:
        spec: `name` and the parameters of that entry of `OBJECTIVES`.

    Raises:
        ConfigError: the name or a parameter is wrong.
    """
    name = spec.get("name")
    if name not in PAIR_LOSSES or name not in OBJECTIVES:
        found = build(spec, OBJECTIVES, where="objective")
        if not isinstance(found, Objective):
            raise ConfigError(
                f"objective {name} is a {type(found).__name__} and has not the methods of an objective; name "
                f"one of {', '.join(OBJECTIVES)}, or a class that has its methods."
            )
        return found
    known = [field.name for field in fields(PairSettings)]
    shared = {key: value for key, value in spec.items() if key in known}
    own = {key: value for key, value in spec.items() if key not in known}
    of_loss = [field.name for field in fields(OBJECTIVES[name])]
    for key in own:
        if key not in ("name", *of_loss):
            raise ConfigError(
                f"objective ({name}) has no parameter {key!r}; {did_you_mean(key, [*of_loss, *known])}"
            )
    return Pairs(
        name=name,
        loss=build(own, OBJECTIVES, where="objective"),
        settings=build({"name": name, **shared}, {name: PairSettings}, where="objective"),
    )
