"""A real browser for the tests of the page: the system's Chromium, or one that is installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_APT = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]


def _system_browser() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _executable() -> str | None:
    """The path of a browser; None for the one that Playwright has downloaded."""
    found = _system_browser()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _run("apt-get", "update")
        _run(*_APT)
        found = _system_browser()
    if found is None and not _run(sys.executable, "-m", "playwright", "install", "chromium"):
        pytest.fail("These tests need Chromium: install it, or let Playwright download it.")
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser; while it is open no other event loop can run in this thread."""
    executable = _executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()
