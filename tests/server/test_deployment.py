"""The files one deploys with, as far as they can be checked without building an image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from octavo.cli import serve
from octavo.cli.layers import variable_of

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments dropped."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile(file: Path) -> None:
    found = instructions(file)
    words = [word for word, _ in found]
    known = {
        "FROM", "SHELL", "RUN", "WORKDIR", "ENV", "COPY", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK",
        "STOPSIGNAL", "ENTRYPOINT",
    }  # fmt: skip
    assert set(words) <= known
    for word, rest in found:
        if word == "FROM":
            assert re.search(r":\d+\.\d+", rest), f"not pinned: {rest}"
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines(), source
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
    entry = [rest for word, rest in found if word == "ENTRYPOINT"]
    assert entry == ['["octavo", "serve", "--host", "0.0.0.0"]']
    user = [index for index, (word, rest) in enumerate(found) if word == "USER" and rest == "10001"]
    assert user, "runs as root"
    assert user[0] < words.index("ENTRYPOINT")


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say() -> None:
    result = subprocess.run(
        [str(HADOLINT), *map(str, DOCKERFILES)], capture_output=True, text=True, check=False
    )
    assert result.stdout == ""
    assert result.returncode == 0


def test_compose() -> None:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    variables = {variable_of(option) for option in serve.command.params if isinstance(option, click.Option)}
    for name, service in content["services"].items():
        assert service["profiles"], name
        for published in service.get("ports", ()):
            assert published.startswith("127.0.0.1:"), "open to the network"
        build = service.get("build")
        if build is not None:
            assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
            assert set(service["environment"]) <= variables
            assert not any("KEY" in name and "FILE" not in name for name in set(service["environment"]) - {
                "OCTAVO_METRICS_KEY"
            })  # fmt: skip
            grace = int(service["stop_grace_period"].removesuffix("s"))
            assert grace > int(service["environment"]["OCTAVO_DRAIN_TIMEOUT"])
            for secret in service["secrets"]:
                assert secret in content["secrets"]
        else:
            assert re.search(r":v?\d+\.\d+", service["image"]), "not pinned"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
            elif not source.startswith("$"):
                assert source in content["volumes"], source


def test_prometheus_asks_the_service_that_there_is() -> None:
    content = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    (job,) = content["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == ["octavo:8000"]


def test_the_guide_names_only_flags_and_variables_that_there_are() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    flags = {opt for option in serve.command.params for opt in (*option.opts, *option.secondary_opts)}
    variables = {variable_of(option) for option in serve.command.params if isinstance(option, click.Option)}
    others = {"--gpus", "--ipc", "--rm", "--time", "--profile", "--help", "--reload", "--url"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - flags - others == set()
    assert set(re.findall(r"OCTAVO_[A-Z_]+", text)) - variables - {"OCTAVO_CONFIG", "OCTAVO_CACHE"} == set()
    keys = {name.replace("-", "_") for flag in flags for name in [flag.removeprefix("--")]}
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        found = yaml.safe_load(block)
        if "model" in found:
            assert set(found) <= keys
