"""The last responses of a student in training, in a ring of fixed size: what on-policy losses are fed with.

A response is kept with the row that it answers and the step whose student gave it, so that its age is known.
The oldest one goes when there is no room. What a step takes out is a function of (seed, step) and of what is
in the
buffer: equal on every rank, and after a resume.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ddkmix.errors import RunError
from ddkmix.fingerprint import hash_json


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """A response of the student in training."""

    domain: int
    """Number of the prompt's domain, as in `domain_ids`."""
    shard: int
    """Number of its shard in the domain's rows."""
    row: int
    """Number of its row in the shard."""
    step: int
    """Completed steps of the student that gave it."""
    ids: Int[np.ndarray, " n"]
    """At least one token."""


class ReplayBuffer:
    """The newest rollouts, at most `capacity` of them."""

    def __init__(self, capacity: int, *, seed: int) -> None:
        """Empty.

        Args:
            capacity: rollouts that it holds, at least 1.
            seed: of what `sample` takes.
        """
        assert capacity >= 1
        self.capacity, self._seed = capacity, seed
        self._rollouts: deque[Rollout] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._rollouts)

    def push(self, rollouts: Sequence[Rollout]) -> None:
        """Add rollouts, in an order that all ranks agree on; the oldest ones make room."""
        self._rollouts.extend(rollouts)

    def sample(self, count: int, step: int) -> list[Rollout]:
        """Different rollouts, each as likely as the others: those of the smallest random numbers.

        Args:
            count: at most as many as there are.
            step: the step that takes them; with the seed it makes the random numbers, and nothing else does.
        """
        assert 0 <= count <= len(self)
        key = int(hash_json(["replay buffer", self._seed, step])[:32], 16)
        numbers = np.random.Philox(key=key).random_raw(len(self))
        chosen = np.argsort(numbers, kind="stable")[:count].tolist()
        return [self._rollouts[i] for i in chosen]

    def state_dict(self) -> dict[str, Int[np.ndarray, " _"]]:
        """Everything as flat arrays of int64 and int32, oldest first, for safetensors."""
        rollouts = list(self._rollouts)
        numbers = {
            name: np.array([getattr(one, name) for one in rollouts], dtype=np.int64)
            for name in ("domain", "shard", "row", "step")
        }
        lengths = np.array([len(one.ids) for one in rollouts], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(one.ids.astype(np.int32) for one in rollouts)])
        return {**numbers, "lengths": lengths, "ids": ids}

    def load_state_dict(self, state: Mapping[str, Int[np.ndarray, " _"]]) -> None:
        """Hold what `state_dict` said, in the place of everything; of more than the capacity the newest.

        Args:
            state: of a buffer of any capacity.

        Raises:
            RunError: the arrays do not fit together; the buffer is as it was.
        """
        try:
            numbers = [state[name].tolist() for name in ("domain", "shard", "row", "step")]
            lengths, ids = state["lengths"], state["ids"]
            whole = len({len(column) for column in (*numbers, lengths)}) == 1
            if not whole or (len(lengths) and int(lengths.min()) < 1) or int(lengths.sum()) != len(ids):
                raise ValueError("its columns are of different lengths")
        except (KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(
                f"the replay buffer of the checkpoint is damaged ({reason}); resume from an older one."
            ) from None
        parts = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1]) if len(lengths) else []
        self._rollouts = deque(
            (
                Rollout(domain=domain, shard=shard, row=row, step=step, ids=own)
                for domain, shard, row, step, own in zip(*numbers, parts, strict=True)
            ),
            maxlen=self.capacity,
        )
