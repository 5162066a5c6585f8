"""What of the machine each replica gets: some of the threads, or a GPU of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from octavo import platform
from octavo.config import EngineArgs
from octavo.errors import ConfigError

_MAX_KV_BYTES = 4 << 30  # of one replica on a CPU, where the user says nothing


@dataclass(frozen=True)
class Share:
    """Environment variables and engine options of one replica."""

    variables: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def shares(args: EngineArgs, count: int) -> list[Share]:
    """The machine divided by `count`. Raises ConfigError for more replicas than there are devices."""
    devices = [] if args.device == "cpu" else visible_gpus()
    if devices:
        if count > len(devices):
            raise ConfigError(
                f"data_parallel_size={count} needs a GPU each, and this machine shows {len(devices)}; "
                "lower it, or use device=cpu"
            )
        return [Share({"CUDA_VISIBLE_DEVICES": name}) for name in devices[:count]]
    if args.device == "cuda":
        raise ConfigError("device=cuda, and this machine shows no GPU")
    machine = platform.detect("cpu")
    if count > machine.cores:
        raise ConfigError(
            f"data_parallel_size={count} is more than the {machine.cores} cores this process may use"
        )
    options: dict[str, Any] = {}
    if args.kv_cache_memory is None:
        # All of them plan at the same moment and see the same free memory: half of it together.
        options["kv_cache_memory"] = min(_MAX_KV_BYTES, machine.available_memory // max(4, 2 * count))
    threads = max(1, machine.threads // count)
    return [Share({"OMP_NUM_THREADS": str(threads)}, dict(options)) for _ in range(count)]


def visible_gpus() -> list[str]:
    """CUDA devices by the names that CUDA_VISIBLE_DEVICES takes; no context is made on them."""
    try:
        import torch
    except ImportError:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else [str(i) for i in range(count)]
    return names[:count]
