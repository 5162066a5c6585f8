"""The engines the workbench knows, each behind `octavo.bench.target.Target`, imported when it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.bench.spec import RunSpec
    from octavo.bench.target import Target


def make_target(spec: RunSpec) -> Target:
    """The target of a checked spec; nothing is loaded yet."""
    if spec.engine == "url":
        from octavo.bench.targets.url import UrlTarget

        return UrlTarget(spec)
    if spec.served:
        from octavo.bench.targets.served import ServedTarget

        return ServedTarget(spec)
    if spec.engine == "octavo":
        from octavo.bench.targets.octavo_engine import OctavoTarget

        return OctavoTarget(spec)
    if spec.engine == "transformers":
        from octavo.bench.targets.transformers_engine import TransformersTarget

        return TransformersTarget(spec)
    from octavo.bench.targets.vllm_engine import VllmTarget

    return VllmTarget(spec)


def known_options(engine: str) -> tuple[str, ...]:
    """Names in RunSpec.engine_options that transformers or vllm understands; importing neither."""
    if engine == "transformers":
        from octavo.bench.targets.transformers_engine import OPTIONS

        return OPTIONS
    from octavo.bench.targets.vllm_engine import OPTIONS as VLLM_OPTIONS

    return VLLM_OPTIONS
