"""Which process this is, and how processes agree, in loops that are not ours.

Frameworks start `torch.distributed` in their own way and time, so it is asked when it is needed. Without it,
`RANK` and `WORLD_SIZE`, which every launcher sets, count; a loop that ignores both is one process.
"""

import os
import sys
from typing import Any, TypeVar

from ddkmix.errors import ConfigError

T = TypeVar("T")


def open_processes() -> Any:
    """Accelerate's view of the processes, connected, on the CPU where ACCELERATE_USE_CPU says so.

    Its `PartialState` alone looks for accelerators only, and leaves ranks on CPUs without a group: each would
    then take its own share for the whole. Ranks whose share is done wait for the others, for days if need be.
    """
    from datetime import timedelta

    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked: bool = parse_flag_from_env("ACCELERATE_USE_CPU")  # type: ignore[no-untyped-call]
    return PartialState(cpu=asked, timeout=timedelta(days=7))


def wait_for_everyone() -> None:
    """Go on when all processes have come here; unlike a reduction, this also waits on accelerators."""
    everyones(None)


def current_rank() -> tuple[int, int]:
    """(rank, world size) of this process.

    Raises:
        ConfigError: RANK and WORLD_SIZE are set and make no sense.
    """
    distributed = _distributed()
    if distributed is not None:
        return distributed.get_rank(), distributed.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world_size is None:
        return 0, 1
    try:
        found = int(rank), int(world_size)
    except ValueError:
        found = -1, 0
    if not 0 <= found[0] < found[1]:
        raise ConfigError(f"RANK={rank!r}, WORLD_SIZE={world_size!r} in the environment make no rank.")
    return found


def sum_over_ranks(tensor: Any) -> Any:
    """The sum of a tensor over all processes; itself when there is one."""
    distributed = _distributed()
    if distributed is not None:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def from_main(value: T) -> T:
    """Rank 0's value, on every process.

    Args:
        value: this process's own, small; only rank 0's counts.
    """
    found: T = everyones(value)[0]
    return found


def everyones(value: Any) -> list[Any]:
    """A small value of every process, by rank, on every process."""
    distributed = _distributed()
    if distributed is None:
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def _distributed() -> Any:
    """torch.distributed where it runs; never imports torch."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None
