"""A chat service on loopback that plays back recorded answers: each request takes the next one of a list, the last one stays."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

Play = Callable[[BaseHTTPRequestHandler], None]


def event(text: str | None = None, **more: Any) -> str:
    """One event as vLLM, llama.cpp and hosted services send it."""
    delta = {} if text is None else {"content": text}
    return "data: " + json.dumps({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, **more}]}) + "\n\n"


def stream(text: str, *, piece: int = 7, pause: float = 0.0, done: bool = True, crlf: bool = False) -> Play:
    """The text in pieces; with a role first, a comment to keep alive, an event of usage without choices, [DONE]."""
    events = ['data: {"choices":[{"index":0,"delta":{"role":"assistant","content":null}}]}\n\n', ": keep-alive\n\n"]
    events += [event(text[at : at + piece]) for at in range(0, len(text), piece)]
    events += [event(finish_reason="stop"), 'data: {"choices":[],"usage":{"total_tokens":5}}\n\n', "data: [DONE]\n\n"] if done else []
    return send([part.replace("\n", "\r\n") if crlf else part for part in events], pause=pause)


def send(parts: list[str | bytes], *, status: int = 200, kind: str = "text/event-stream", pause: float = 0.0, headers: dict[str, str] | None = None) -> Play:
    """Bytes as they are, in HTTP chunks; the connection is closed behind them."""

    def play(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part.encode() if isinstance(part, str) else part)
            handler.wfile.flush()
            time.sleep(pause)

    return play


def whole(text: str, **choice: Any) -> Play:
    """An answer in one object, from a server that does not stream."""
    return send([json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]})], kind="application/json")


def fail(status: int, message: str = "no", code: str = "", **headers: str) -> Play:
    return send([json.dumps({"error": {"message": message, "code": code}})], status=status, kind="application/json", headers=headers)


@contextmanager
def serve(*plays: Play):
    """.url, and .requests as (headers, body) in the order of their arrival."""
    requests: list[tuple[dict[str, str], dict[str, Any]]] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers) | {"path": self.path}, body))
            self.close_connection = True
            try:
                plays[min(len(requests), len(plays)) - 1](self)
            except OSError:
                pass  # the client is gone, as it should be after a cancel

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}/v1", requests=requests, ended=ended)
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
