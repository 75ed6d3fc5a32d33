"""A real browser, what it did on a page, and the application that it looks at."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

__all__ = ["CHROMIUM", "LAPTOP", "PHONE", "Visit", "chromium", "serving"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LAPTOP, PHONE = (1366, 768), (390, 844)
ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
START_S = 20.0
NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  window.violations.push(`${event.effectiveDirective}: ${event.blockedURI}`));
"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser with a profile of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=ARGUMENTS,
            env={"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def serving(application: Any) -> Iterator[str]:
    """The address of an application on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until = time.monotonic() + START_S
            while not server.started:
                assert thread.is_alive() and time.monotonic() < until, "the application is not up"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Visit:
    """A page and all that it asked for and complained about.

    Attributes:
        page: of the browser.
        asked: URLs of all requests.
        errors: of the console and of scripts.
    """

    def __init__(
        self, browser: Browser, url: str, size: tuple[int, int] = LAPTOP, **options: Any
    ) -> None:
        width, height = size
        self.url = url
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(60_000)  # long, for machines that are busy
        self.context.add_init_script(NOTE_VIOLATIONS)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, fragment: str = "") -> Page:
        """Load the page and wait for the model to be described."""
        self.page.goto(f"{self.url}/{fragment}")
        self.page.locator("#about dl").wait_for()
        return self.page

    def sample(self, observations: str, draws: int = 500, seed: int = 0) -> None:
        """Paste observations, ask for draws and wait for the table."""
        self.page.fill("#observations", observations)
        self.page.fill("#draws", str(draws))
        self.page.fill("#seed", str(seed))
        self.page.get_by_role("button", name="Sample").click()
        self.shown()

    def shown(self) -> None:
        """Wait until the summary of the observation is there."""
        self.page.locator("#results[aria-busy=false]").wait_for()
        self.page.locator("#results .posterior[aria-busy=true]").wait_for(state="detached")
        self.page.locator("#results .posterior data").first.wait_for()

    def table(self) -> list[list[float]]:
        """The numbers of the table, one row a parameter, unrounded."""
        rows = self.page.locator("#results .posterior tbody tr").all()
        return [
            [float(each.get_attribute("value") or "nan") for each in row.locator("data").all()]
            for row in rows
        ]

    def download(self, button: str) -> tuple[str, bytes]:
        """Name and content of what a button saves."""
        with self.page.expect_download() as expected:
            self.page.get_by_role("button", name=button, exact=True).click()
        return expected.value.suggested_filename, Path(expected.value.path()).read_bytes()

    def close(self, *allowed: str) -> None:
        """End the visit; nothing may have gone wrong but what contains one of ``allowed``."""
        violations = self.page.evaluate("window.violations")
        self.context.close()
        assert violations == []
        assert [e for e in self.errors if not any(each in e for each in allowed)] == []
        host = urlsplit(self.url).netloc
        schemes = ("data", "blob")
        asked = [urlsplit(url) for url in self.asked]
        assert [each for each in asked if each.scheme not in schemes and each.netloc != host] == []
