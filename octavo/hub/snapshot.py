"""Models from the Hugging Face hub, through the huggingface-hub library.

A snapshot that is whole in the local cache is used without asking the network whether there is a
newer one: a run on a train gives what a run in the office gave. Otherwise the hub is asked first
with a deadline, so that a machine without a network learns that in seconds, and then only the
files that a model needs are downloaded. The library reads HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
HF_ENDPOINT, resumes broken downloads, and checks them.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from octavo.errors import CheckpointError, ModelError, ModelNotFoundError
from octavo.hub.progress import note

# How long the hub may take to answer at all, names looked up and connections made included.
PROBE_SECONDS = 3.0

_SETTINGS_PATTERNS = ["*.json", "*.jinja"]
_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
# Sub-folders (original/, onnx/ …) hold the same weights in other forms, as does consolidated*.
_NEVER = ["*/*", "consolidated*"]

T = TypeVar("T")


class HubId(NamedTuple):
    """`org/name`, and the branch, tag or commit (None: the main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class HubUnreachableError(ModelNotFoundError):
    """The hub did not answer, or may not be asked. Another source may have the model."""


def missing_from(folder: Path) -> str | None:
    """What a model folder lacks to be loaded (None: nothing), by its index and file names."""
    if not (folder / "config.json").is_file():
        return "config.json"
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            absent = [name for name in _indexed_files(folder / index) if not (folder / name).is_file()]
            return absent[0] if absent else None
    if any(folder.glob("*.safetensors")):
        return None
    return "model.safetensors"


def cached_snapshot(
    hub_id: HubId, cache_dir: Path | None, *, tokenizer_only: bool = False, with_code: bool = False
) -> Path | None:
    """The snapshot in the local cache if it is whole. Never uses the network."""
    folder = _cached_folder(hub_id, cache_dir)
    if folder is None or not _has_tokenizer(folder):
        return None
    if tokenizer_only:
        return folder
    if with_code and _names_code(folder) and not any(folder.glob("*.py")):
        return None
    return folder if missing_from(folder) is None else None


def download_snapshot(
    hub_id: HubId,
    cache_dir: Path | None,
    progress: bool,
    *,
    tokenizer_only: bool = False,
    with_code: bool = False,
) -> Path:
    """Download what is missing of a model, and return its snapshot folder.

    Raises HubUnreachableError within about PROBE_SECONDS if the hub cannot be asked,
    ModelNotFoundError if it has no such model (or none for this user), ModelError if the download
    breaks.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = within_seconds(PROBE_SECONDS, lambda: _ask_hub(hub_id))
        names = [entry.rfilename for entry in info.siblings or []]
        patterns = _TOKENIZER_PATTERNS if tokenizer_only else _weight_patterns(names, hub_id)
        note(f"getting {hub_id} from the hub", progress)
        folder = huggingface_hub.snapshot_download(
            hub_id.repo,
            # The branch, not the commit: the library remembers which commit it stood for.
            revision=hub_id.revision,
            cache_dir=cache_dir,
            allow_patterns=patterns + (["*.py"] if with_code else []),
            ignore_patterns=_NEVER if with_code else [*_NEVER, "*.py"],
            tqdm_class=None if progress and sys.stderr.isatty() else _silent_bar(),
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{hub_id} is gated on the hub: accept its terms on its page, then set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{hub_id.repo} has no revision {hub_id.revision!r} on the hub.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(
            f"The hub has no model {hub_id.repo}, or it is private (then set HF_TOKEN)."
        ) from error
    except ModelError:
        raise
    except Exception as error:  # the library passes on whatever its HTTP client and the disk raise
        raise ModelError(
            f"Downloading {hub_id} from the hub broke off: {_one_line(error)}.\n"
            "Start again; it goes on where it was."
        ) from error
    result = Path(folder)
    if not tokenizer_only and (absent := missing_from(result)) is not None:
        raise CheckpointError(f"{hub_id} on the hub is not a whole model: it has no {absent}.")
    return result


def within_seconds(seconds: float, ask: Callable[[], T]) -> T:
    """Run `ask` in a thread and stop waiting after so long.

    Looking up a host name cannot be given a time limit any other way.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="octavo-hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise HubUnreachableError(f"the hub did not answer within {seconds:g} s")
    return answer[0]


def _ask_hub(hub_id: HubId) -> Any:
    """The model's file list. Connection trouble of any kind becomes HubUnreachableError."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().model_info(hub_id.repo, revision=hub_id.revision, timeout=PROBE_SECONDS)
    except errors.OfflineModeIsEnabled as error:
        raise HubUnreachableError("HF_HUB_OFFLINE is set, so the hub was not asked") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status >= 500:
            raise HubUnreachableError(f"the hub answered with status {status}") from error
        raise
    except errors.HFValidationError:
        raise
    except Exception as error:  # the HTTP client's own errors differ between versions of the library
        raise HubUnreachableError(f"the hub cannot be reached ({_one_line(error)})") from error


def _weight_patterns(names: list[str], hub_id: HubId) -> list[str]:
    top = [name for name in names if "/" not in name]
    common = sorted({*_SETTINGS_PATTERNS, *_TOKENIZER_PATTERNS})
    if any(name.endswith(".safetensors") and not name.startswith("consolidated") for name in top):
        return [*common, "*.safetensors"]
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in top):
        return [*common, "pytorch_model*.bin"]
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        raise ModelNotFoundError(
            f"{hub_id} holds GGUF files only. "
            f"Download one (hf download {hub_id.repo} {files[0]}) and give its path."
        )
    raise ModelNotFoundError(f"{hub_id} on the hub has neither *.safetensors nor pytorch_model*.bin.")


def _cached_folder(hub_id: HubId, cache_dir: Path | None) -> Path | None:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        for name in ("config.json", "tokenizer_config.json"):
            found = try_to_load_from_cache(hub_id.repo, name, cache_dir=cache_dir, revision=hub_id.revision)
            if isinstance(found, str):
                return Path(found).parent
    except errors.HFValidationError:
        return None
    return None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _names_code(folder: Path) -> bool:
    try:
        return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _indexed_files(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {_one_line(error)}") from error


def _silent_bar() -> Any:
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # huggingface-hub names its bars, which tqdm itself does not know.
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
