"""`octavo bench`: measure one engine. One module for each of its verbs, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import click

from octavo.cli.main import debug_option

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


class BenchGroup(click.Group):
    """Verbs by table, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(BENCHES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in BENCHES:
            return None
        command: Any = importlib.import_module(BENCHES[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{BENCHES[cmd_name][0]}.command is not a click command")
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verb = args[0]
        if not verb.startswith("-") and verb not in BENCHES:
            near = difflib.get_close_matches(verb, BENCHES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(BENCHES)}."
            raise click.UsageError(f"No such benchmark {verb!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl([(verb, text) for verb, (_, text) in BENCHES.items()])


command = BenchGroup(
    "bench",
    help="Measure one engine: octavo, transformers, vllm, or any OpenAI-compatible URL. Several engines on "
    "the same work: octavo compare.",
    subcommand_metavar="BENCHMARK [ARGS]...",
)
