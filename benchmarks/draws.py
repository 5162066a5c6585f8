"""What drawing a step's tokens costs on this GPU, for each kind of sampling.

One JSON line for each number of rows: microseconds of a draw as a CUDA graph, median of 20 replays.

    python -m benchmarks.draws --rows 1 16 64 --scale 3.0
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from benchmarks.decode_step import capture, milliseconds
from octavo.kernels.triton import sample, top

VOCAB = 151_936


def draws(rows: int, scale: float) -> dict[str, Callable[[], object]]:
    """Each kind of draw over normal logits of this standard deviation."""
    logits = torch.randn(rows, VOCAB, device="cuda") * scale
    one = torch.ones(rows, device="cuda")
    seed = torch.arange(rows, device="cuda")
    k = torch.full((rows,), 50, dtype=torch.int32, device="cuda")

    def filtered(
        top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, cut: bool, both: bool
    ) -> Callable[[], object]:
        return lambda: sample.draw(logits, one, top_k, top_p, min_p, seed, seed, any_cut=cut, any_both=both)

    return {
        "greedy": lambda: sample.draw(logits, None),
        "temperature": lambda: sample.draw(logits, one, seed=seed, position=seed),
        "top_k=50": filtered(k, one, one * 0, True, False),
        "top_p=0.9": filtered(k * 0, one * 0.9, one * 0, True, False),
        "top_k=50, top_p=0.9": filtered(k, one * 0.9, one * 0, True, True),
        "min_p=0.05": filtered(k * 0, one, one * 0.05, False, False),
        "logprobs=0": lambda: top.top(logits, seed, 0),
        "logprobs=20": lambda: top.top(logits, seed, 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--scale", type=float, default=3.0, help="standard deviation of the logits")
    arguments = parser.parse_args()
    for rows in arguments.rows:
        took = {
            name: round(milliseconds(capture(draw), 20) * 1e3, 1)
            for name, draw in draws(rows, arguments.scale).items()
        }
        print(json.dumps({"rows": rows, "scale": arguments.scale, "microseconds": took}), flush=True)


if __name__ == "__main__":
    main()
