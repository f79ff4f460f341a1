"""A page that is served as `musicrl collect` serves it, and a real browser to open it with."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from musicrl_hf.collect.server import listen, uvicorn_config
from musicrl_hf.collect.service import ListeningService

# In CI the variable is set, and a browser that does not start is an error; elsewhere its tests need one that is there.
BROWSER = os.environ.get("MUSICRL_TEST_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
expect.set_options(timeout=15_000)  # milliseconds; other work may have the processor
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def served(service: ListeningService) -> Iterator[str]:
    """The address of a page on loopback."""
    server = uvicorn.Server(uvicorn_config(service))
    with listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def launched() -> Iterator[Browser]:
    """Debian's chromium, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=_OPTIONS.split())
        yield browser
        browser.close()


def agree(page: Page) -> str:
    """Go through consent; gives back the private code."""
    page.get_by_label("I have read this, and I agree.").check()
    page.get_by_role("button", name="Start listening").click()
    code = page.locator(".secret code")
    code.wait_for()
    private = code.inner_text()
    page.get_by_role("button", name="I have kept it").click()
    expect(page.locator(".pair:visible, .busy:visible")).to_have_count(1)
    return private


def play(page: Page, side: str) -> None:
    """Play a clip until it was heard for long enough."""
    page.get_by_role("button", name=f"Play clip {side}").click()
    page.locator(f".clip[data-side={side.lower()}] .heard.enough").wait_for()
