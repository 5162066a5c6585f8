"""`octavo bench sweep`: rising load, to where the engine no longer keeps up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from octavo.cli.bench_options import BenchCommand, bench_options, options_from, view_of, write_page
from octavo.errors import ConfigError


@click.command(cls=BenchCommand)
@click.option("--rates", help="Measure these rates, such as 1,2,4,8, instead of searching.")
@click.option("--concurrencies", help="The same for a closed loop.")
@click.option("--start", type=float, default=1.0, show_default=True, help="Where the search begins.")
@click.option("--refine", type=int, default=2, show_default=True, help="Halvings after the last doubling.")
@click.option("--resume", is_flag=True, help="Go on with the points that an interrupted sweep has written.")
@click.option("--served/--in-process", default=None, help="Through HTTP, or not [in process].")
@bench_options
def command(
    rates: str | None, concurrencies: str | None, start: float, refine: int, resume: bool,
    served: bool | None,
    report: bool, quiet: bool, **given: Any,
) -> int:  # fmt: skip
    """Measure one engine at rising rates (or, with --concurrencies or --arrival closed, concurrencies).

    Each point is a result file of its own (30 s of requests, unless --duration or --num-prompts), and the
    sweep's file says how far the engine keeps up; with --slo also where its goodput is highest.
    """
    from octavo.bench.record import result_path
    from octavo.bench.sweep import Point, SweepPlan, sweep

    options = options_from(given)
    if rates and concurrencies:
        raise click.UsageError("give either --rates or --concurrencies")
    if concurrencies:
        options = replace(options, arrival="closed")
    if given.get("duration") is None and not options.num_prompts:
        options = replace(options, duration=30.0)
    if served is not None:
        options = replace(options, served=served)
    spec = options.spec()
    spec.check()
    path = result_path(options.output, f"sweep_{spec.method}", spec.engine)
    plan = SweepPlan(_numbers(rates or concurrencies or ""), start, refine)

    def tell(point: Point) -> None:
        click.echo(_line(point, spec.load.open_loop))

    result = sweep(
        spec,
        options.source(),
        plan,
        Path(path),
        resume=resume,
        force=options.force,
        live=view_of(quiet),
        tell=tell,
    )
    told = result.to_json()
    click.echo(_verdict(told["over"], told["highest_kept_up"], told["lowest_not_kept_up"]))
    if told["best_goodput"] is not None:
        click.echo(
            f"best goodput {told['best_goodput']:.2f} requests/s at {told['over']} "
            f"{told['best_goodput_at']:g}"
        )
    click.echo(f"  Result: {path}")
    if report:
        write_page([point.result for point in result.points], path.with_suffix(".html"))
    return result.exit_code


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"write numbers with commas between them, such as 1,2,4: not {text!r}") from None


def _verdict(over: str, kept_up: float | None, lost: float | None) -> str:
    if kept_up is None:
        return f"does not keep up with {over} {lost:g}" if lost is not None else "no point was measured"
    return f"keeps up to {over} {kept_up:g}; " + (
        f"not at {lost:g}" if lost is not None else "more was not tried"
    )


def _line(point: Any, open_loop: bool) -> str:
    s = point.result.summary
    what = f"{point.value:g} requests/s" if open_loop else f"{point.value:g} at a time"
    ttft, tpot = s["ttft"]["p50"], s["tpot"]["p50"]
    parts = [
        f"{what:>18}:",
        f"{s['overall_throughput']:.1f} tok/s" if s["overall_throughput"] is not None else "-",
        f"TTFT p50 {ttft * 1e3:.0f} ms" if ttft is not None else "TTFT -",
        f"TPOT p50 {tpot * 1e3:.1f} ms" if tpot is not None else "TPOT -",
        "keeps up" if point.keeps_up else "DOES NOT KEEP UP",
    ]
    if s["failed_requests"]:
        parts.append(f"{s['failed_requests']} FAILED")
    if not point.result.valid:
        parts.append("INVALID: the client could not keep up")
    return "  ".join(parts)
