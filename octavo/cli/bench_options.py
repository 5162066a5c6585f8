"""The flags that the verbs of `octavo bench` share, and how they become one run that ends in files.

A flag that was not given is not passed on: the defaults live in `octavo.bench.options.BenchOptions`, and each
verb may have others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from octavo.bench.options import DEFAULT_OUTPUT, BenchOptions, parse_drafts, parse_rate
from octavo.cli.options import SectionCommand, SectionOption
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.bench.record import RunResult
    from octavo.bench.runner import LiveView

Function = TypeVar("Function", bound=Callable[..., Any])


class BenchCommand(SectionCommand):
    """A verb of the workbench."""


def _section(title: str) -> type[SectionOption]:
    return type(f"_{title}Option", (SectionOption,), {"section": title})


_ENGINE, _LOAD, _SAMPLING, _MEASURING = map(_section, ("Engine", "Load", "Sampling", "Measuring"))

# (section, flag, type, help); a bool type is --flag/--no-flag. The parameter is the field of BenchOptions,
# or "engine:NAME" for an option of the engine.
_FLAGS: tuple[tuple[type[SectionOption], str, str, Any, str], ...] = (
    (_ENGINE, "--engine", "engine", str, "octavo, transformers, vllm, octavo-served, vllm-served, url=…"),
    (_ENGINE, "--url", "url", str, "the same as --engine url=URL"),
    (_ENGINE, "--method", "method", str, "target_ar, drafter_ar, speculative, prompt_lookup [by --drafter]"),
    (_ENGINE, "--model", "model", str, "folder, .gguf file, hub id, alias [smollm2]; a url's served name"),
    (_ENGINE, "--drafter", "drafter", str, "draft model"),
    (_ENGINE, "--num-speculative-tokens", "num_speculative_tokens", parse_drafts, "drafts: 1-16, auto"),
    (_ENGINE, "--dtype", "engine:dtype", str, "auto, half, float16, bfloat16, float32 [auto]"),
    (_ENGINE, "--device", "engine:device", str, "auto, cpu, cuda [auto]"),
    (_ENGINE, "--max-model-len", "engine:max_model_len", int, "longest prompt + output"),
    (_ENGINE, "--max-num-seqs", "engine:max_num_seqs", int, "requests that run together"),
    (_ENGINE, "--max-num-batched-tokens", "engine:max_num_batched_tokens", int, "token rows of a step"),
    (_ENGINE, "--gpu-memory-utilization", "engine:gpu_memory_utilization", float, "share of a GPU's memory"),
    (_ENGINE, "--tensor-parallel-size", "engine:tensor_parallel_size", int, "GPUs of one model"),
    (_ENGINE, "--tokenizer", "tokenizer", str, "tokenizer, where the model (or the URL) does not bring it"),
    (_ENGINE, "--endpoint", "endpoint", str, "of a url: chat, completions [chat where prompts are messages]"),
    (_ENGINE, "--enable-batch", "enable_batch", bool, "static batches of the transformers engine [on]"),
    (_ENGINE, "--batch-size", "batch_size", int, "of such a batch [8]"),
    (_LOAD, "--prompts", "prompts", str, "bundled[:KIND,…], a file, synthetic:512, shared_prefix:256+64"),
    (_LOAD, "--num-prompts", "num_prompts", int, "requests in all; 0: as many as --duration brings"),
    (_LOAD, "--arrival", "arrival", str, "poisson, constant, gamma, closed, or a trace file"),
    (_LOAD, "--rate", "rate", parse_rate, "requests a second; inf: all at once"),
    (_LOAD, "--duration", "duration", float, "seconds in which requests are sent"),
    (_LOAD, "--burstiness", "burstiness", float, "of gamma: below 1 clumps, above 1 is regular [1]"),
    (_LOAD, "--concurrency", "concurrency", int, "requests open at a time: a closed loop"),
    (_SAMPLING, "--max-tokens", "max_tokens", int, "the most tokens of an answer"),
    (_SAMPLING, "--ignore-eos", "ignore_eos", bool, "exactly that many"),
    (_SAMPLING, "--temperature", "temperature", float, "0 is greedy [0]"),
    (_SAMPLING, "--top-p", "top_p", float, "1 is off [1]"),
    (_SAMPLING, "--top-k", "top_k", int, "0 is off [0]"),
    (_SAMPLING, "--seed", "seed", int, "decides prompts, arrivals and draws [42]"),
    (_MEASURING, "--warmup", "warmup", int, "requests before, that nobody counts [2]"),
    (_MEASURING, "--repeat", "repeat", int, "how often the whole load is run; the spread is reported [1]"),
    (_MEASURING, "--slo", "slo", str, "limits of a good request, such as ttft=500ms,tpot=50ms"),
    (_MEASURING, "--clients", "clients", int, "processes that send, over HTTP [1]"),
    (_MEASURING, "--request-timeout", "request_timeout", float, "seconds until a request has failed [600]"),
    (_MEASURING, "--monitor", "monitor", bool, "power, energy, utilisation [on]"),
    (_MEASURING, "--monitor-interval", "monitor_interval", float, "seconds between two looks [0.5]"),
    (_MEASURING, "--output", "output", str, f"result file; method and engine are added [{DEFAULT_OUTPUT}]"),
)  # fmt: skip


def bench_options(function: Function) -> Function:
    """Give a command every flag of a run."""
    extra = (
        click.option("--engine-option", "engine_option", multiple=True, metavar="NAME=VALUE", cls=_ENGINE,
                     help="any other option of the engine (JSON, or a text); may be repeated"),
        click.option("--force", is_flag=True, cls=_MEASURING, help="overwrite results"),
        click.option("--report/--no-report", default=True, cls=_MEASURING, help="write the HTML report [on]"),
        click.option("--quiet", "-q", is_flag=True, cls=_MEASURING, help="no line a request"),
    )  # fmt: skip
    for option in reversed(extra):
        function = option(function)
    for section, flag, place, kind, text in reversed(_FLAGS):
        name = place.replace(":", "_option_")
        if kind is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text, cls=section)
        else:
            option = click.option(flag, name, type=_checked(kind), default=None, help=text, cls=section)
        function = option(function)
    return function


def _checked(kind: Any) -> Any:
    """A click type; ConfigError of a reader of ours is wrong usage of that flag."""
    if kind in (str, int, float):
        return kind

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ConfigError as error:
            raise click.BadParameter(str(error)) from None

    read.__name__ = "value"
    return read


def options_from(given: Mapping[str, Any], base: BenchOptions | None = None) -> BenchOptions:
    """`base` with the flags that were given. Raises UsageError where two contradict each other."""
    if base is None:
        base = BenchOptions(api_key=os.environ.get("OPENAI_API_KEY") or None)
        if given.get("url") or str(given.get("engine")).startswith(("url=", "http://", "https://")):
            base = replace(base, model="")  # the server's own, if it has one
    known = {field.name for field in fields(BenchOptions)}
    values = {name: value for name, value in given.items() if value is not None and name in known}
    engine = dict(base.engine_options)
    for name, value in given.items():
        if name.startswith("engine_option_") and value is not None:
            engine[name.removeprefix("engine_option_")] = value
    for text in given.get("engine_option") or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"--engine-option {text!r}: write NAME=VALUE")
        engine[name.strip().replace("-", "_")] = _plain(value)
    if given.get("url"):
        if given.get("engine") not in (None, "url"):
            raise click.UsageError("give either --url or --engine")
        values["engine"] = f"url={given['url']}"
    if given.get("concurrency") is not None and given.get("arrival") in (None, "closed"):
        if given.get("rate") is not None:
            raise click.UsageError("--concurrency is a closed loop, which has no --rate: give one of them")
        values["arrival"] = "closed"
    values["engine_options"] = engine
    return replace(base, **values)


def named_for(verb: str, options: BenchOptions, given: dict[str, Any]) -> BenchOptions:
    """With a result file of the verb's own, where none was named: one measurement is not in another's way."""
    if given.get("output") is not None:
        return options
    path = Path(options.output)
    return replace(options, output=str(path.with_stem(f"{path.stem}_{verb}")))


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---------------------------------------------------------------------- a run


def run_and_write(options: BenchOptions, *, report: bool, quiet: bool) -> int:
    """Check, run, write the result and the report; the exit code. Nothing is loaded before all is checked."""
    from octavo.bench.banner import configuration, outcome, starting
    from octavo.bench.live import TerminalView
    from octavo.bench.record import check_writable, save
    from octavo.bench.runner import run
    from octavo.cli.console import show_log

    spec, source, path = checked(options)
    page = path.with_suffix(".html") if report else None
    if page is not None:
        check_writable(page, force=options.force)
    view = TerminalView(log_requests=not quiet)
    for warning in spec.check():
        view.line(f"WARNING: {warning}")
    for line in [*configuration(spec, source.label, str(path)), *starting(spec)]:
        view.line(line)
    import logging

    show_log(logging.WARNING if quiet else logging.INFO)
    result = run(spec, source, live=view)
    save(result, path, force=options.force)
    for line in outcome(result):
        click.echo(line)
    click.echo(f"  Result: {path}")
    if page is not None:
        write_page([result], page)
    return result.exit_code


def checked(options: BenchOptions) -> tuple[Any, Any, Path]:
    """(spec, source of prompts, result file), all of them checked."""
    from octavo.bench.record import check_writable

    spec = options.spec()
    spec.check()
    source = options.source()
    path = options.output_path()
    check_writable(path, force=options.force)
    return spec, source, path


def write_page(results: list[RunResult], page: Path) -> None:
    """The HTML report."""
    from octavo.bench.report import write_report

    write_report(results, page)
    click.echo(f"  Report: {page}")


def view_of(quiet: bool) -> LiveView:
    """The terminal, with or without a line a request."""
    from octavo.bench.live import TerminalView

    return TerminalView(log_requests=not quiet)
