"""The project's own files agree with each other, and set-up picks the right build of torch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import octavo

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def load_setup_env() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env() -> types.ModuleType:
    return load_setup_env()


def requirements() -> list[Requirement]:
    """Every requirement of pyproject.toml, read as text: Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("\ndependencies") : text.index("[project.scripts]")]
    found = [
        Requirement(line) for line in re.findall(r'^ *(?:\w+ = \[)?"([^"]+)"[\],]', section, re.MULTILINE)
    ]
    assert len(found) > 15
    return [requirement for requirement in found if requirement.name != "octavo"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in wanted}


def test_every_requirement_is_bounded_and_its_pin_fits() -> None:
    for requirement in requirements():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"
        # A CUDA build of torch brings the triton it needs, so that one cannot be pinned.
        if requirement.name != "triton":
            assert pins()[requirement.name] in requirement.specifier, requirement


def test_ci_and_readme_use_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert {"setup", "demo", "test", "test-full", "lint", "bench", "clean"} <= targets
    for name in (".ci/run", "README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/quickstart.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        used = set(re.findall(r"(?:^|`|\$ |&& )make (?:--no-print-directory )?([a-z-]+)", text, re.MULTILINE))
        assert used <= targets, name


def test_every_folder_is_in_the_architecture_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in (path for path in (ROOT / "octavo").iterdir() if (path / "__init__.py").exists()):
        assert f"`{folder.name}/`" in text, f"docs/architecture.md does not say what {folder.name}/ is"


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_version_is_said_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", octavo.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {octavo.__version__}" in changelog


def answer(stdout: str) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], 0, stdout=stdout, stderr="")


@pytest.mark.parametrize(
    ("nvidia", "index", "reachable", "extra", "said"),
    [
        (True, "2.13.0+cpu, 2.13.0", True, [], "with CUDA"),
        (False, "2.14.0, 2.13.0+cpu, 2.13.0", True, [], "2.13.0+cpu from pip's configured sources"),
        (
            False,
            "2.14.0, 2.13.0",
            True,
            ["--extra-index-url"],
            "2.13.0+cpu from https://download.pytorch.org",
        ),
        (False, "2.14.0, 2.13.0", False, [], "several GB"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyPI's torch is the small one")
def test_torch_is_taken_from_the_right_place(
    setup_env: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    nvidia: bool,
    index: str,
    reachable: bool,
    extra: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(setup_env, "has_nvidia_driver", lambda: nvidia)
    monkeypatch.setattr(setup_env, "pip", lambda *arguments: answer(f"Available versions: {index}"))
    monkeypatch.setattr(setup_env, "can_reach", lambda url: reachable)
    arguments, text = setup_env.torch_source()
    assert arguments[:1] == extra
    assert said in text


def test_the_stamp_follows_the_project_files(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    kernels = tmp_path / "octavo" / "kernels" / "cpu" / "src"
    kernels.mkdir(parents=True)
    prints = [setup_env.fingerprint()]
    for file in (tmp_path / "pyproject.toml", kernels / "new.c", kernels.parent / "build.py"):
        file.write_text("first")
        prints.append(setup_env.fingerprint())
        file.write_text("second")
        prints.append(setup_env.fingerprint())
    assert len(set(prints)) == len(prints)


def test_what_is_installed_for_one_purpose_serves_the_lesser_ones(
    setup_env: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed: list[str] = []
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setattr(setup_env, "fingerprint", lambda: "print")
    monkeypatch.setattr(setup_env, "install", installed.append)
    (tmp_path / "bin").mkdir()
    for name in ("pip", "octavo"):
        (tmp_path / "bin" / name).touch()
    for purpose in ("full", "dev", "demo"):
        monkeypatch.setattr(sys, "argv", ["setup_env.py", purpose])
        setup_env.main()
    assert installed == ["full"]
    (tmp_path / ".octavo-full").unlink()
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "full"])
    setup_env.main()
    assert installed == ["full", "full"]
