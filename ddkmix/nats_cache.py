"""What a frozen model's held-out losses were, on disk: measured once per model, rows and kind of device."""

from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from ddkmix.fingerprint import hash_json, replacing
from ddkmix.held_out import HeldOutRows

_DIGEST_BYTES = 32


class NatsCache:
    """Losses of one frozen model on disk, small files per domain, named by a hash of model, domain and rows.

    A domain's name is no file's name: in a user's own datasets it is any string. Sums over rows are float64
    in `.f8`, losses of single tokens float32 in `.f4`, which is there only where somebody asked for them. A
    file is the SHA-256 of what follows and the numbers: damage costs a measurement, no more.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """`model` is the fingerprint of everything about the model that changes its losses."""
        self._folder, self._model = folder, model

    def load(self, held_out: HeldOutRows) -> Float[np.ndarray, " R"] | None:
        """The sums, or None if they are not there or cannot be read."""
        return self._load(held_out, "<f8", len(held_out.num_tokens))

    def save(self, held_out: HeldOutRows, sums: Float[np.ndarray, " R"]) -> None:
        """Keep the sums; atomic."""
        self._save(held_out, "<f8", sums)

    def load_tokens(self, held_out: HeldOutRows) -> Float32[np.ndarray, " n"] | None:
        """The loss of every predicted token, row after row; None if they are not there or cannot be read."""
        return self._load(held_out, "<f4", int(held_out.num_tokens.sum()))

    def save_tokens(self, held_out: HeldOutRows, nats: Float32[np.ndarray, " n"]) -> None:
        """Keep the losses of single tokens; atomic."""
        self._save(held_out, "<f4", nats)

    def _load(self, held_out: HeldOutRows, kind: str, count: int) -> Float[np.ndarray, " _"] | None:
        try:
            data = self._path(held_out, kind).read_bytes()
        except OSError:
            return None
        digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != sha256(data).digest() or len(data) != np.dtype(kind).itemsize * count:
            return None
        return np.frombuffer(data, dtype=kind).copy()

    def _save(self, held_out: HeldOutRows, kind: str, numbers: Float[np.ndarray, " _"]) -> None:
        data = numbers.astype(kind).tobytes()
        with replacing(self._path(held_out, kind)) as file:
            file.write(sha256(data).digest() + data)

    def _path(self, held_out: HeldOutRows, kind: str) -> Path:
        key = hash_json([self._model, held_out.domain, held_out.key])
        return self._folder / f"{key[:32]}.{kind.lstrip('<')}"
