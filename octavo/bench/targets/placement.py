"""Where the transformers engine puts its models: GPU_STRATEGY, TARGET_GPU, DRAFTER_GPU and the two ratios.

    shared_all   every model over all visible GPUs
    single       every model on TARGET_GPU
    separate     the target on TARGET_GPU, the drafter on DRAFTER_GPU
    ratio        every model over all visible GPUs, each within its share of a card's memory

On a CPU, and with a single GPU and shared_all, there is nothing to choose. A model that is spread over
several cards needs the package accelerate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.bench.spec import PlacementSpec, is_installed
from octavo.errors import ConfigError, OctavoError


def device_arguments(
    placement: PlacementSpec, role: str, device: str, memory: list[int]
) -> tuple[dict[str, Any], str | None]:
    """(keyword arguments for from_pretrained, device to move the model to or None).

    memory: bytes of each visible GPU; role: "target" or "drafter". Raises ConfigError for a GPU that is not
    there.
    """
    if device == "cpu" or not memory:
        return {}, None
    strategy = placement.strategy
    if strategy in ("single", "separate"):
        index = (
            placement.drafter_gpu if strategy == "separate" and role == "drafter" else placement.target_gpu
        )
        if index >= len(memory):
            name = "DRAFTER_GPU" if strategy == "separate" and role == "drafter" else "TARGET_GPU"
            raise ConfigError(f"{name}={index}: the GPUs here are 0 to {len(memory) - 1}")
        return {}, f"cuda:{index}"
    if len(memory) == 1 and strategy == "shared_all":
        return {}, "cuda:0"
    arguments: dict[str, Any] = {"device_map": "auto"}
    if strategy == "ratio":
        share = placement.target_ratio if role == "target" else placement.drafter_ratio
        arguments["max_memory"] = {index: int(total * share) for index, total in enumerate(memory)}
    return arguments, None


def load_model(
    path: str | Path,
    dtype: str,
    device: str,
    placement: PlacementSpec,
    role: str,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model of transformers, placed. Raises OctavoError where it cannot be."""
    import torch
    from transformers import AutoModelForCausalLM

    count = torch.cuda.device_count() if device == "cuda" else 0
    memory = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    arguments, move_to = device_arguments(placement, role, device, memory)
    if arguments and not is_installed("accelerate"):
        raise OctavoError(
            f"GPU_STRATEGY={placement.strategy} spreads a model over GPUs, which transformers does with the "
            "package accelerate: pip install accelerate, or use GPU_STRATEGY=single"
        )
    given: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=given, local_files_only=True, trust_remote_code=trust_remote_code, **arguments
        )
    except (OSError, ValueError) as error:
        raise OctavoError(f"transformers cannot load {path}: {error}") from error
    return model if move_to is None else model.to(move_to)
