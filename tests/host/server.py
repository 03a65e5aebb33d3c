"""Starts ComfyUI checkouts for tests. A checkout is never written to: everything lies in a folder of the run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("COMFY_PYTHON", sys.executable)  # has ComfyUI's requirements and ours
CHECKOUTS = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
PATIENCE = 180  # seconds a server may take to start; 5 to 10 on an idle machine
OPTIONS = "--cpu --listen 127.0.0.1 --disable-auto-launch --disable-api-nodes --preview-method latent2rgb".split()
QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 is never asked through a proxy


@dataclass
class Server:
    """A running ComfyUI. ready_s: seconds from start to the first answer; folder: holds models, input, output, user and the log."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]
    ready_s: float

    def get(self, path: str) -> Any:
        with direct.open(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def log(self) -> str:
        """What it has written so far, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", (self.folder / "server.log").read_text(encoding="utf-8", errors="replace"))

    def import_seconds(self) -> dict[str, float]:
        """Seconds the import of each pack took, by folder name; infinite when it failed."""
        found = re.findall(r"([\d.]+) seconds( \(IMPORT FAILED\))?: (.+)", self.log())
        return {Path(path.strip()).name: float("inf") if failed else float(seconds) for seconds, failed, path in found}

    def resident_mib(self) -> float:
        """Resident memory of the process in MiB, as Linux tells it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmRSS:\s+(\d+)", status, re.M)[1]) / 1024


@contextmanager
def serve(
    checkout: Path, folder: Path, packs: Mapping[str, Path], environment: Mapping[str, str] | None = None, frontend: Path | None = None
) -> Iterator[Server]:
    """Runs a checkout with these packs (folder name -> source) linked in; models are expected in folder/models. RuntimeError when it does not start.

    frontend: the files of the web page; None = the package of its Python.
    """
    for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, source in packs.items():
        (folder / "custom_nodes" / name).symlink_to(source.resolve(), target_is_directory=True)
    port = free_port()
    options = [*OPTIONS, "--port", str(port), "--base-directory", str(folder)]
    options += ["--database-url", f"sqlite:///{folder / 'user' / 'comfyui.db'}"]  # its default lies in the checkout
    options += ["--front-end-root", str(frontend)] if frontend else []
    began = time.monotonic()
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [PYTHON, "main.py", *options], cwd=checkout, env={**os.environ, **QUIET, **(environment or {})}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    server = Server(f"http://127.0.0.1:{port}", folder, process, 0.0)
    try:
        wait_until_ready(server)
        server.ready_s = time.monotonic() - began
        yield server
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: Server) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.process.poll() is None:
        try:
            return server.get("/object_info")
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"ComfyUI did not start:\n{server.log()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
