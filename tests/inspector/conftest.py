"""The inspector as a process, over a real server, and its page in a real Chromium."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class InspectorProcess:
    """`python -m inspector` in a process of its own; `url` is its page."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "inspector", *arguments]
        if "--listen" not in arguments:
            command += ["--listen", "127.0.0.1:0"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        found = re.search(r"https?://\S+", said)
        assert found, said
        self.url = found[0]

    def stop(self) -> int:
        self._process.terminate()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait(timeout=30)


@contextlib.contextmanager
def inspecting(*arguments: str) -> Iterator[InspectorProcess]:
    process = InspectorProcess(*arguments)
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="session")
def served() -> Iterator[str]:
    """One server on the shipped models; its address."""
    server = ServerProcess(ROOT / "models")
    yield server.address
    server.stop()


@pytest.fixture(scope="session")
def inspector(served: str) -> Iterator[InspectorProcess]:
    """One inspector over it."""
    with inspecting(served) as process:
        yield process


# Not for the session: while Playwright is there, an event loop of its own runs in this thread, and tests of coroutines
# have none.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        reason = "there is no chromium: install Debian's package, or run `make test` as root"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page of the inspector, and what tests ask of it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        self.context = browser.new_context(accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.problems.append(said.text) if said.type in ("error", "warning") else None,
        )
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(url)

    def until(self, expression: str) -> None:
        """Wait until an expression is true in the page; Playwright's own way needs eval, which the page forbids."""
        end_s = time.monotonic() + 20
        while not self.page.evaluate(expression):
            assert time.monotonic() < end_s, (
                expression,
                self.problems,
                self.page.locator("#alert").inner_text(),
            )
            self.page.wait_for_timeout(10)

    def create(self, model: str = "copy") -> str:
        """Make a session of a model; returns its id."""
        self.until("!document.getElementById('new-session').disabled")
        before = self.page.locator("#session-id").inner_text() if self.is_open else ""
        self.page.select_option("#model", label=model)
        self.page.click("#new-session")
        return self.other_session(before)

    @property
    def is_open(self) -> bool:
        return bool(self.page.locator("#session").is_visible())

    def other_session(self, before: str) -> str:
        """Wait until another session is shown; returns its id."""
        shown = "document.getElementById('session-id').textContent"
        self.until(f"!document.getElementById('session').hidden && {shown} !== {before!r}")
        return str(self.page.locator("#session-id").inner_text())

    def load(self, kind: str, **parameters: int) -> None:
        self.page.select_option("#kind", kind)
        for name, value in parameters.items():
            self.page.fill(f"#parameter-{name}", str(value))
        self.page.click("#load")
        self.until("!document.getElementById('run').disabled")

    def run(self, last_moment: int) -> None:
        self.page.click("#run")
        self.drawn(last_moment)

    def drawn(self, moment: int) -> None:
        """Wait until a moment is drawn, whole."""
        self.until(f"document.documentElement.dataset.drawn === '{moment}'")

    def pixels(self, selector: str) -> list[list[int]]:
        """The canvas's pixels, by rows, each as one number 0xRRGGBB."""
        found: list[list[int]] = self.page.evaluate(
            """(selector) => {
                const canvas = document.querySelector(selector);
                const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                return Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => {
                    const at = 4 * (y * width + x);
                    return (data[at] << 16) | (data[at + 1] << 8) | data[at + 2];
                }));
            }""",
            selector,
        )
        return found


@pytest.fixture
def open_page(chromium: Any, inspector: InspectorProcess) -> Iterator[Callable[..., Page]]:
    """Open the page, as often as a test likes; in the end nothing may have gone to the console."""
    opened: list[Page] = []

    def open_(url: str = inspector.url, **options: Any) -> Page:
        opened.append(Page(chromium, url, **options))
        return opened[-1]

    yield open_
    problems = [problem for page in opened for problem in page.problems]
    for page in opened:
        page.context.close()
    assert problems == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()


def saved(page: Page, button: str, path: Path) -> bytes:
    """What a button downloads."""
    with page.page.expect_download() as download:
        page.page.click(button)
    download.value.save_as(path)
    return path.read_bytes()
