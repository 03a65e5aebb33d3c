"""One question to a chat service over HTTP: a thread of its own waits on the network, so that the caller can always stop."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import PromptError

CONNECT_SECONDS = 10.0
TICK = 0.1  # seconds between two looks at whether the caller wants to stop
PIECE = 2**16  # bytes
LARGEST_BODY = 8 * 2**20  # bytes of an answer with everything around it: about 20,000 streamed tokens
LARGEST_ERROR = 2**14
LONGEST_ANSWER = 60_000  # characters
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class ServiceError(PromptError):
    """The service answered with an error, or not to the end. `status` 0: without an answer of its own."""

    def __init__(self, message: str, *, status: int = 0, transient: bool = False, wait: str | None = None) -> None:
        super().__init__(message)
        self.status, self.transient, self.wait = status, transient, wait


class Exchange:
    """POSTs `body` as JSON and yields the pieces of the answer's text as they arrive."""

    def __init__(self, url: str, headers: dict[str, str], body: dict[str, Any], timeout: float) -> None:
        self.url, self.headers, self.body, self.timeout = url, headers, body, timeout
        self.pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.socket: socket.socket | None = None  # the connection forgets it as soon as the answer begins

    def text(self, on_wait: Callable[[], None]) -> Iterator[str]:
        """Pieces of text. on_wait is called ten times a second in the calling thread and may raise; the connection is closed then. ServiceError."""
        job: Future[None] = Future()
        # A daemon: a connection that is being made cannot be woken, and Python shall not wait for it at its end.
        threading.Thread(target=self.run, args=(job,), name="mova-prompt", daemon=True).start()
        last = time.monotonic()
        try:
            while True:
                on_wait()
                finished = job.done()  # asked before the queue: what is in it now is all there is
                try:
                    yield self.pieces.get(timeout=0 if finished else TICK)
                    last = time.monotonic()
                except queue.Empty:
                    if finished:
                        return job.result()
                if time.monotonic() - last > self.timeout:
                    raise ServiceError(f"{host_of(self.url)} has not said a word for {self.timeout:g} seconds: is it overloaded? A longer timeout can be set.")
        finally:
            self.stop()

    def stop(self) -> None:
        """Wakes the thread that waits on the network, wherever it waits."""
        self.stopped.set()
        if self.socket is not None:
            try:
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # of TLS as well, without its farewell, which would wait
            except OSError:
                pass  # closed already

    # ---------------------------------------------------------------- in the thread

    def run(self, job: Future[None]) -> None:
        try:
            job.set_result(self.post())
        except BaseException as error:  # of whatever kind: it is raised in the calling thread
            job.set_exception(error)

    def post(self) -> None:
        connection, target = connect(self.url)
        try:
            connection.connect()
            self.socket = connection.sock
            if self.stopped.is_set():
                return
            self.socket.settimeout(self.timeout + CONNECT_SECONDS)  # the caller gives up first
            connection.request("POST", target, json.dumps(self.body).encode(), self.headers | {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise_for_status(response, self.url)
            self.read(response)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a socket closed under a read
            if isinstance(error, (socket.gaierror, ConnectionRefusedError)):
                raise ServiceError(f"{host_of(self.url)} cannot be reached ({describe(error)}): is the server running, and is base_url right?") from None
            raise ServiceError(f"the connection to {host_of(self.url)} failed ({describe(error)})", transient=not isinstance(error, TimeoutError)) from None
        finally:
            connection.close()

    def read(self, response: http.client.HTTPResponse) -> None:
        """Server-sent events line by line; an answer in one JSON object from a server that does not stream."""
        kept, total, characters, reader = b"", 0, 0, EventReader()
        streams = "json" not in response.headers.get_content_type()
        while piece := response.read1(PIECE):
            total += len(piece)
            if total > LARGEST_BODY:
                raise ServiceError(f"the answer of {host_of(self.url)} is larger than {LARGEST_BODY // 2**20} MB: this is no prompt. Is base_url right?")
            kept += piece
            if streams:
                *lines, kept = kept.split(b"\n")
                for text in (text for text in map(reader.read_line, lines) if text is not None):  # "": it thinks
                    characters += len(text)
                    if characters > LONGEST_ANSWER:
                        raise ServiceError(f"the answer is longer than {LONGEST_ANSWER:,} characters: the model does not come to an end. Use another one")
                    self.pieces.put(text)
        text = (reader.read_line(kept) or "") if streams else reader.read_whole(kept)
        if len(text) + characters > LONGEST_ANSWER:
            raise ServiceError(f"the answer is longer than {LONGEST_ANSWER:,} characters: this is no prompt")
        self.pieces.put(text)
        reader.check_end(host_of(self.url))


class EventReader:
    """The text in chat completion events, and whether the last of them came."""

    def __init__(self) -> None:
        self.ended, self.reason = False, ""

    def read_line(self, line: bytes) -> str | None:
        """The text of one line "data: {...}"; None for all others. ServiceError for what cannot be read, or tells of an error."""
        name, _, value = line.strip().partition(b":")
        if name != b"data" or not value.strip():
            return None
        if value.strip() == b"[DONE]":
            self.ended = True
            return None
        return self.read_choice(parse(value), "delta")

    def read_whole(self, body: bytes) -> str:
        self.ended = True
        return self.read_choice(parse(body), "message")

    def read_choice(self, event: dict[str, Any], part: str) -> str:
        if event.get("error"):
            raise ServiceError(f"the service reported an error: {error_message(event)}", transient=True)
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = choice.get(part)
        message = message if isinstance(message, dict) else {}
        if message.get("refusal"):
            raise ServiceError(f"the language model refused: '{str(message['refusal'])[:200]}'. Change the idea, or use another model")
        self.reason = choice.get("finish_reason") or self.reason
        return join_content(message.get("content"))

    def check_end(self, host: str) -> None:
        """ServiceError for an answer that is not complete."""
        if self.reason == "length":
            raise ServiceError("the answer was cut by the service's limit of tokens: use a model that thinks less, or raise the limit of the server")
        if self.reason == "content_filter":
            raise ServiceError("the service's content filter stopped the answer: change the idea, or use another model")
        if not (self.ended or self.reason):
            raise ServiceError(f"{host} ended the answer before it was complete", transient=True)


def parse(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ServiceError(f"the service sent what is no JSON object: '{body[:80].decode('utf-8', 'replace')}'. Is base_url right?", transient=True)
    return found


def join_content(content: Any) -> str:
    """Text, or a list of parts of which some are text."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    """(a connection that is not open yet, what to ask it for), through the proxy of the environment where one is set for this host."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
    proxy = None if loopback or proxy_bypass(parts.hostname) else getproxies().get(parts.scheme)
    if proxy is None:
        return kind(parts.hostname, parts.port, timeout=CONNECT_SECONDS), parts.path
    way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(way.hostname, way.port, timeout=CONNECT_SECONDS)
    if not secure:
        return connection, url
    connection.set_tunnel(parts.hostname, parts.port or 443)
    return connection, parts.path


def raise_for_status(response: http.client.HTTPResponse, url: str) -> None:
    """ServiceError with what the service says. Redirects are not followed: they would carry the key elsewhere."""
    body = response.read(LARGEST_ERROR)
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    message = error_message(said if isinstance(said, dict) else {}) or " ".join(body.decode("utf-8", "replace").split())[:200]
    if 300 <= response.status < 400:
        message = f"it points to {response.headers.get('Location', 'another address')}: set that as base_url"
    spent = "insufficient_quota" in body.decode("utf-8", "replace")
    raise ServiceError(
        message or response.reason,
        status=response.status,
        transient=response.status in TRANSIENT and not spent,
        wait=response.headers.get("Retry-After"),
    )


def error_message(said: dict[str, Any]) -> str:
    error = said.get("error") or said.get("message") or said.get("detail") or ""
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]


def host_of(url: str) -> str:
    return urlsplit(url).netloc


def describe(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
