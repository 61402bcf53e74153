"""A headless Chromium, driven by its WebDriver with the standard library alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.demo import page_server

IDLE = "document.getElementById('status').className === 'idle'"  # conditions and values in the page
WRITTEN = "document.getElementById('written').textContent"
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "disable-dev-shm-usage"]
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """A page of Chromium.

    Args:
        driver: address of a chromedriver.
        profile: an empty folder for it.
    """

    def __init__(self, driver: str, profile: Path) -> None:
        words = [f"--{flag}" for flag in [*FLAGS, f"user-data-dir={profile}"]]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": words}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = f"{driver}/session"
        self.session += "/" + self.ask("POST", "", capabilities={"alwaysMatch": options})["sessionId"]

    def ask(self, method: str, path: str, **content: Any) -> Any:
        """Send a command of WebDriver; returns its answer."""
        body = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(self.session + path, body, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Load a page anew, even where only the fragment of its address differs."""
        for address in ("about:blank", url):
            self.ask("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns; a promise is waited for."""
        return self.ask("POST", "/execute/sync", script=script, args=arguments)

    def wait(self, condition: str) -> Any:
        """Wait until an expression is true in the page, and return it; fail where the page says what is wrong."""
        script = f"const bad = document.querySelector('.bad'); return [{condition}, bad && bad.textContent]"
        while not (value := self.run(script))[0]:
            assert value[1] is None, value[1]
            time.sleep(0.02)
        return value[0]

    def text(self, element: str) -> str:
        """What the element of this id shows."""
        return str(self.run("return document.getElementById(arguments[0]).textContent", element))

    def written(self) -> str:
        """The prompt and its continuation, once that is written."""
        self.wait(IDLE)
        return self.text("text")

    def fill(self, **values: float) -> None:
        """Set fields, by their ids."""
        for name, value in values.items():
            self.run("document.getElementById(arguments[0]).value = arguments[1]", name, value)

    def type(self, element: str, keys: str) -> None:
        """Press keys in the element of this id."""
        found = self.ask("POST", "/element", using="css selector", value=f"#{element}")
        self.ask("POST", f"/element/{next(iter(found.values()))}/value", text=keys)

    def click(self, element: str) -> None:
        """Click on what a CSS selector finds."""
        found = self.ask("POST", "/element", using="css selector", value=element)
        self.ask("POST", f"/element/{next(iter(found.values()))}/click")

    def complaints(self) -> list[str]:
        """What the browser's console has said since the last call."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type="browser")]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder's files, as `--mode demo` serves them."""
    with page_server(folder) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start a browser; without one the test is skipped, or fails where CI_NEEDS_CHROMIUM says that one is needed."""
    if not (CHROMIUM and DRIVER):
        missing = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("CI_NEEDS_CHROMIUM") == "1" else pytest.skip)(missing)
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        try:
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            browser = Browser(f"http://127.0.0.1:{port}", profile)
            yield browser
            browser.ask("DELETE", "")
        finally:
            driver.terminate()
