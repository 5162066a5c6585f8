"""The direction of imports, and how light the package is before anything runs.

docs/architecture.md draws the layers; this file is their law. Imports inside functions and under
TYPE_CHECKING count as well: a layer must not even know the names of those above it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "octavo"

# Each unit of the package (a folder, or a module at the top) and the units right below it. What
# a unit may import is everything that can be reached downwards from it, and itself.
BELOW: dict[str, set[str]] = {
    "cli": {"server", "batch", "bench", "llm"},
    "server": {"engine"},
    # An OpenAI batch file gets the server's own answers: the application without its port.
    "batch": {"llm", "server"},
    "bench": {"llm"},
    "llm": {"engine"},
    "engine": {"core", "worker", "hub"},
    "worker": {"models", "sampling", "speculation", "lora", "messages", "platform", "config"},
    "models": {"layers", "attention"},
    "sampling": {"layers", "messages", "sampling_params"},
    "speculation": {"layers", "sampling"},
    "lora": {"layers"},
    "layers": {"seam", "quantization"},
    "attention": {"seam", "quantization"},
    "quantization": {"kernels"},
    "kernels": {"platform", "seam"},
    "core": {"config", "messages", "outputs"},
    # leaves that everybody may share
    "hub": {"platform"},
    "platform": {"errors"},
    "messages": {"sampling_params"},
    "seam": set(),
    "outputs": {"errors"},
    "config": {"errors", "other_names"},
    "sampling_params": {"mix", "errors", "other_names"},
    "mix": set(),
    "other_names": set(),
    "errors": set(),
}
# Modules of a folder that are shared more widely than the folder itself: the two messages between
# brain and muscle, the seed arithmetic that both must do alike, and the plain data that describe a
# batch's attention to everything that computes it.
SHARED = {
    "octavo.core.messages": "messages",
    "octavo.core.mix": "mix",
    "octavo.attention.backend": "seam",
}
# Names that a module may use in annotations only: the frozen config that the engine is built from
# holds what others found out about the model and the machine.
TYPES_ONLY = {"octavo.config": {"octavo.models.config", "octavo.platform"}}
# The package itself and its entry point only name others lazily.
EXEMPT = {"octavo", "octavo.__main__"}


def reachable(unit: str) -> set[str]:
    found, todo = {unit, "errors"}, [unit]
    while todo:
        for below in BELOW[todo.pop()]:
            if below not in found:
                found.add(below)
                todo.append(below)
    return found


def unit_of(module: str) -> str | None:
    """The unit a dotted name belongs to; None for names that are not Octavo's."""
    if module in SHARED:
        return SHARED[module]
    parts = module.split(".")
    if parts[0] != "octavo":
        return None
    return parts[1] if len(parts) > 1 else "octavo"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Every module a source imports, relative imports resolved, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                is_folder = (ROOT / full.replace(".", "/")).is_dir()
                found.add(full if base.split(".")[0] == "octavo" and (is_module or is_folder) else base)
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_unit_has_its_place() -> None:
    units = {unit_of(module_name(file)) for file in sources()} - {"octavo", "__main__", None}
    assert units - set(BELOW) == set(), "add the new unit to BELOW, and to docs/architecture.md"


def violations(module: str, imported: set[str]) -> list[str]:
    allowed = reachable(unit_of(module) or "")
    wrong = []
    for name in sorted(imported):
        unit = unit_of(name)
        if unit is None or unit in allowed or name in TYPES_ONLY.get(module, set()):
            continue
        if unit == "octavo" and unit_of(module) in ("cli", "server", "bench", "batch"):
            continue  # the public API
        wrong.append(f"{module} imports {name}")
    return wrong


def test_imports_go_one_way() -> None:
    wrong: list[str] = []
    for file in sources():
        module = module_name(file)
        if module in EXEMPT:
            continue
        imported = imported_modules(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
        wrong += violations(module, imported)
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("octavo.core.scheduler", "from octavo.worker import executor"),
        ("octavo.worker.model_runner", "from octavo.core.scheduler import Scheduler"),
        ("octavo.layers.linear", "def f():\n    from ..models.config import ModelConfig"),
        ("octavo.kernels.cpu.library", "import octavo.attention.layer"),
        ("octavo.engine.engine", "from octavo import cli"),
        ("octavo.attention.backend", "from octavo.layers.norm import RMSNorm"),
        ("octavo.core.request", "from octavo import platform"),
    ],
)
def test_a_wrong_direction_is_seen(module: str, source: str) -> None:
    assert violations(module, imported_modules(source, module, is_package=False)) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("octavo.worker.model_runner", "from octavo.core.messages import SchedulerOutput"),
        ("octavo.cli.chat", "from octavo import LLM"),
        ("octavo.sampling.sampler", "from octavo.core.mix import mix64\nimport torch"),
        ("octavo.attention.cpu", "from octavo.kernels.cpu import library"),
    ],
)
def test_a_right_direction_is_allowed(module: str, source: str) -> None:
    assert violations(module, imported_modules(source, module, is_package=False)) == []


NO_TORCH = [
    "octavo/core",
    "octavo/errors.py",
    "octavo/sampling_params.py",
    "octavo/outputs.py",
    "octavo/config.py",
]


@pytest.mark.parametrize("place", NO_TORCH)
def test_the_brain_names_no_torch(place: str) -> None:
    path = ROOT / place
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        imported = imported_modules(file.read_text(encoding="utf-8"), module_name(file), is_package=False)
        assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy")}, file


def loaded_modules(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    return {line.split(".")[0] for line in result.stdout.splitlines()}


HEAVY = {
    "torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "gguf",
    "llguidance", "fastapi", "uvicorn", "pydantic", "httpx", "requests", "triton", "tqdm", "asyncio",
}  # fmt: skip


def test_import_octavo_is_light() -> None:
    assert loaded_modules("import octavo") & HEAVY == set()


def test_help_is_light() -> None:
    # Counted in modules, not in seconds, so that a busy machine cannot fail it.
    code = "import octavo.cli.main as m\nassert m.main(['--help']) == 0"
    assert loaded_modules(code) & HEAVY == set()


def test_the_brain_loads_no_torch() -> None:
    modules = [module_name(file) for file in sorted((PACKAGE / "core").rglob("*.py"))]
    code = "\n".join(f"import {module}" for module in modules)
    assert loaded_modules(code) & {"torch", "numpy", "transformers"} == set()


def test_public_names_are_those_of_all() -> None:
    import octavo

    assert set(octavo.__all__) <= set(dir(octavo))
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = octavo.LMM


def test_names_for_types_only_are_not_loaded() -> None:
    """What TYPES_ONLY allows stands under TYPE_CHECKING: at run time nothing of it is imported."""
    for module, allowed in TYPES_ONLY.items():
        loaded_modules(f"import {module}, sys\nassert not set({sorted(allowed)!r}) & set(sys.modules)")
