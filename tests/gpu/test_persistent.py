"""All layers of a small model in one kernel, on the card: against the separate kernels, and what it needs.

Its programs wait for one another, and what waits in vain never ends. So the kernel runs in a process of its
own, which is ended if it takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.kernels import triton as triton_kernels
from tests.gpu_report import Record

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not triton_kernels.available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

SECONDS = 150
_COMPARED = """
import json
import torch
from benchmarks.decode_step import BLOCK_SIZE, capture, decode_batch, random_decoder
from benchmarks.gpu_workloads import MODELS
from octavo.attention.backend import ForwardContext

config = {**MODELS["qwen3-0.6b"], "num_hidden_layers": 6}
torch.manual_seed(1)
with torch.inference_mode():
    decoder, _ = random_decoder(config, runs_as_one=True)
    one = decoder._persistent
    assert one is not None
    ids = torch.tensor([77], device="cuda")
    for context in (1, 2, 33, 65, 513, 768, 1500, 4000):
        meta = decode_batch(1, context)
        shape = (meta.block_table.numel(), 2, 8, BLOCK_SIZE, 128)
        caches = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(6)]
        before = [cache.clone() for cache in caches]

        def forward():
            return decoder.forward(ids, meta.positions, ForwardContext(meta, caches)).clone()

        decoder._persistent = None
        expected, stored = forward(), [cache.clone() for cache in caches]
        for cache, was in zip(caches, before):
            cache.copy_(was)
        decoder._persistent = one
        ours = forward()
        again = all(torch.equal(forward(), ours) for _ in range(20))
        graph = capture(forward)
        graph.replay()
        error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
        keys = max(
            ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(caches, stored)
        )
        print(json.dumps([context, error, keys, again]), flush=True)
    meta.positions.fill_(-1)  # padding
    meta.slot_mapping.fill_(-1)
    kept = [cache.clone() for cache in caches]
    forward()
    same = all(torch.equal(a, b) for a, b in zip(caches, kept))
    print(json.dumps(["padding", same, bool(one._done.any()), bool(one._counters.any())]), flush=True)
    # another decoder beside it, on another stream: each counts for itself
    meta = decode_batch(1, 768)
    caches = [torch.randn(cache.shape, dtype=cache.dtype, device="cuda") for cache in caches]
    other, _ = random_decoder(config, runs_as_one=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    alone = [d.forward(ids, meta.positions, ForwardContext(meta, caches)).clone() for d in (decoder, other)]
    torch.cuda.synchronize()
    outputs = [[], []]
    for _ in range(30):
        for stream, each, out in zip(streams, (decoder, other), outputs):
            with torch.cuda.stream(stream):
                out.append(each.forward(ids, meta.positions, ForwardContext(meta, caches)).clone())
    torch.cuda.synchronize()
    beside = all(torch.equal(one, out) for one, outs in zip(alone, outputs) for out in outs)
    # more programs than the device holds at once: the launch is refused, and the separate kernels do it
    other._persistent._programs = 10_000
    refused = other.forward(ids, meta.positions, ForwardContext(meta, caches))
    error = ((refused.double() - alone[1].double()).norm() / alone[1].double().norm()).item()
    print(json.dumps(["beside", beside, other._persistent is None, error]), flush=True)
"""


def test_as_the_separate_kernels(record: Record) -> None:
    """Up to what bf16 rounds; the same bits each time; and padding stores nothing."""
    child = subprocess.run(
        [sys.executable, "-c", _COMPARED],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    *lines, padding, others = [json.loads(line) for line in child.stdout.splitlines()]
    assert [line[0] for line in lines] == [1, 2, 33, 65, 513, 768, 1500, 4000]
    for context, error, keys, again in lines:
        record("one kernel for all layers, bfloat16", error)
        assert error < 0.04, context  # bf16 rounds to 0.004 a time, and random weights keep it all
        assert keys < 0.01, context
        assert again, context
    assert padding == ["padding", True, False, False]
    assert others[:3] == ["beside", True, True]
    assert others[3] < 0.04
