"""Environment variables: what must be set before torch is imported, and where Octavo keeps things."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from octavo.platform.hardware import usable_cores

# Turns a waiting OpenMP thread makes before it sleeps. Unbounded (the default of libgomp is about
# 300,000 and more) a thread that lost its core to another process keeps the others spinning: a
# 13 ms step took 400-900 ms beside one busy thread, 64-85 ms with this bound.
_GOMP_SPINCOUNT = 10_000


def prepare_environment() -> dict[str, str]:
    """Set what must be set before torch is imported; returns the variables this call has set.

    Called by the entry points of the engine, never at import. A variable that the user has set is
    left alone.

    - GOMP_SPINCOUNT=10000: waiting OpenMP threads sleep soon, so that another busy process costs
      its share and not ten times that.
    - OMP_NUM_THREADS: the cores this process may use (affinity and cgroup quota), where OpenMP
      itself would count every core of the machine.
    - TOKENIZERS_PARALLELISM=false: prompts are short, and the tokenizer's own threads would
      compete with the model's and may deadlock after a fork.

    If torch is imported already the first two come too late; then torch's number of threads is
    lowered to the usable cores if it is above.
    """
    wanted = {"TOKENIZERS_PARALLELISM": "false"}
    torch = sys.modules.get("torch")
    if torch is None:
        wanted["GOMP_SPINCOUNT"] = str(_GOMP_SPINCOUNT)
        wanted["OMP_NUM_THREADS"] = str(usable_cores())
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    return added


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The root of Octavo's cache: `$OCTAVO_CACHE`, else `$XDG_CACHE_HOME/octavo`, else `~/.cache/octavo`.

    The environment is read when this is called; `cache_dir` wins over it.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if explicit := os.environ.get("OCTAVO_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().absolute() / "octavo"
