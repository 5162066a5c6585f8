"""A headless Chromium, where there is one: a page as a picture, and what its console and network said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.bench.png import Image, read_png

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """OCTAVO_TEST_BROWSER, or the first Chromium on the path."""
    given = os.environ.get("OCTAVO_TEST_BROWSER")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Visit:
    """What one visit of a page showed."""

    image: Image
    console: list[str]  # lines that the page's console got
    requested: list[str]  # addresses beyond the file itself


def visit(page: Path, folder: Path, *, dark: bool = False, width: int = 1280, height: int = 1500) -> Visit:
    """Open a local page in a fresh profile; `folder` takes what the browser writes."""
    browser = find_browser()
    assert browser is not None
    picture, network = folder / "page.png", folder / "network.json"
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-extensions", "--disable-default-apps", "--disable-dev-shm-usage",
        "--force-device-scale-factor=1",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={network}",
        f"--window-size={width},{height}", f"--screenshot={picture}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert picture.exists(), f"the browser took no picture: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(read_png(picture), console, _requested(network))


def _requested(log: Path) -> list[str]:
    """Addresses that were asked for by the page: the browser's own errands have another initiator."""
    text = log.read_text(encoding="utf-8")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # cut off when the browser ended
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    found = []
    for event in events:
        parameters = event.get("params") or {}
        url, initiator = str(parameters.get("url", "")), str(parameters.get("initiator", ""))
        if url.startswith(("http:", "https:", "ws:", "wss:", "ftp:")) and initiator in ("null", "file://"):
            found.append(url)
    return found
