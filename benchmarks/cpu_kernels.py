"""How close the CPU kernels come to the machine: linear layers, and the whole decoder step.

    python benchmarks/cpu_kernels.py [--threads 2] [--isa avx2] [--rows 1,4,16,64,256]

Random weights in SmolLM2-135M's shapes (269 MB of bf16). Each row of the first table is the time
of all products of one forward, head included, ours and oneDNN's (prepacked), beside the machine's
read bandwidth and its peak of bf16 products, both measured here. The second table is the fused
decoder, without the head, over a KV cache of 256 tokens a request. Times are the minimum over many
runs; `foreign` is how many cores others kept busy meanwhile (above 0.1 the row is not to be quoted).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.attention.backend import AttentionMetadata, AttentionSpec
from octavo.kernels.cpu import attention, build, linear, onednn
from octavo.kernels.cpu.decoder import DecoderLayer, DecoderSpec, FusedDecoder
from octavo.kernels.cpu.library import CpuLibrary, available_isas, load, set_num_threads

LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 30, 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


@dataclass(frozen=True)
class Timing:
    """The fastest of several runs, and what others took of the machine meanwhile."""

    seconds: float
    median: float
    foreign: float  # cores


def _busy_seconds() -> float:
    with Path("/proc/stat").open() as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / 100  # all but idle and waiting, in ticks


def timed(run: Callable[[], object], budget: float = 1.0) -> Timing:
    """Repeat for about `budget` seconds."""
    run()
    times: list[float] = []
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    while time.perf_counter() - start < budget or len(times) < 3:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    wall = time.perf_counter() - start
    foreign = (_busy_seconds() - busy - (time.process_time() - own)) / wall
    return Timing(min(times), sorted(times)[len(times) // 2], max(foreign, 0.0))


def machine_limits(threads: int) -> tuple[float, float]:
    """(bytes read per second, bf16 operations per second) of `threads` threads together."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("cpu_peak.c")
        command = [*build.find_compiler(), "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        peak = ctypes.CDLL(str(library))
    peak.read_lines.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    peak.multiply.argtypes = [ctypes.c_int64]
    memory = torch.ones(512 << 17, dtype=torch.int64)  # 512 MB
    part = memory.nbytes // threads // 64
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            list(pool.map(lambda i: peak.read_lines(memory.data_ptr() + i * part * 64, part), range(threads)))

        def multiply() -> None:
            list(pool.map(lambda _: peak.multiply(1_000_000), range(threads)))

        bandwidth = memory.nbytes / timed(read).seconds
        operations = float("nan")
        if "avx512bf16" in available_isas():
            operations = threads * 1_000_000 * 24 * 64 / timed(multiply).seconds
    return bandwidth, operations


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * float(shape[-1] ** -0.5)


def products(rows_list: list[int], library: CpuLibrary, bandwidth: float, peak: float) -> None:
    """All linear layers of a forward, ours and oneDNN's."""
    shapes = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    weights = [random(n, k).bfloat16() for n, k in shapes * LAYERS + [(VOCAB, HIDDEN)]]
    elements = sum(weight.numel() for weight in weights)
    ours = [linear.pack(weight, library) for weight in weights]
    theirs = [onednn.pack(weight) for weight in weights] if onednn.available() else []
    del weights
    print(
        f"{'rows':>5} {'ours ms':>8} {'median':>7} {'GB/s':>6} {'TFLOP/s':>8} {'of limit':>9} {'foreign':>8}",
        end="",
    )
    print(f" {'oneDNN ms':>10} {'median':>7} {'foreign':>8}")
    for rows in rows_list:
        inputs = {k: torch.randn(rows, k).bfloat16() for k in (HIDDEN, INTERMEDIATE)}
        outputs = {n: torch.empty(rows, n, dtype=torch.bfloat16) for n in {w.n for w in ours}}

        def run_ours(
            inputs: dict[int, torch.Tensor] = inputs, outputs: dict[int, torch.Tensor] = outputs
        ) -> None:
            for weight in ours:
                linear.linear(inputs[weight.k], weight, out=outputs[weight.n], library=library)

        def run_theirs(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in theirs:
                onednn.linear(inputs[weight.k], weight)

        mine = timed(run_ours)
        limit = max(elements * 2 / bandwidth, 2 * rows * elements / peak)
        gigabytes, teraflops = elements * 2 / 1e9, 2 * rows * elements / 1e12
        print(
            f"{rows:5} {mine.seconds * 1e3:8.2f} {mine.median * 1e3:7.2f} {gigabytes / mine.seconds:6.1f} "
            f"{teraflops / mine.seconds:8.3f} {limit / mine.seconds:9.0%} {mine.foreign:8.2f}",
            end="",
        )
        if theirs:
            other = timed(run_theirs)
            print(f" {other.seconds * 1e3:10.2f} {other.median * 1e3:7.2f} {other.foreign:8.2f}", end="")
        print()


def decoder(library: CpuLibrary) -> tuple[FusedDecoder, AttentionSpec]:
    """SmolLM2's shapes with random weights."""
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
    layers = [
        DecoderLayer(
            attention=spec,
            input_norm=torch.ones(HIDDEN),
            qkv=linear.pack(random(QKV, HIDDEN).bfloat16(), library),
            o=linear.pack(random(HIDDEN, HIDDEN).bfloat16(), library),
            post_norm=torch.ones(HIDDEN),
            gate_up=linear.pack_gate_up(random(2 * INTERMEDIATE, HIDDEN).bfloat16(), library),
            down=linear.pack(random(HIDDEN, INTERMEDIATE).bfloat16(), library),
        )
        for _ in range(LAYERS)
    ]
    angles = torch.outer(torch.arange(2048), 1e-4 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    embedding = linear.pack(random(VOCAB, HIDDEN).bfloat16(), library)
    shared = DecoderSpec(HIDDEN, torch.bfloat16, 1e-5)
    fused = FusedDecoder(shared, layers, embedding, torch.ones(HIDDEN), angles.cos(), angles.sin(), library)
    return fused, spec


def decode_batch(requests: int, context: int, block_size: int) -> AttentionMetadata:
    """One row of each request, at the end of its context."""
    blocks = -(-context // block_size)
    table = torch.randperm(requests * blocks, dtype=torch.int32).view(requests, blocks)
    last = context - 1
    return AttentionMetadata(
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32),
        seq_lens=torch.full((requests,), context, dtype=torch.int32),
        block_table=table,
        slot_mapping=table[:, last // block_size].long() * block_size + last % block_size,
        positions=torch.full((requests,), last),
        num_reqs=requests,
        num_tokens=requests,
        max_query_len=1,
        max_seq_len=context,
    )


def decoder_steps(library: CpuLibrary, context: int = 256, block_size: int = 32) -> None:
    """The fused decoder at decode, and at a whole prompt."""
    fused, spec = decoder(library)
    most = 64
    shape = attention.kv_cache_shape(most * context // block_size, block_size, spec)
    caches = [torch.randn(shape).bfloat16() for _ in range(LAYERS)]
    print(f"\nfused decoder without head, {context} tokens of context, step in ms")
    print(f"{'requests':>9} {'min':>8} {'median':>8} {'foreign':>8}")
    for requests in (1, 4, 16, most):
        batch = decode_batch(requests, context, block_size)
        ids = torch.arange(requests)

        def run(ids: torch.Tensor = ids, batch: AttentionMetadata = batch) -> None:
            fused.forward(ids, batch.positions, batch, caches)

        took = timed(run)
        print(f"{requests:9} {took.seconds * 1e3:8.2f} {took.median * 1e3:8.2f} {took.foreign:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=available_isas())
    parser.add_argument("--rows", default="1,4,16,64,256")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    set_num_threads(arguments.threads)
    library = load(arguments.isa)
    bandwidth, peak = machine_limits(arguments.threads)
    print(
        f"{arguments.threads} threads, level {library.isa}; "
        f"reads {bandwidth / 1e9:.1f} GB/s, multiplies bf16 at {peak / 1e12:.3f} TFLOP/s"
    )
    products([int(rows) for rows in arguments.rows.split(",")], library, bandwidth, peak)
    decoder_steps(library)


if __name__ == "__main__":
    main()
