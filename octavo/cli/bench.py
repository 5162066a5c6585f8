"""`octavo bench`: measure one engine. One module for each of its verbs, imported when it is called."""

from __future__ import annotations

from octavo.cli.lazy import LazyGroup

# verb -> (module with a click command named `command`, one line of help)
BENCHES = {
    "run": ("octavo.cli.bench_run", "The run that the environment describes; run_benchmark.sh calls this."),
    "serve": ("octavo.cli.bench_serve", "Requests over HTTP, at a rate or by concurrency."),
    "throughput": ("octavo.cli.bench_throughput", "Everything at once: tokens a second."),
    "latency": ("octavo.cli.bench_latency", "One batch at a time: time to first token, time per token."),
    "startup": ("octavo.cli.bench_startup", "From the start of the process to the first token."),
    "sweep": ("octavo.cli.bench_sweep", "Rising load, to where the engine no longer keeps up."),
    "preset": ("octavo.cli.bench_preset", "Shell lines of a preset, for run_benchmark.sh."),
}

command = LazyGroup(
    "bench",
    BENCHES,
    "benchmark",
    help="Measure one engine: octavo, transformers, vllm, or any OpenAI-compatible URL. Several engines on "
    "the same work: octavo compare.",
)
