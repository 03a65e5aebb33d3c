"""Drives ComfyUI's page in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--autoplay-policy=no-user-gesture-required",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page asks other hosts for news; no test depends on them
]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"}  # no templates over the canvas, no pack name over each node
# What every installation without user files answers, and what the page says about hosts it cannot reach.
USUAL = re.compile(r"user\.css|/userdata|/experiment/|Failed to load resource|Content Security Policy|ERR_NAME_NOT_RESOLVED|ERR_ABORTED")
PATIENCE = 120_000  # milliseconds
ENDS = ["execution_success", "execution_error", "execution_interrupted"]


def find_chromium() -> str | None:
    """The browser: $CHROMIUM, or the first one on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@dataclass
class Opened:
    """A workflow on the page. complaints: everything a person would see go wrong; graph: the page saved again; prompt: what Run would send."""

    complaints: list[str]
    graph: dict[str, Any]
    prompt: dict[str, Any]


@dataclass
class Ended:
    """A run from the Run button. reply: what the server said to the prompt; players: each video or audio on the page, after playing half a second."""

    end: str
    reply: dict[str, Any]
    error: str
    previews: int
    players: list[dict[str, Any]]


class Canvas:
    """The page, ready for work. Console and network errors are collected in `trouble` and part of the next workflow's complaints."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.trouble = page, []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and self.note(message.text))
        page.on("pageerror", lambda error: self.note(f"{error.name}: {error.message}"))
        page.on("response", lambda reply: reply.status >= 400 and self.note(f"{reply.status} {reply.url}"))
        page.goto(url)
        # Ready: every node of the server is registered, and the workflow that the page starts with has been placed.
        page.wait_for_function(
            """async () => !!(window.app?.extensionManager?.workflow?.activeWorkflow && window.LiteGraph
               && Object.keys(await (await fetch('/object_info')).json()).every(name => window.LiteGraph.registered_node_types[name]))"""
        )
        self.settle()
        self.close_notices()  # the first workflow of the page's own has nodes that a recorded contract lacks
        page.evaluate(Path(__file__).with_name("page.js").read_text(encoding="utf-8"))
        self.trouble.clear()

    def note(self, text: str) -> None:
        if not USUAL.search(text):
            self.trouble.append(text[:1000])

    def settle(self) -> None:
        """Waits until the page has drawn what it was asked for."""
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 300))))")

    def close_notices(self) -> None:
        self.page.keyboard.press("Escape")
        self.settle()

    def ask(self, question: str, *given: Any) -> Any:
        """The answer of a function in page.js."""
        answer = self.page.evaluate(f"given => window.__tests.{question}(...given)", list(given))
        return json.loads(answer) if answer else None

    def open(self, name: str, workflow: dict[str, Any]) -> Opened:
        """Opens a workflow as File > Open and drag and drop do."""
        self.close_notices()
        self.trouble.clear()
        self.ask("open", name, json.dumps(workflow))
        self.settle()
        self.fit_view()
        graph, prompt = self.ask("serialize"), self.ask("prompt")
        return Opened(self.ask("complaints") + self.trouble, graph, prompt)

    def fit_view(self) -> None:
        self.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()

    def picture_node(self, kind: str, values: dict[str, str]) -> bytes:
        """A PNG of one new node, its widgets changed to `values`, with a little room around it."""
        box, room = self.ask("show", kind, values), 12
        clip = {"x": box["x"] - room, "y": box["y"] - room, "width": box["width"] + 2 * room, "height": box["height"] + 2 * room}
        return self.page.screenshot(clip=clip)

    def run(self) -> Ended:
        """Presses Run, waits for the end, and plays what came out."""
        self.ask("listen")
        button = self.page.get_by_test_id("queue-button").first
        if button.evaluate("element => element.tagName") != "BUTTON":  # older pages have a split button
            button = button.locator("button").first
        with self.page.expect_response(lambda reply: reply.request.method == "POST" and reply.url.endswith("/prompt")) as sent:
            button.click()
        reply = json.loads(sent.value.text())
        if sent.value.status != 200:
            return Ended("refused", reply, "", 0, [])
        self.page.wait_for_function("ends => window.__events.some(event => ends.includes(event.type))", arg=ENDS)
        events = self.page.evaluate("() => window.__events")
        end = next(event for event in events if event["type"] in ENDS)
        self.fit_view()  # what is out of view gets no player
        self.page.wait_for_timeout(1000)
        previews = sum(event["type"] == "b_preview" for event in events)
        return Ended(end["type"], reply, (end["detail"] or {}).get("exception_message", ""), previews, self.ask("play"))


@contextmanager
def open_canvas(url: str, size: tuple[int, int] = (1600, 900)) -> Iterator[Canvas]:
    """The page of a server in a browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.request.post(f"{url}/api/settings", data=SETTINGS)
            yield Canvas(page, url)
        finally:
            browser.close()
