"""Queues prompts on a running ComfyUI and tells what happened."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Prompt = dict[str, dict[str, Any]]
ENDS = ("execution_success", "execution_error", "execution_interrupted")
PATIENCE = 180  # seconds a prompt may take


@dataclass
class Run:
    """One prompt's life. end: one of ENDS, or "refused"; error: of the node `failed`; node_errors: sentences by node; ran, cached: node ids."""

    end: str = "refused"
    error: str = ""
    failed: str = ""
    node_errors: dict[str, list[str]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    cached: set[str] = field(default_factory=set)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    previews: int = 0
    stopped_after: float = 0.0  # seconds from the interrupt to the end

    def text(self, node: str) -> Any:
        """What a text preview shows, which is JSON in the tests."""
        return json.loads(self.outputs[node]["text"][0])

    def files(self) -> list[dict[str, str]]:
        """Everything that was saved: filename, subfolder, type."""
        return [item for shown in self.outputs.values() for items in shown.values() for item in items if isinstance(item, dict) and "filename" in item]


def queue(url: str, prompt: Prompt, interrupt_at: float | None = None) -> Run:
    """Runs a prompt to its end; interrupt_at: the share of the progress of any node after which Cancel is pressed."""
    return asyncio.run(asyncio.wait_for(follow(url, prompt, interrupt_at), PATIENCE))


async def follow(url: str, prompt: Prompt, interrupt_at: float | None) -> Run:
    run, client = Run(), uuid.uuid4().hex
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket:
        async with http.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client}) as reply:
            answer = await reply.json()
        run.node_errors = {
            node: [error["details"] or error["message"] for error in found["errors"]] for node, found in (answer.get("node_errors") or {}).items()
        }  # even an accepted prompt may have some: of outputs that are left out
        if reply.status != 200:
            return run
        asked = None
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                run.previews += 1
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "progress" and interrupt_at is not None and asked is None and data["value"] >= interrupt_at * data["max"]:
                asked = time.monotonic()
                await http.post(f"{url}/interrupt")
            note(run, kind, data)
            if kind in ENDS:
                break
        run.stopped_after = time.monotonic() - asked if asked else 0.0
        while not (history := await fetch(http, f"{url}/history/{answer['prompt_id']}")):  # it is written a moment after the end
            await asyncio.sleep(0.05)
        run.outputs = history[answer["prompt_id"]]["outputs"]
    return run


def note(run: Run, kind: str, data: dict[str, Any]) -> None:
    """One event of the server."""
    if kind == "execution_cached":
        run.cached |= set(data["nodes"])
    elif kind == "executing" and data["node"]:
        run.ran.add(data["node"])
    elif kind in ENDS:
        run.end, run.error, run.failed = kind, data.get("exception_message", ""), data.get("node_id", "")


async def fetch(http: aiohttp.ClientSession, url: str) -> Any:
    async with http.get(url) as reply:
        return await reply.json()
