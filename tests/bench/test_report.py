"""The report: what is in it, how sure it says it is, and that nothing anybody wrote can become markup."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from octavo.bench.report import build, name_runs, write_report
from octavo.bench.report.figures import figures, interval, number, seconds, speed_up, times
from octavo.bench.report.intervals import (
    bootstrap,
    median,
    over_repeats,
    paired_ratio,
    ratio_over_repeats,
)
from octavo.bench.report.svg import Axis, Bar, Series, bar_chart, line_chart, log_ticks, thinned, ticks
from octavo.errors import ConfigError
from tests.bench.fake_results import EVIL, fake_result

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page: its elements, its text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


def four_runs(energy: float | None = 2.0) -> str:
    runs = [
        fake_result(repeats=3, joules_per_token=energy),
        fake_result(method="prompt_lookup", accept=0.6, repeats=3, joules_per_token=energy and energy / 2),
        fake_result("transformers", tpot=0.04, differ=(1, 2), warnings=[f"a warning {EVIL}"]),
        fake_result("transformers", "prompt_lookup", tpot=0.04, accept=0.4, fail=(3,)),
    ]
    return build(
        runs, title=f"Title {EVIL}", sources=[f"file{EVIL}.json"], not_run=[("vllm", f"gone {EVIL}")]
    )


def test_a_page_is_complete_well_formed_and_loads_nothing() -> None:
    html = four_runs()
    page = Page(html)
    assert page.open == []
    assert len(html) < 200_000
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "img")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    policy = [a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in html


def test_nothing_that_anybody_wrote_becomes_markup() -> None:
    html = four_runs()
    page = Page(html)
    assert EVIL not in html
    assert "onerror=alert" not in re.sub(r"&lt;img src=x onerror=alert\(1\)&gt;", "", html)
    assert page.text.count('<script>alert("x")') >= 4, "texts are shown as they were written"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_what_a_reader_looks_for_is_there() -> None:
    text = Page(four_runs()).text
    for wanted in (
        "octavo prompt_lookup", "transformers target_ar", "2 of 12 differ", "all 12 equal",
        "1 of 12 requests failed",
        "vllm was not measured", "Acceptance by position", "Power over time", "Speed-up against energy",
        "Time to first token", "Tokens over time", "How the intervals are made",
        "Fake GPU slowed by power cap", "a warning",
    ):  # fmt: skip
        assert wanted in text, wanted
    html = four_runs()
    assert 'title="t over 3 repetitions"' in html
    assert "paired bootstrap over 12 prompts" in html


def test_without_energy_the_reason_is_shown_and_no_zero() -> None:
    html = build([fake_result(), fake_result(method="prompt_lookup", accept=0.5)])
    text = Page(html).text
    assert "no GPU was used; no package counter" in html
    assert "not measured" in text
    assert "No energy was measured, so the speed-up stands alone." in text
    assert "0 J" not in text


def test_one_run_alone_and_runs_without_any_answer() -> None:
    alone = Page(build([fake_result()]))
    assert "nothing to compare" in alone.text
    failed = fake_result(fail=range(12))
    page = Page(build([failed, fake_result()]))
    assert page.open == []
    assert "12 requests failed" in page.text
    with pytest.raises(ConfigError, match="at least one result"):
        build([])


def test_an_invalid_run_is_said_first() -> None:
    result = fake_result()
    result.summary["client"] = {"valid": False, "reason": "the client could not keep up"}
    text = Page(build([fake_result("transformers"), result])).text
    assert "octavo target_ar is invalid." in text
    assert text.index("could not keep up") < text.index("Comparison\n")


def test_runs_of_the_same_name_are_told_apart() -> None:
    slow, fast = fake_result(), fake_result()
    slow.effective_config["load"] = {"concurrency": 1}
    fast.effective_config["load"] = {"concurrency": 8}
    labels = [run.label for run in name_runs([slow, fast, fake_result("transformers")])]
    assert len(set(labels)) == 3
    assert "concurrency=8" in labels[1]
    named = name_runs([fake_result()], fake_result())
    assert [run.label for run in named] == ["octavo target_ar (baseline)", "octavo target_ar"]
    assert named[0].is_baseline


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_report([fake_result()], tmp_path / "r.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([fake_result()], tmp_path / "no" / "r.html")


# ---------------------------------------------------------------------- intervals


def test_an_interval_over_repeats_is_students() -> None:
    estimate = over_repeats([10.0, 12.0, 14.0])
    assert estimate is not None
    half = 4.30 * 2.0 / math.sqrt(3)
    assert estimate.low == pytest.approx(12 - half)
    assert estimate.high == pytest.approx(12 + half)
    single = over_repeats([5.0])
    assert single is not None
    assert not single.has_interval
    assert over_repeats([]) is None


def test_a_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, inside = random.Random(5), 0
    for trial in range(200):
        estimate = bootstrap([draw.gauss(10, 3) for _ in range(40)], median, seed=trial)
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        inside += estimate.low <= 10 <= estimate.high
    assert 180 <= inside <= 200


def test_pairing_sees_what_single_intervals_cannot() -> None:
    draw = random.Random(1)
    base = {str(i): draw.lognormvariate(0, 1.0) for i in range(30)}
    faster = {name: value / 1.25 * draw.uniform(0.98, 1.02) for name, value in base.items()}
    ratio = paired_ratio(base, faster)
    assert ratio is not None
    assert ratio.low is not None
    assert ratio.high is not None
    assert 1.2 < ratio.low < 1.25 < ratio.high < 1.3
    assert paired_ratio(base, {"other": 1.0}) is None
    few = paired_ratio({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 1.0})
    assert few is not None
    assert few.value == 2.0
    assert not few.has_interval


def test_a_ratio_of_throughputs_has_an_interval_only_with_repeats() -> None:
    sure = ratio_over_repeats([20.0, 20.2, 19.8], [10.0, 10.1, 9.9])
    assert sure is not None
    assert sure.low is not None
    assert sure.high is not None
    assert 1.9 < sure.low < 2.0 < sure.high < 2.1
    once = ratio_over_repeats([20.0], [10.0])
    assert once is not None
    assert once.value == 2.0
    assert not once.has_interval
    assert ratio_over_repeats([], [1.0]) is None


# ---------------------------------------------------------------------- drawing


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0371), (3, 8123), (-5, 5), (0.999, 1.001)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(mantissa, round_) for round_ in (1, 2, 2.5, 5, 10))


def test_a_count_has_whole_ticks() -> None:
    for high in (2, 3, 7, 14, 16):
        found = ticks(1, high, 6, whole=True)
        assert all(value == int(value) for value in found)
        assert len(found) >= 2


def test_a_reason_that_holds_for_all_is_said_once() -> None:
    runs = name_runs([fake_result(), fake_result(method="prompt_lookup", accept=0.5)])
    power = next(figure for figure in figures(runs, runs[0]) if figure.key == "power")
    assert power.reasons == ["no GPU was used; no package counter"]


def test_log_ticks() -> None:
    assert log_ticks(0.9, 25) == pytest.approx([1, 2, 5, 10, 20])
    assert log_ticks(1, 1e5) == pytest.approx([1, 10, 100, 1000, 10_000, 100_000])


def test_thinning_keeps_every_peak() -> None:
    points = [(float(i), 100.0 if i == 7777 else 0.0) for i in range(20_000)]
    kept = thinned(points)
    assert len(kept) <= 410
    assert (7777.0, 100.0) in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert kept == sorted(kept)


def test_longer_bars_for_larger_values_and_text_escaped() -> None:
    svg = bar_chart([Bar(EVIL, 0, 1.0, text="1"), Bar("b", 9, 2.0, 1.5, 2.5, "2")], Axis("x"))
    widths = [float(width) for width in re.findall(r'<rect class="bar s\d" [^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert EVIL not in svg
    assert 'class="bar s1"' in svg  # styles repeat
    assert Page(f"<div>{svg}</div>").open == []


def test_lines_stay_inside_and_one_point_is_enough() -> None:
    svg = line_chart([Series("a", 0, [(0, 0), (5, 2)]), Series("b", 1, [(1, 1)])], Axis("x"), Axis("y"))
    for path in re.findall(r'class="line s\d" d="([^"]+)"', svg):
        numbers = [float(value) for value in re.findall(r"-?[\d.]+", path)]
        assert all(-1 <= value <= 561 for value in numbers)


def test_numbers_as_text() -> None:
    assert [seconds(v) for v in (None, 0, 0.00012, 0.0456, 0.5, 1.234, 45.6, 1234.0)] == [
        "–", "0", "0.12 ms", "45.6 ms", "500 ms", "1.23 s", "45.6 s", "1,234 s",
    ]  # fmt: skip
    assert [number(v) for v in (None, 0.001234, 3.14159, 12345.6)] == ["–", "0.00123", "3.14", "12,346"]
    assert interval(over_repeats([1.0]), times) == ""


def test_speed_up_and_every_figure_has_a_chart_or_a_reason() -> None:
    runs = name_runs([fake_result(), fake_result("transformers", tpot=0.04), fake_result(fail=range(12))])
    ratio = speed_up(runs[1], runs[0])
    assert ratio is not None
    assert 0.5 < ratio.value < 0.6
    for figure in figures(runs, runs[0]):
        assert figure.chart is not None or figure.missing, figure.key
        if figure.chart is not None:
            assert Page(str(figure.chart)).open == []


def test_a_result_file_makes_the_same_report(tmp_path: Path) -> None:
    from octavo.bench.record import load, save

    result = fake_result(repeats=2, noise=0.1)
    path = save(result, tmp_path / "r.json")
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    rows = [Page(build([each])).text.split("Figures")[0] for each in (result, load(path))]
    assert rows[0] == rows[1]
