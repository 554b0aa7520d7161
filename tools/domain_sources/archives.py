"""Download pinned archives through the registries' own clients and read their members in memory."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from domain_sources.model import BuildError, Package

CLIENTS = {
    # Binary wheels only: pip would run the build script of a source distribution.
    "pypi": "{python} -m pip download -q --no-deps --only-binary=:all: {package}=={version}",
    "npm": "npm pack --silent {package}@{version}",
    "debian": "apt-get download -q {package}={version}",
}


def archive_name(package: Package) -> str:
    """Return the file name under which a package's archive is kept in the work folder."""
    ending = {"debian": "deb", "pypi": "whl", "npm": "tgz"}[package.registry]
    plain = package.package.replace("@", "").replace("/", "-")
    return f"{plain}_{package.version.replace(':', '-')}.{ending}"


def fetch(package: Package, work: Path, python: str) -> Path:
    """Return the local path of a package's archive, downloaded unless there, its sha256 verified."""
    path = work / archive_name(package)
    if not path.exists():
        download(package, path, python)
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != package.sha256:
        raise BuildError(
            f"{path}: sha256 is {got}, the manifest pins {package.sha256};"
            " delete the file to download it again, or pin the new archive"
        )
    return path


def download(package: Package, path: Path, python: str) -> None:
    """Run the registry's client in an empty folder and move the one file it leaves to `path`."""
    folder = path.with_suffix(".part")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.iterdir():
        leftover.unlink()
    command = [
        word.format(python=python, package=package.package, version=package.version)
        for word in CLIENTS[package.registry].split()
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        raise BuildError(
            f"{package.package} {package.version} cannot be had from the {package.registry} registry;"
            f" if that version is gone, put the archive at {path} or pin another version"
            f" in manifest.yaml ({' '.join(done.stderr.split())[-160:]})"
        )
    files[0].replace(path)
    folder.rmdir()


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every regular file of a .deb, .whl or .tgz; nothing is written."""
    if path.suffix == ".whl":
        yield from _zip_members(path)
    elif path.suffix == ".tgz":
        with tarfile.open(path, "r|gz") as tar:
            yield from _tar_members(tar)
    else:
        yield from _deb_members(path)


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, archive.read(info)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for info in tar:
        if info.isfile():
            file = tar.extractfile(info)
            if file is not None:
                yield info.name.removeprefix("./"), file.read()


def _deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{path}: dpkg-deb cannot read it: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        yield from _tar_members(tar)
