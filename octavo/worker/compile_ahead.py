"""Compiles the GPU's kernels by many threads, before the first of them is launched.

Triton compiles a kernel when it is first launched in some form, and keeps it on disk under the GPU, its
own version and the kernel's source. One behind the other, a model's kernels take half a minute. So a start
that finds none of them there first goes through all that it will launch, with the launches left out: each
form goes to a thread that compiles it. Most of that is the compiler's work, which does not need Python's
lock.

A mark beside Triton's cache says for which configurations this was done. A start that finds its own mark
launches at once, and what is missing all the same is compiled as Triton does it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import octavo.kernels.triton as kernels
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.config import ModelConfig

MOST_THREADS = 16
_LONGEST = 8192  # tokens of a context: no kernel's form depends on it
_one_at_a_time = threading.Lock()  # engines of one process


_loading = threading.Lock()


class _CompilesAndLoads(ThreadPoolExecutor):
    """Threads that also do what a kernel's first launch would: a C compiler makes its launcher."""

    def submit(self, compile_one: Callable[[], Any], /, *args: Any, **options: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = compile_one(*args, **options)
            kernel.run  # noqa: B018  (makes the launcher and loads the code)
            return kernel

        return super().submit(compile_and_load)


@contextmanager
def _launchers_loaded_one_by_one() -> Iterator[None]:
    """Triton's launchers are built by many threads and loaded by one at a time.

    Every launcher is an extension module of the same name, and where Python loads two of them at once, one
    kernel gets the launcher of another.
    """
    from triton.runtime import build

    load = build._load_module_from_path

    def one_by_one(name: str, path: str) -> Any:
        with _loading:
            return load(name, path)

    build._load_module_from_path = one_by_one
    try:
        yield
    finally:
        build._load_module_from_path = load


@contextmanager
def compiled_by_threads(threads: int) -> Iterator[None]:
    """In it kernels are compiled and loaded, by so many threads, and not launched; at its end all are there.

    That is so for whoever entered it: other threads launch as always, and may serve requests meanwhile.
    What a kernel would have written is whatever lay there. An error in compiling one is left to its first
    launch.
    """
    import triton
    from triton.runtime.jit import JITFunction

    launch, mine = JITFunction.run, threading.get_ident()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        warmup = warmup or threading.get_ident() == mine
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    pool = _CompilesAndLoads(max(1, min(threads, MOST_THREADS)), "octavo-compile")
    with _launchers_loaded_one_by_one(), pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        JITFunction.run = only_compile
        try:
            yield
        finally:
            JITFunction.run = launch


def compile_what_is_missing(config: EngineConfig, launch_all: Callable[[], None]) -> None:
    """Compile what `launch_all` launches, unless this was done for such a configuration before."""
    mark = _mark(config)
    if mark.exists():
        return
    with _one_at_a_time, compiled_by_threads(config.platform.cores):
        launch_all()
    with suppress(OSError):  # a cache that cannot be written to: the next start looks again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def compile_ahead(config: EngineConfig) -> None:
    """Compile what an engine of this configuration will run, with its draft model if it has one.

    It is built with random weights and as few layers as have every kind of attention. Raises ConfigError
    where there is nothing to compile.
    """
    from octavo.worker.build import build_runner, choose_kernels, plan_worker
    from octavo.worker.gpu_build import explained_out_of_memory, why_not_triton

    reason = why_not_triton(config)
    if reason is not None:
        raise ConfigError(f"there are no kernels to compile ahead: {reason}")
    small = _small(config)
    longest = min(config.args.max_model_len or config.model.max_position_embeddings, _LONGEST)
    kv_cache = 2 * longest * small.model.kv_bytes_per_token(config.dtype)
    args = replace(config.args, load_format="dummy", max_model_len=longest, kv_cache_memory=kv_cache)
    small = replace(small, args=args)
    chosen = choose_kernels(small)
    with explained_out_of_memory():
        build_runner(small, chosen, plan_worker(small, chosen))


def one_layer_of_each_kind(model: ModelConfig) -> ModelConfig:
    """The same shape with as few layers as have every kind of attention there is."""
    windows = tuple(dict.fromkeys(model.sliding_windows))
    return replace(model, num_layers=len(windows), sliding_windows=windows)


def _small(config: EngineConfig) -> EngineConfig:
    draft = config.draft
    if draft is not None:
        draft = replace(draft, model=one_layer_of_each_kind(draft.model))
    return replace(config, model=one_layer_of_each_kind(config.model), draft=draft)


def _mark(config: EngineConfig) -> Path:
    """The file that says it was done: of everything that the forms of kernels may depend on."""
    import triton

    small, args = _small(config), config.args
    speculative = config.speculative
    models = [small.model, *([] if small.draft is None else [small.draft.model])]
    about = [
        triton.__version__, config.platform.gpu, config.platform.driver, config.dtype,
        [replace(model, model_path="") for model in models],  # wherever they lie
        args.block_size, args.deterministic, args.enforce_eager,
        config.max_num_seqs, config.max_num_batched_tokens, config.attention_backend,
        speculative and (speculative.method, speculative.num_speculative_tokens, speculative.acceptance,
                         bool(speculative.synthetic_acceptance_rates)),
    ]  # fmt: skip
    digest = hashlib.sha256(repr(about).encode())
    for file in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(file.read_bytes())
    return Path(triton.knobs.cache.dir) / f"octavo-{digest.hexdigest()[:32]}.compiled"
