"""A headless Chromium, where this machine has one: it opens pages from disk, and is told to ask nothing of the network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with nothing of anybody's in it. Where there is none, the tests that ask for it are skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)}); apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(SWITCHES))
        yield browser
        browser.close()


class Opened:
    """A page as a reader has it, and all that the browser had to say of it.

    Attributes:
        page: Playwright's page.
        said: Words on the console, errors and refusals of the page's policy among them.
        asked: Addresses that were asked for, the page's own left out.
    """

    def __init__(
        self, browser: Any, file: Path, *, hash: str = "", size: dict[str, int] = DESKTOP, script: bool = True
    ) -> None:
        self.context = browser.new_context(viewport=size, java_script_enabled=script)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self._ask(request.url, file))
        self.page.goto(f"{file.as_uri()}{hash}")
        if script:
            self.until("document.documentElement.dataset.ready", seconds=30)

    def _ask(self, url: str, file: Path) -> None:
        if not url.startswith(("data:", "blob:", file.as_uri())):
            self.asked.append(url)

    def choose(self, **filters: str) -> None:
        """Set filters, and wait until they hold."""
        for name, value in filters.items():
            self.page.select_option(f"#filters [name={name}]", value)
            self.until(f"location.hash.includes('{name}=')")

    def search(self, text: str) -> None:
        """Type into the search, and wait until it holds."""
        self.page.fill("#filters [name=text]", text)
        self.until("text => new URLSearchParams(location.hash.slice(1)).get('text') === text", text)

    def until(self, holds: str, about: object = None, seconds: float = 10) -> None:
        """Wait until an expression holds. Playwright's own way to wait evaluates text in the page, which the policy refuses."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(holds, about):
            assert time.monotonic() < end, f"{holds} does not hold; the browser says {self.said}"
            time.sleep(0.02)

    @property
    def ids(self) -> list[str]:
        """The questions of the list."""
        return self.page.eval_on_selector_all("#found a", "rows => rows.map((row) => row.dataset.id)")

    @property
    def shown(self) -> str:
        """The question that is open."""
        return self.page.text_content("#question h3")

    @property
    def milliseconds(self) -> int:
        """From the beginning of the navigation until a question was shown and could be worked with."""
        return int(self.page.get_attribute("html", "data-ready"))

    @property
    def processor_seconds(self) -> float:
        """What the page's own process has computed so far, its start included: the same whatever else the machine is at."""
        session = self.context.new_cdp_session(self.page)
        session.send("Performance.enable")
        return next(one["value"] for one in session.send("Performance.getMetrics")["metrics"] if one["name"] == "ProcessTime")

    @property
    def overflows(self) -> bool:
        """Whether the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()
