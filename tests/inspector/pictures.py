"""`make pictures`: the pictures of docs/inspector.md, of the page at work in Chromium."""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.conftest import ROOT, ServerProcess
from tests.inspector.conftest import CHROMIUM, Page, inspecting


def main() -> int:
    """Write them; returns 0."""
    folder = ROOT / "docs" / "inspector"
    folder.mkdir(exist_ok=True)
    server = ServerProcess(ROOT / "models")
    try:
        with inspecting(server.address) as inspector, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            copy(Page(browser, inspector.url, color_scheme="light"), folder / "copy.png")
            compare(Page(browser, inspector.url, color_scheme="light"), folder / "compare.png")
            sort(Page(browser, inspector.url, color_scheme="dark"), folder / "priority-sort.png")
            browser.close()
    finally:
        server.stop()
    return 0


def copy(page: Page, path: Path) -> None:
    """Twenty vectors, while the twelfth of them is recalled."""
    page.create("copy")
    page.load("copy", length=20, seed=0)
    page.run(41)
    go_to(page, 33)
    page.page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1280, "height": height_to(page, ".views")})


def compare(page: Page, path: Path) -> None:
    """A number is edited before the recall, both sessions recall, and their memories are held together."""
    source = page.create("copy")
    page.load("copy", length=20, seed=0)
    page.run(41)
    go_to(page, 21)
    page.page.fill("#edit-row", "118")
    page.page.fill("#edit-column", "4")
    page.page.fill("#edit-value", "-4")
    page.page.click("#edit-form button")
    page.other_session(source)
    page.load("zeros", steps=20)
    page.run(20)
    page.page.select_option("#compare-with", source)
    page.until("document.getElementById('compare-about').textContent.startsWith('Both after 41 steps')")
    page.page.locator("section:has(#compare-title)").screenshot(path=path)


def sort(page: Page, path: Path) -> None:
    """Five heads of each kind, while sorted vectors are read."""
    page.create("priority-sort")
    page.load("priority-sort")
    page.run(36)
    go_to(page, 26)
    page.page.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1280, "height": height_to(page, ".views")})


def go_to(page: Page, moment: int) -> None:
    """Show a moment, by the keys."""
    page.page.locator("#scrub").focus()
    page.page.keyboard.press("Home")
    for _ in range(moment // 10):
        page.page.keyboard.press("PageUp")
    for _ in range(moment % 10):
        page.page.keyboard.press("ArrowRight")
    page.drawn(moment)


def height_to(page: Page, selector: str) -> float:
    """Of the page down to the end of an element; the window is made as high."""
    page.page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    box = page.page.locator(selector).bounding_box()
    assert box is not None
    height = round(box["y"] + box["height"] + 12)
    page.page.set_viewport_size({"width": 1280, "height": height})
    return height


if __name__ == "__main__":
    sys.exit(main())
