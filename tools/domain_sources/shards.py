"""Write documents as WebDataset tars that are byte-for-byte the same in every build."""

from pathlib import Path

import webdataset

from domain_sources.model import Document
from domain_sources.split import tar_bytes


def spread(documents: list[Document], num_shards: int) -> list[list[Document]]:
    """Return the documents in `num_shards` runs of about equal bytes, order kept."""
    total = sum(tar_bytes(document.text) for document in documents)
    runs: list[list[Document]] = [[] for _ in range(num_shards)]
    before = 0
    for document in documents:
        runs[min(num_shards - 1, before * num_shards // total)].append(document)
        before += tar_bytes(document.text)
    return runs


def write_shards(documents: list[Document], stem: Path, num_shards: int) -> list[Path]:
    """Write `stem`-000000.tar and so on, and return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, run in enumerate(spread(documents, num_shards)):
        path = stem.with_name(f"{stem.name}-{number:06d}.tar")
        with path.open("wb") as file:
            writer = webdataset.TarWriter(
                file, encoder=False, user="root", group="root", mode=0o644, mtime=0, compress=False
            )
            for document in run:
                text = document.text.rstrip("\n") + "\n"
                writer.write({"__key__": document.key, "txt": text.encode("utf-8")})
            writer.close()
        paths.append(path)
    return paths
