"""The README's pictures of a report and of its viewer, as Chromium shows them.

    wldm evaluate --dataset_dir DIR --num_samples 8 --output_dir OUT && wldm report OUT
    python benchmarks/screens.py OUT/report.html [--patient STS_017] [--place 0.178,0.23]

Writes docs/figures/report.png and viewer.png; ``place`` is where the viewer is clicked, as shares of its width and
height.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fire
from common import ROOT
from playwright.sync_api import sync_playwright

from bundle.pages.render import anchor

FIGURES = ROOT / "docs/figures"
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


def view(page: Any, patient: str, place: tuple[float, float]) -> None:
    """Open the viewer of a patient in the bone window, with the synthetic CT over the MR, and take its picture."""
    viewer = page.locator(f"#{anchor(patient)}-viewer")
    viewer.locator("[data-part=open]").click()
    page.wait_for_selector(".viewer[data-state=open]", timeout=120_000)
    viewer.locator("[data-window=bone]").click()
    viewer.locator("[data-part=fade]").evaluate(
        "(slider) => { slider.value = 60; slider.dispatchEvent(new Event('input')); }"
    )
    box = viewer.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])
    page.wait_for_timeout(1000)
    viewer.screenshot(path=FIGURES / "viewer.png")


def main(report: str, patient: str = "STS_017", place: tuple[float, float] = (0.178, 0.23)) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 925})
        page.goto(Path(report).resolve().as_uri())
        page.screenshot(path=FIGURES / "report.png")
        view(page, patient, place)
        browser.close()


if __name__ == "__main__":
    fire.Fire(main)
