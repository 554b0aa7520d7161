"""The files of a model, in its folder or from the Hub, and what they say without loading it.

No torch and no transformers here: `lint` and `plan` answer from these files alone.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ddkmix.errors import ConfigError, ModelError
from ddkmix.fingerprint import FileDigests, hash_json


def model_file(name: str, file: str, revision: str | None = None) -> Path:
    """The local path of one file of a model: in its folder, or in the Hub's cache (downloaded if needed).

    Raises:
        ModelError: it cannot be had.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        if path.is_file():
            return path
        raise ModelError(f"{name} has no {file}; save the model and its tokenizer with save_pretrained.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder; give a local model folder or a Hub id (owner/name).")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is not a local folder and {file} cannot be had from the Hub ({reason}); give a local "
            "folder, or check the id and the network."
        ) from None


def optional_model_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """As `model_file`; None where the model has no such file, or the Hub's cache has none and it is offline.

    Raises:
        ModelError: the folder does not exist, or the Hub refuses.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError):
        return model_file(name, file, revision)  # which says what is wrong with the name or the Hub


def read_model_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json, without loading anything else.

    Raises:
        ModelError: it cannot be had or read.
    """
    return read_json_object(model_file(name, "config.json", revision))


def read_json_object(path: Path) -> dict[str, Any]:
    """One of the JSON files of a model.

    Raises:
        ModelError: it is not a JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); save the model again.") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is not JSON with keys but a {type(tree).__name__}; save the model again.")
    return tree


def model_fingerprint(name: str, revision: str | None, cache_dir: Path) -> str:
    """Changes with a model's config or parameters (SHA-256, hex).

    Raises:
        ModelError: it has no safetensors.
    """
    folder = model_file(name, "config.json", revision).parent
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{name} has no *.safetensors; save it with save_pretrained.")
    digests = FileDigests(cache_dir)
    fingerprint = hash_json([[path.name, digests.of(path)] for path in (folder / "config.json", *files)])
    digests.save()
    return fingerprint


def check_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Raises ConfigError if a layer to keep does not exist."""
    if max(layers) >= num_layers:
        raise ConfigError(f"student.layers = {list(layers)}; the teacher has layers 0 to {num_layers - 1}.")


def common_vocab(sizes: Mapping[str, int], tokenizer_size: int) -> int | None:
    """How many classes all heads share, when their sizes differ by padding alone; None when equal.

    Rows of the output layer behind the tokenizer's last token are padding that no text contains. Cutting
    all heads to the shortest one is exact for the labels; the teacher's distribution is renormalised
    without the classes that are cut.

    Args:
        sizes: output classes of each model; the key is what a message calls it.
        tokenizer_size: tokens of the tokenizer that they share.

    Raises:
        ModelError: a head is smaller than the tokenizer.
    """
    for name, size in sizes.items():
        if size < tokenizer_size:
            raise ModelError(
                f"the {name} has {size} output classes and the tokenizer {tokenizer_size} tokens; a model "
                "needs a class for every token. Use models that share this tokenizer."
            )
    return None if len(set(sizes.values())) <= 1 else min(sizes.values())


def parameter_counts(name: str, revision: str | None = None) -> dict[str, int] | None:
    """Elements of each parameter, from the headers of the safetensors files; None if they are not here.

    Raises:
        ModelError: a file is damaged.
    """
    files = sorted(model_file(name, "config.json", revision).parent.glob("*.safetensors"))
    counts: dict[str, int] = {}
    for path in files:
        header = _safetensors_header(path)
        counts.update({k: prod(v["shape"]) for k, v in header.items() if k != "__metadata__"})
    return counts or None


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Eight bytes of length, then that much JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data = file.read(min(length, size))  # a damaged length could ask for exabytes
    try:
        if len(data) < length:
            raise ValueError(f"{len(data)} of {length} header bytes")
        header: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); download or save it again."
        ) from None
    return header
