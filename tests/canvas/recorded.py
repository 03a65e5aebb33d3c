"""Serves ComfyUI's real web page (a PyPI package) over a recorded contract. Nothing is ever executed: there is no backend."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from .contract import PACK, ROOT

OVERLAYS = Path(sys.prefix) / "frontends"


def find_frontend(version: str | None = None) -> Path:
    """The page's files of a version, put beside the environment once; None: the package of this environment. RuntimeError when pip has none."""
    if version in (None, importlib.metadata.version("comfyui_frontend_package")):
        return Path(importlib.util.find_spec("comfyui_frontend_package").origin).parent / "static"
    folder = OVERLAYS / version
    if not (folder / "comfyui_frontend_package" / "static" / "index.html").is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, f"comfyui-frontend-package=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"comfyui-frontend-package {version} cannot be installed into {folder}: {done.stderr.strip()[-500:]}")
    return folder / "comfyui_frontend_package" / "static"


@contextmanager
def serve_recorded(contract: dict[str, Any], frontend: Path) -> Iterator[str]:
    """The address of the page; it lives in a thread while the block runs."""
    loop, started, address = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(build_app(contract, frontend))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        return runner

    def live() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    started.wait()
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def build_app(contract: dict[str, Any], frontend: Path) -> web.Application:
    """What the page asks a server for: the contract, its own files, and an empty installation."""
    settings: dict[str, Any] = {}
    scripts, web_folder = frontend / "extensions", ROOT / "web"
    answers: dict[str, Any] = {
        "object_info": contract["nodes"],
        "system_stats": {"system": {"comfyui_version": contract["comfyui"], "os": "recorded", "argv": []}, "devices": []},
        "extensions": [f"/extensions/{path.relative_to(scripts).as_posix()}" for path in scripts.rglob("*.js")]
        + [f"/extensions/{PACK}/{path.relative_to(web_folder).as_posix()}" for path in web_folder.rglob("*.js")],
        "features": {"supports_preview_metadata": True},
        "users": {"storage": "server", "migrated": True},
        "queue": {"queue_running": [], "queue_pending": []},
        "jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
        "models": list(contract["models"]),
        **{f"models/{folder}": files for folder, files in contract["models"].items()},
        "experiment/models": [{"name": folder, "folders": []} for folder in contract["models"]],
        **{f"experiment/models/{folder}": [{"name": file, "pathIndex": 0} for file in files] for folder, files in contract["models"].items()},
        "embeddings": [],
        **dict.fromkeys(("i18n", "global_subgraphs", "workflow_templates", "node_replacements", "history", "internal/folder_paths"), {}),
    }

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(answers[request.path.removeprefix("/api").lstrip("/")])

    async def read_settings(request: web.Request) -> web.Response:
        return web.json_response(settings)

    async def change_settings(request: web.Request) -> web.Response:
        name, value = request.match_info.get("id"), await request.json()
        settings.update({name: value} if name else value)
        return web.Response()

    async def view(request: web.Request) -> web.FileResponse:
        return web.FileResponse(ROOT / "assets" / "demo.jpg")  # whatever picture a workflow loads

    async def index(request: web.Request) -> web.FileResponse:
        return web.FileResponse(frontend / "index.html")

    app = web.Application()
    app.router.add_get("/", index)
    for prefix in ("", "/api"):
        app.router.add_get(f"{prefix}/ws", keep_socket)
        app.router.add_get(f"{prefix}/view", view)
        app.router.add_get(f"{prefix}/settings", read_settings)
        app.router.add_post(f"{prefix}/settings", change_settings)
        app.router.add_post(f"{prefix}/settings/{{id}}", change_settings)
        for path in answers:
            app.router.add_get(f"{prefix}/{path}", answer)
    if web_folder.is_dir():
        app.router.add_static(f"/extensions/{PACK}", web_folder)
    app.router.add_static("/", frontend)
    return app


async def keep_socket(request: web.Request) -> web.WebSocketResponse:
    """The page's WebSocket, on which nothing ever happens."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": request.query.get("clientId", "recorded")}})
    async for _ in socket:
        pass
    return socket
