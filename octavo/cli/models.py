"""`octavo models`: which architectures are supported, which aliases exist, what is in the caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

Row = tuple[str, str]


@click.command()
def command() -> None:
    """List the supported architectures, the aliases, and the models in the caches of this machine."""
    from octavo import hub
    from octavo.models.config import SUPPORTED_ARCHITECTURES

    _section("Architectures", list(SUPPORTED_ARCHITECTURES.items()))
    _section("Aliases", [(name, str(alias.hub_id)) for name, alias in hub.ALIASES.items()])
    root = hub.cache_root()
    _section(f"Made by Octavo, in {root}", list(_own_cache(root)))
    _section("Downloaded from the hub", list(_hub_cache()))
    click.echo("A model is also any folder with config.json and *.safetensors, and any .gguf file.")


def _section(title: str, rows: list[Row]) -> None:
    formatter = click.HelpFormatter(width=110)
    with formatter.section(title):
        formatter.write_dl(rows or [("none", "")])
    click.echo(formatter.getvalue())


def _own_cache(root: Path) -> Iterator[Row]:
    """Whole model folders below the cache's root: their path and where they came from."""
    from octavo.hub import cache, source_of

    for record in sorted(root.rglob(cache.RECORD_NAME)):
        folder = record.parent
        if cache.is_complete(folder) and (folder / "config.json").is_file():
            source = source_of(folder)
            origin = source.get("package") or source.get("file") or source["source"]
            yield str(folder.relative_to(root)), f"{_megabytes(folder)}, from {origin}"


def _hub_cache() -> Iterator[Row]:
    """Repositories in huggingface-hub's cache that hold a model."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda repository: repository.repo_id):
        files = {file.file_name for revision in repository.revisions for file in revision.files}
        if repository.repo_type == "model" and "config.json" in files:
            yield repository.repo_id, f"{repository.size_on_disk / 1e6:,.0f} MB"


def _megabytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6:,.0f} MB"
