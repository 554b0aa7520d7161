"""The exact alternative: the teacher's last hidden states, and its output weights once.

A record is the teacher's own loss of each token (2 bytes) and the states: bfloat16 bits as they are where the
teacher computes in it (exact), half precision, single precision (exact for float32), or 8-bit integers with
one float32 scale a token (an error of at most 1/254 of the token's largest number).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddkmix.batch import Head
from ddkmix.errors import DataError, RowError
from ddkmix.fingerprint import replacing

HEAD = "head.safetensors"


def encode_hidden(
    hidden: Float[Tensor, "n D"], teacher_nats: Float[np.ndarray, " n"], num_bytes: int
) -> bytes:
    """The record of a row.

    Args:
        hidden: last states of the tokens that predict, in the type that the teacher computes in.
        teacher_nats: the teacher's own loss of these tokens.
        num_bytes: of a number, 1, 2 or 4.
    """
    nats = teacher_nats.astype("<f2").tobytes()
    if num_bytes == 4:
        return nats + hidden.float().numpy().astype("<f4").tobytes()
    if num_bytes == 2:
        half = hidden if hidden.dtype == torch.bfloat16 else hidden.half()
        return nats + half.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    scale = hidden.float().abs().amax(dim=1) / 127.0
    codes = torch.round(hidden.float() / scale.clamp(min=1e-30)[:, None]).to(torch.int8)
    return nats + scale.numpy().astype("<f4").tobytes() + codes.numpy().tobytes()


def decode_hidden(
    data: bytes | memoryview, num_tokens: int, size: int, num_bytes: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "n D"], Float[np.ndarray, " n"]]:
    """What `encode_hidden` stored: states in the teacher's type, and its own loss.

    Raises:
        RowError: the bytes are no record of that many tokens.
    """
    n = num_tokens
    expected = n * (2 + size * num_bytes + (4 if num_bytes == 1 else 0))
    if len(data) != expected:
        raise RowError(f"{len(data)} bytes where {expected} are needed")
    nats = np.frombuffer(data, dtype="<f2", count=n).astype(np.float32)
    if num_bytes == 4:
        hidden = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=2 * n).astype(np.float32))
    elif num_bytes == 2:
        bits = torch.from_numpy(np.frombuffer(data, dtype="<i2", offset=2 * n).astype(np.int16))
        hidden = bits.view(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    else:
        scale = np.frombuffer(data, dtype="<f4", offset=2 * n, count=n).astype(np.float32)
        codes = np.frombuffer(data, dtype="<i1", offset=6 * n).reshape(n, size)
        hidden = torch.from_numpy(codes * scale[:, None])
    return hidden.reshape(n, size).to(dtype), nats


def save_head(folder: Path, head: Head) -> None:
    """Write the teacher's output weights into a store.

    Raises:
        DataError: they cannot be written.
    """
    from safetensors.torch import save

    tensors = {"weight": head.weight[: head.vocab_size]}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size]
    facts = {"scale": repr(head.scale), "softcap": repr(head.softcap)}
    path = folder / HEAD
    try:
        with replacing(path) as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, facts))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free space or set capture.folder."
        ) from None


def load_head(folder: Path) -> Head:
    """The teacher's output weights.

    Raises:
        DataError: they are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / HEAD
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = file.metadata()
            return Head(
                weight=file.get_tensor("weight"),
                bias=file.get_tensor("bias") if "bias" in file.keys() else None,  # noqa: SIM118
                scale=float(facts["scale"]),
                softcap=None if facts["softcap"] == "None" else float(facts["softcap"]),
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}); delete it and capture again.") from None
