"""Take the pictures of the benchmark's page that the documentation shows.

python -m benchmarks.page_screenshots out/bench/results.json [docs/images]
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.browser import browser, missing, set_size
from sparseflow.bench import page
from sparseflow.bench.records import Results

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

WIDE, NARROW = (1280, 900), (390, 844)
SECTIONS = ("verdict", "controls", "scale", "sizes", "density", "memory", "phases", "layers", "points", "approximate")
_NARROW_SECTIONS = ("verdict", "scale", "points")
_TALLEST = 1000  # pixels of one picture


def shoot(driver: Chrome, section: str, path: Path) -> None:
    """Write one section of the open page, cut where it is too tall, as PNG."""
    box = driver.execute_script(
        "const box = document.getElementById(arguments[0]).getBoundingClientRect();"
        "return {x: 0, y: box.y + scrollY, width: innerWidth, height: box.height, scale: 1};",
        section,
    )
    box["height"] = min(box["height"] + 8, _TALLEST)
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": box, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def take(results: Results, folder: Path) -> list[Path]:
    """Pictures of the sections of the page: ``bench-SECTION.png``, and ``bench-SECTION-narrow.png`` of some."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    with tempfile.TemporaryDirectory() as scratch, browser() as driver:
        report = page.write(results, Path(scratch, "report.html"))
        for size, sections, suffix in ((WIDE, SECTIONS, ""), (NARROW, _NARROW_SECTIONS, "-narrow")):
            set_size(driver, *size)
            driver.get(report.as_uri())
            time.sleep(1)  # transitions of the charts
            for section in sections:
                taken.append(folder / f"bench-{section}{suffix}.png")
                shoot(driver, section, taken[-1])
    return taken


def main(source: str, target: str = "docs/images") -> None:
    """Read the results in ``source``, write pictures into ``target``."""
    if reason := missing():
        sys.exit(f"no screenshots: {reason}")
    for path in take(Results.load(source), Path(target)):
        print(f"{path} {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(*sys.argv[1:])
