"""The transformers baseline of `octavo batch persona`, started plainly or under torchrun.

    python inference_distributed.py --checkpoint_dir smollm2 --dataset Chameleons …
    torchrun --nproc_per_node=8 inference_distributed.py --checkpoint_dir …

Takes the flags of inference_vllm.py. Under torchrun one rank does the job, with as many replicas of the
model as there are ranks, each on a device of its own; the other ranks wait for its end. One writer then
sees to the files, as ever. `--engine octavo` does the same job with Octavo's engine.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

from octavo.cli.main import main

_DONE = "octavo/persona/done"
_LONGEST_JOB = timedelta(days=30)


def _has(flag: str, arguments: list[str]) -> bool:
    return any(argument.replace("_", "-").split("=")[0] == flag for argument in arguments)


def run(arguments: list[str]) -> int:
    """Do the job, or wait until rank 0 has done it; the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        print(
            "inference_distributed.py: error: the ranks must be on one host: use --nnodes=1", file=sys.stderr
        )
        return 2
    if not _has("--engine", arguments):
        arguments = [*arguments, "--engine", "transformers"]
    if world == 1:
        return main(["batch", "persona", *arguments])
    if _has("--data-parallel-size", arguments):
        print(
            f"inference_distributed.py: error: torchrun's {world} ranks are the replicas: leave "
            "--data-parallel-size out",
            file=sys.stderr,
        )
        return 2
    store = _store(is_host=rank == 0)
    if rank != 0:
        store.wait([_DONE], _LONGEST_JOB)
        return 0
    # torchrun gives each rank one thread; the one that works has the threads of all of them.
    if os.environ.get("OMP_NUM_THREADS") == "1":
        os.environ["OMP_NUM_THREADS"] = str(world)
    try:
        return main(["batch", "persona", *arguments, "--data-parallel-size", str(world)])
    finally:
        store.set(_DONE, "1")


def _store(is_host: bool) -> Any:
    """What the ranks meet at: torchrun's own store, or one of rank 0's under another launcher."""
    import torch.distributed

    has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    distributed: Any = torch.distributed  # torch's own types leave the store out
    return distributed.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ["MASTER_PORT"]),
        is_master=is_host and not has_one,
        wait_for_workers=False,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
