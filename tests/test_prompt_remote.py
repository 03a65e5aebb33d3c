"""A chat service on loopback: recorded answers, errors, delays, cut and endless streams; keys stay where they are."""

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from prompt_server import event, fail, send, serve, stream, whole

from mova import PromptError, enhance_prompt
from mova.prompt import Question, RemoteModel, read_service
from mova.prompt import exchange as exchange_module
from mova.prompt import remote as remote_module
from mova.prompt.remote import retry_seconds

KEY = "sk-secret-0123456789abcdef"
IDEA = 'A woman on a pier turns and says: "Écoute, la mer."'
PROMPT = 'A woman stands on a pier at dusk in a medium shot. She turns and says: "Écoute, la mer."\n\nThe audio shows wind and her calm voice.'
ELEMENTS = json.dumps({"style": "photo", "camera": "wide", "subjects": "a cat", "setting": "a room", "light": "dusk", "visible_text": ["EXIT"]})
SILENT = "I think without a word."


class Cancelled(BaseException):
    """The host's interrupt."""


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No settings and no proxy of the machine; pauses between tries are short."""
    for name in ("BASE_URL", "MODEL", "VISION_MODEL", "TIMEOUT", "API_KEY", "KEY_VARIABLE"):
        monkeypatch.delenv(f"MOVA_PROMPT_{name}", raising=False)
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)


@pytest.fixture
def ask(monkeypatch):
    """ask(server, ...) -> what the enhancer makes of its answers."""

    def ask(server, idea=IDEA, *, key=KEY, timeout=5, model="tiny", **settings):
        for name, value in {"BASE_URL": server.url, "MODEL": model, "API_KEY": key, "TIMEOUT": timeout}.items():
            monkeypatch.setenv(f"MOVA_PROMPT_{name}", str(value))
        return enhance_prompt(idea, model=RemoteModel(), **settings)

    return ask


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mova-prompt")]


def wait_for_workers(seconds=1.0):
    end = time.monotonic() + seconds
    while workers() and time.monotonic() < end:
        time.sleep(0.01)
    return workers()


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "play",
    [
        stream(PROMPT), stream(PROMPT, piece=1), stream(PROMPT, crlf=True), stream(PROMPT, piece=1000), whole(PROMPT), whole([{"type": "text", "text": PROMPT}]),
        send([event(PROMPT), event(finish_reason="stop")]),  # no [DONE]
        send([event(PROMPT).encode()[:60], event(PROMPT).encode()[60:] + b"data: [DONE]"]),  # cut inside of a character and of a line, no line feed at the end
        send([event(finish_reason=None, delta={"reasoning_content": SILENT}), event(PROMPT), "data: [DONE]\n\n"]),
    ],
)  # fmt: skip
def test_answers_of_every_shape(ask, play):
    with serve(play) as server:
        made = ask(server)
    assert made.prompt == PROMPT and len(made.notes) == 1


def test_what_is_sent(ask):
    with serve(stream(ELEMENTS), stream(PROMPT)) as server:
        made = ask(server, image=torch.rand(1, 2000, 3000, 3), seed=2**40 + 5)
        (headers, look), (_, write) = server.requests
    assert headers["path"] == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}" and KEY not in json.dumps([look, write])
    picture, text = look["messages"][1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,") and len(picture["image_url"]["url"]) < 2_000_000 and text["type"] == "text"
    assert look["response_format"]["json_schema"]["schema"]["required"] and "response_format" not in write
    assert write["stream"] is True and write["seed"] == 5 and write["model"] == "tiny" and IDEA in write["messages"][1]["content"]
    assert made.elements.visible_text == ("EXIT",) and "EXIT" in write["messages"][1]["content"]


def test_a_wrong_form_is_repaired_once(ask):
    with serve(stream('{"style": 1}'), stream(ELEMENTS), stream(PROMPT)) as server:
        assert ask(server, image=torch.rand(1, 8, 8, 3)).elements.subjects == "a cat"
        assert "'style' must be a text" in server.requests[1][1]["messages"][1]["content"][1]["text"]
    with serve(stream("a cat")) as server:
        with pytest.raises(PromptError, match="in the form asked for, twice.*a cat"):
            ask(server, image=torch.rand(1, 8, 8, 3))
        assert len(server.requests) == 2


def test_text_arrives_while_it_is_written(ask):
    told = []
    with serve(stream(PROMPT, pause=0.02)) as server:
        ask(server, on_text=told.append)
    partial = [text for text in told if text and PROMPT.startswith(text) and text != PROMPT]
    assert len(set(partial)) > 2


@pytest.mark.parametrize("name", ["seed", "temperature", "max_tokens"])
def test_a_setting_that_the_service_does_not_know_is_left_out(ask, name):
    with serve(fail(400, f"Unsupported parameter: '{name}'"), stream(PROMPT)) as server:
        assert ask(server).prompt == PROMPT
        assert name in server.requests[0][1] and name not in server.requests[1][1]


def test_a_service_without_schemas_is_asked_without(ask):
    with serve(fail(422, "grammar is not supported"), stream(ELEMENTS), stream(PROMPT)) as server:
        assert ask(server, image=torch.rand(1, 8, 8, 3)).elements.light == "dusk"
        assert "response_format" in server.requests[0][1] and "response_format" not in server.requests[1][1]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "play",
    [
        fail(429),
        fail(500),
        fail(503),
        stream(PROMPT[:30], done=False),
        send(["data: {broken\n\n"]),
        send([event("x"), 'data: {"error": {"message": "oom"}}\n\n']),
    ],
)
def test_passing_trouble_is_tried_again(ask, play):
    with serve(play, play, stream(PROMPT)) as server:
        assert ask(server).prompt == PROMPT
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "play, said, tries",
    [
        (fail(401, f"Incorrect API key provided: {KEY}"), "HTTP 401: Incorrect API key provided: [*]{3}. .*MOVA_PROMPT_API_KEY", 1),
        (fail(403), "HTTP 403.*may that one use the model", 1),
        (fail(404, "model 'tiny' not found"), "HTTP 404: model 'tiny' not found. Is 'tiny' a model of this service", 1),
        (fail(400, "image input is not supported"), "HTTP 400: image input is not supported", 1),
        (fail(429, "You exceeded your current quota", "insufficient_quota"), "HTTP 429: You exceeded", 1),
        (fail(429, "slow down", **{"Retry-After": "3600"}), "asks to wait 3600 seconds", 1),
        (fail(500, "CUDA error"), "HTTP 500, 4 times: CUDA error", 4),
        (fail(301, Location="https://elsewhere.example/v1"), "points to https://elsewhere.example/v1", 1),
        (send(["<html><body>502 Bad Gateway</body></html>"], status=502, kind="text/html"), "HTTP 502, 4 times: <html>", 4),
        (send(["<html>hello</html>"], kind="text/html"), "ended the answer before it was complete", 4),
        (send(["{broken"], kind="application/json"), "no JSON object: '{broken'", 4),
        (send(["[" * 5000], kind="application/json"), "no JSON object", 4),
        (send(['data: {"choices": "no"}\n\n', "data: 3\n\n"]), "no JSON object: ' 3'|no JSON object: '3'", 4),
        (stream(PROMPT[:30], done=False), "before it was complete .4 tries", 4),
        (send([event(PROMPT, finish_reason="length"), "data: [DONE]\n\n"]), "cut by the service's limit", 1),
        (whole(PROMPT, finish_reason="length"), "cut by the service's limit", 1),
        (whole("", finish_reason="content_filter"), "content filter", 1),
        (send([event(delta={"refusal": "I will not."}), "data: [DONE]\n\n"]), "refused: 'I will not.'", 1),
        (stream("I'm sorry, but I can't help with describing that scene for you."), "refused", 1),
        (stream(""), "is no prompt", 1),
        (whole(PROMPT * 1000), "longer than 60,000 characters", 1),
    ],
)  # fmt: skip
def test_errors_are_sentences(ask, caplog, play, said, tries):
    with serve(play) as server:
        with pytest.raises(PromptError, match=said) as caught:
            ask(server)
        assert len(server.requests) == tries
    assert KEY not in str(caught.value) + caplog.text and not wait_for_workers()


def test_an_answer_of_30_mb_is_given_up(ask):
    for kind in ("text/event-stream", "application/json"):
        sent = []
        parts = (sent.append(1) or b"x" * 2**16 for _ in range(480))
        with serve(send(parts, kind=kind)) as server, pytest.raises(PromptError, match="larger than 8 MB"):
            ask(server)
        assert len(sent) < 480  # what is not read is not sent
    with serve(send([event("word " * 200)] * 30_000)) as server, pytest.raises(PromptError, match="longer than 60,000 characters"):
        ask(server)


def test_an_unreachable_service(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(PromptError, match="cannot be reached"):
        ask(type("Server", (), {"url": url}))
    assert time.monotonic() - start < 5


def never(handler):
    time.sleep(30)


def drip(handler):
    send([": still here\n\n"] * 600, pause=0.05)(handler)


@pytest.mark.parametrize("play", [never, drip], ids=["never", "drip"])
def test_silence_ends_after_the_timeout(ask, play):
    start = time.monotonic()
    with serve(play) as server, pytest.raises(PromptError, match="has not said a word for 1 seconds"):
        ask(server, timeout=1)
    assert time.monotonic() - start < 3 and not wait_for_workers()


@pytest.mark.parametrize(
    "play", [never, drip, stream(PROMPT * 9, pause=0.05), fail(429, **{"Retry-After": "50"})], ids=["never", "drip", "while writing", "in a pause"]
)
def test_cancel_works_within_a_second(ask, play):
    begun = time.monotonic()

    def on_text(text):
        if time.monotonic() - begun > 0.5:
            raise Cancelled

    with serve(play) as server:
        with pytest.raises(Cancelled):
            ask(server, on_text=on_text, timeout=60)
        assert time.monotonic() - begun < 1.5
        assert not wait_for_workers(1.0)


def test_cancel_while_connecting(ask, monkeypatch):
    """A host that takes no connection: the thread is left behind, the caller is free at once."""
    held = threading.Event()
    monkeypatch.setattr(exchange_module.http.client.HTTPConnection, "connect", lambda self: held.wait(20))
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        ask(
            type("Server", (), {"url": "http://127.0.0.1:9/v1"}),
            on_text=lambda text: (_ for _ in ()).throw(Cancelled) if time.monotonic() - begun > 0.3 else None,
        )
    assert time.monotonic() - begun < 1.3
    held.set()


def test_the_template_steps_in_only_when_it_is_asked_to(ask):
    with serve(fail(401, f"bad key {KEY}")) as server:
        made = ask(server, on_failure="use template")
    assert made.prompt == enhance_prompt(IDEA).prompt and "The template was used, because" in made.notes[0] and "HTTP 401" in made.notes[0]
    assert KEY not in "".join(made.notes)


@pytest.mark.parametrize("header, seconds", [("7", 7.0), (" 1.5 ", 1.5), ("Wed, 21 Oct 2015 07:28:00 GMT", 20.0), ("soon", None), (None, None), ("-3", None)])
def test_retry_after(header, seconds):
    assert retry_seconds(header, now=lambda: 1445412460.0) == seconds


# ---------------------------------------------------------------- settings


def settings(tmp_path, text):
    file = tmp_path / "prompt.json"
    file.write_text(text, encoding="utf-8")
    return file


def test_file_and_environment(tmp_path):
    file = settings(tmp_path, '\ufeff{"base_url": "http://localhost:11434/", "model": "a", "timeout": 30, "key_variable": "MY_KEY"}')
    service = read_service(file, {"MOVA_PROMPT_MODEL": "b", "MY_KEY": KEY})
    assert (service.base_url, service.model, service.timeout, service.key) == ("http://localhost:11434/v1", "b", 30.0, KEY)
    assert KEY not in repr(service)
    assert read_service(settings(tmp_path, '{"base_url": "http://a", "model": "m", "vision_model": null, "timeout": null}'), {}).vision_model == ""
    assert read_service(None, {"MOVA_PROMPT_BASE_URL": "https://x.example/api/chat/completions", "MOVA_PROMPT_MODEL": "m"}).base_url == "https://x.example/api"


@pytest.mark.parametrize(
    "text, environ, said",
    [
        ("{}", {}, "No base_url"), ('{"base_url": "http://a"}', {}, "No model"), ("[]", {}, "must hold a JSON object"), ("{", {}, "no readable JSON"),
        ('{"api_key": "sk-1"}', {}, "holds api_key.*A key is never read from a file"), ('{"color": 1}', {}, "holds color"),
        ('{"base_url": "ftp://a", "model": "m"}', {}, "no http or https address"), ('{"base_url": "http://user:pw@a/v1", "model": "m"}', {}, "the key in MOVA_PROMPT_API_KEY"),
        ('{"base_url": "http://a:99999", "model": "m"}', {}, "no address"), ('{"base_url": "localhost:80", "model": "m"}', {}, "no http or https"),
        ('{"base_url": "http://a", "model": "m", "timeout": "soon"}', {}, "timeout is soon"),
        ('{"base_url": "http://a", "model": "m"}', {"MOVA_PROMPT_API_KEY": "sk 1\n2"}, "MOVA_PROMPT_API_KEY holds blanks or signs"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path, text, environ, said):
    with pytest.raises(PromptError, match=said) as caught:
        read_service(settings(tmp_path, text), environ)
    assert "pw" not in str(caught.value) and "sk" not in str(caught.value).replace("asks", "")


def test_no_key_is_no_header(ask):
    with serve(stream(PROMPT)) as server:
        ask(server, key="")
        assert "Authorization" not in server.requests[0][0]
    with serve(fail(401)) as server, pytest.raises(PromptError, match="no key .MOVA_PROMPT_API_KEY is not set"):
        ask(server, key="")


def test_the_key_is_in_no_log(ask, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with serve(fail(500, f"key {KEY}"), stream(PROMPT)) as server:
        ask(server)
    assert KEY not in caplog.text + "".join(capsys.readouterr())


def test_a_key_in_the_answer_goes_nowhere(ask):
    told = []
    with serve(stream(f"{PROMPT} Asked with {KEY} today.")) as server:
        made = ask(server, on_text=told.append)
    assert "Asked with today." in made.prompt and KEY not in made.prompt + "".join(told)
    with serve(stream(PROMPT)) as server:
        assert ask(server, key="woman").prompt == PROMPT  # what servers without keys are given is no secret


def test_python_does_not_wait_for_a_connection_that_is_being_made():
    """A host with no room for another connection: the command is cancelled, and ends."""
    with contextlib.ExitStack() as opened:
        host = opened.enter_context(socket.socket())
        host.bind(("127.0.0.1", 0))
        host.listen(0)
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(host.getsockname())
        code = (
            "import time; from mova.prompt.exchange import Exchange\n"
            "def stop():\n    if time.monotonic() > end: raise SystemExit(7)\n"
            f"end = time.monotonic() + 0.3; list(Exchange('http://127.0.0.1:{host.getsockname()[1]}/v1', {{}}, {{}}, 60).text(stop))"
        )
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
        assert done.returncode == 7, done.stderr
    assert time.monotonic() - start < exchange_module.CONNECT_SECONDS - 1


def test_a_question_alone(monkeypatch):
    with serve(stream("yes")) as server:
        monkeypatch.setenv("MOVA_PROMPT_BASE_URL", server.url)
        monkeypatch.setenv("MOVA_PROMPT_MODEL", "m")
        assert RemoteModel().ask(Question("rules", "text"), -1, lambda text: None) == "yes"
