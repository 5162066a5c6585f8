"""The report as a browser shows it: in light and in dark, with nothing on its console and no request."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.bench.report import write_report
from tests.bench.browser import find_browser, visit
from tests.bench.fake_results import fake_result

pytestmark = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium on the path (apt-get install chromium, or OCTAVO_TEST_BROWSER=path)",
)

# The colours of the first three runs (report.html.jinja, --s0 to --s2).
LIGHT = ((0x25, 0x63, 0xAB), (0xC4, 0x54, 0x0A), (0x0A, 0x7D, 0x64))
DARK = ((0x75, 0xAE, 0xFC), (0xF5, 0xA3, 0x5C), (0x4F, 0xD3, 0xA9))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [
        fake_result(repeats=3),
        fake_result(method="prompt_lookup", accept=0.6, repeats=3),
        fake_result("transformers", tpot=0.03, differ=(1,)),
    ]
    return write_report(runs, tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn_in_its_scheme_and_asks_for_nothing(page: Path, tmp_path: Path, dark: bool) -> None:
    seen = visit(page, tmp_path, dark=dark)
    assert seen.console == []
    assert seen.requested == []
    assert seen.image.size == (1280, 1500)
    assert seen.image.num_colours > 300, "next to nothing was drawn"
    assert (seen.image.brightness < 60) if dark else (seen.image.brightness > 220)
    # The title's ink stands in the first 130 pixels, on the page's ground.
    head = seen.image.crop(0, 0, 1280, 130)
    ink = (0xE7, 0xE9, 0xEC) if dark else (0x1D, 0x21, 0x26)
    assert 0.005 < head.share_of(ink) < 0.3
    # Every run has a bar in its own colour, the fastest one the longest.
    bars = [seen.image.longest_run(colour) for colour in (DARK if dark else LIGHT)]
    assert min(bars) > 80
    assert bars[1] == max(bars)


def test_a_page_that_loads_something_or_runs_a_script_is_noticed(page: Path, tmp_path: Path) -> None:
    """The two checks above can fail: a policy's complaint, and a request where there is no policy."""
    html = page.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace("</main>", "<script>alert(1)</script></main>"), encoding="utf-8")
    assert any("Content Security Policy" in line for line in visit(broken, tmp_path, height=300).console)
    bare = tmp_path / "bare.html"
    bare.write_text('<img src="http://127.0.0.1:9/x.png">', encoding="utf-8")
    (tmp_path / "second").mkdir()
    assert visit(bare, tmp_path / "second", height=300).requested == ["http://127.0.0.1:9/x.png"]
