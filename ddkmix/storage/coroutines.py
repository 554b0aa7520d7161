"""Running the coroutines of a file system from any thread, so that they can be stopped."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

from ddkmix.storage.faults import Stopped

T = TypeVar("T")
_TICK_S = 0.1
"""How soon a `stop` is noticed."""


def run(system: Any, coroutine: Coroutine[Any, Any, T], stop: threading.Event | None = None) -> T:
    """Run a coroutine on a file system's loop; cancel it when this thread is interrupted or `stop` is set.

    Raises:
        Stopped: `stop` was set.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, system.loop)
    try:
        while True:
            try:
                return future.result(_TICK_S)
            except NotYet:
                if future.done():  # it ended just now, perhaps with a timeout of its own
                    return future.result()
            if stop is not None and stop.is_set():
                raise Stopped
    except BaseException:
        future.cancel()
        raise
