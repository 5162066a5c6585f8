"""Decides what a model name means, and says what was tried when it means nothing.

In this order: an alias, an existing folder, an existing file, a hub id. An alias wins over a
folder of the same name (write ./smollm2 for the folder), a folder over a hub id of the same name.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError
from octavo.hub.cache import cache_root, is_complete, read_record
from octavo.hub.package import SMOLLM2, PackagedModel, converted_folder, fetch_and_convert
from octavo.hub.progress import note
from octavo.hub.snapshot import HubId, HubUnreachableError, cached_snapshot, download_snapshot


class Alias(NamedTuple):
    """A short name for a model that has more than one source."""

    hub_id: HubId
    package: PackagedModel


ALIASES: dict[str, Alias] = {"smollm2": Alias(HubId("HuggingFaceTB/SmolLM2-135M-Instruct"), SMOLLM2)}

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./+-]+))?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class _Request(NamedTuple):
    """How a name shall be resolved, the same for every kind of name."""

    root: Path
    hub_cache: Path | None  # None: huggingface-hub's own
    progress: bool
    with_code: bool = False
    tokenizer_only: bool = False


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of the model `name`, after downloading or converting it if need be.

    `revision` is a branch, tag or commit, for hub ids only. `trust_remote_code` lets *.py files of
    a hub repository be downloaded; nothing here runs them. `cache_dir` stands in for both
    Octavo's cache and (as cache_dir/hub) huggingface-hub's.

    Raises ModelNotFoundError if there is no such model or it cannot be reached, CheckpointError if
    it is there but damaged or incomplete, UnsupportedModelError for a GGUF file of another family,
    ConfigError for a revision where there can be none, ModelError if a download breaks off.
    """
    return _resolve(name, revision, _request(cache_dir, progress, with_code=trust_remote_code))


def resolve_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder that holds the tokenizer of `name`: a model as above, without its weights.

    A local folder needs no config.json then. Raises as `resolve` does.
    """
    request = _request(cache_dir, progress, with_code=trust_remote_code, tokenizer_only=True)
    return _resolve(name, revision, request)


def source_of(folder: Path) -> dict[str, Any]:
    """Where a resolved folder came from: {"source": "gguf" | "package" | "hub" | "folder", …}."""
    if (record := read_record(folder)) is not None and "source" in record:
        return {key: value for key, value in record.items() if key != "files"}
    owner = folder.parent.parent.name
    if folder.parent.name == "snapshots" and owner.startswith("models--"):
        repo = owner.removeprefix("models--").replace("--", "/", 1)
        return {"source": "hub", "repo": repo, "commit": folder.name}
    return {"source": "folder", "path": str(folder)}


def _request(
    cache_dir: str | os.PathLike[str] | None, progress: bool, *, with_code: bool, tokenizer_only: bool = False
) -> _Request:
    root = cache_root(cache_dir)
    return _Request(root, None if cache_dir is None else root / "hub", progress, with_code, tokenizer_only)


def _resolve(name: str, revision: str | None, request: _Request) -> Path:
    name = os.fspath(name)
    if not name.strip():
        raise ModelNotFoundError(f"The model name is empty. Try {_alias_list()}, a folder or a hub id.")
    path = Path(name).expanduser()
    match = _HUB_ID.fullmatch(name)
    is_hub_id = match is not None and name not in ALIASES and not path.exists()
    if revision is not None and not is_hub_id:
        raise ConfigError(f"revision={revision!r} needs a hub id (org/name), and the model is {name!r}.")
    if name in ALIASES:
        return _resolve_alias(name, ALIASES[name], request)
    if path.is_dir():
        return _check_folder(path, request)
    if path.is_file():
        return _resolve_file(path, request)
    looks_local = name.startswith(("/", "./", "../", "~", "\\")) or name.endswith(".gguf")
    if match is None or looks_local:
        raise ModelNotFoundError(_not_found(name, path))
    in_name = match["revision"]
    if revision is not None and in_name is not None and revision != in_name:
        raise ConfigError(f"The model {name!r} names one revision and revision={revision!r} another.")
    return _resolve_hub_id(HubId(match["repo"], revision or in_name), name, path, request)


def _check_folder(path: Path, request: _Request) -> Path:
    if request.tokenizer_only:
        if any((path / name).is_file() for name in _TOKENIZER_FILES):
            return path.absolute()
        raise CheckpointError(
            f"The folder {path} holds no tokenizer: {', '.join(_TOKENIZER_FILES)} are all missing."
        )
    if (path / "config.json").is_file():
        return path.absolute()
    hint = "A model folder holds config.json, *.safetensors and the tokenizer's files."
    ggufs = sorted(path.glob("*.gguf"))
    inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    if ggufs:
        hint = f"It holds a GGUF file; give that one's path: {ggufs[0]}"
    elif (path / "adapter_config.json").is_file():
        hint = "It holds a LoRA adapter; give the base model, and the adapter in lora_configs."
    elif inside:
        hint = f"There is a model in a folder inside it: {path / inside[0]}"
    raise CheckpointError(f"The folder {path} is not a model: config.json is missing.\n{hint}")


def _resolve_file(path: Path, request: _Request) -> Path:
    if path.suffix.lower() != ".gguf":
        hint = f"\nGive its folder instead: {path.parent}" if (path.parent / "config.json").is_file() else ""
        raise ModelNotFoundError(
            f"{path} is a file, but not a .gguf one; a model is a folder or a .gguf file.{hint}"
        )
    from octavo.hub.gguf_convert import convert_cached

    return convert_cached(path, request.root, request.progress, request.tokenizer_only)


def _resolve_alias(name: str, alias: Alias, request: _Request) -> Path:
    folder = converted_folder(alias.package, request.root)
    if is_complete(folder):
        return folder
    cached = _cached(alias.hub_id, request)
    if cached is not None:
        return cached
    try:
        return _download(alias.hub_id, request)
    except ModelError as error:
        tried = str(error).splitlines()[0]
        package = f"{alias.package.package}=={alias.package.version}"
        note(f"{alias.hub_id}: {tried}; taking the package {package} instead", request.progress)
    try:
        return fetch_and_convert(alias.package, request.root, request.progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"The model {name!r} is not in the cache ({request.root}) and could not be downloaded:\n"
            f"  hub, {alias.hub_id}: {tried}\n"
            f"  package index, {package}: {error}\n"
            "Connect this machine once, or copy a model folder here and give its path."
        ) from error


def _resolve_hub_id(hub_id: HubId, name: str, path: Path, request: _Request) -> Path:
    cached = _cached(hub_id, request)
    if cached is not None:
        return cached
    try:
        return _download(hub_id, request)
    except HubUnreachableError as error:
        raise ModelNotFoundError(
            f"The model {name!r} was not found:\n"
            f"  folder or file {path}: does not exist\n"
            f"  cache of the hub: has no whole copy of {hub_id}\n"
            f"  hub: {error}\n"
            f"{_suggestion(name, path)}"
        ) from error
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}\n{_suggestion(name, path)}") from error


def _cached(hub_id: HubId, request: _Request) -> Path | None:
    return cached_snapshot(
        hub_id, request.hub_cache, tokenizer_only=request.tokenizer_only, with_code=request.with_code
    )


def _download(hub_id: HubId, request: _Request) -> Path:
    return download_snapshot(
        hub_id,
        request.hub_cache,
        request.progress,
        tokenizer_only=request.tokenizer_only,
        with_code=request.with_code,
    )


def _not_found(name: str, path: Path) -> str:
    return (
        f"There is no model {name!r}: no such folder, .gguf file, alias or hub id.\n{_suggestion(name, path)}"
    )


def _suggestion(name: str, path: Path) -> str:
    """The nearest thing that does exist, or what a name may be."""
    for alias, entry in ALIASES.items():
        if name.partition("@")[0] == entry.hub_id.repo:
            return f"Its alias {alias!r} can be had from a Python package index as well."
    close = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    try:
        siblings = {
            child.name: child
            for child in path.parent.iterdir()
            if child.suffix == ".gguf" or (child / "config.json").is_file()
        }
    except OSError:
        siblings = {}
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {str(siblings[near[0]])!r}?"
    kinds = "a folder with config.json, a .gguf file, a hub id (org/name), or an alias"
    return f"A model is {kinds} ({_alias_list()})."


def _alias_list() -> str:
    return ", ".join(repr(alias) for alias in ALIASES)
