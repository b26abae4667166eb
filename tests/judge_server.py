"""A real server on this machine that speaks /v1/chat/completions, and misbehaves when told to."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

Body = dict[str, Any]
Judge = Callable[[Body], str]


class Reply(NamedTuple):
    """What the server does with one request."""

    status: int = 200
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    """Seconds before anything is sent."""
    cut: bool = False
    """Whether the connection breaks off in the middle of the body."""


def completion(
    content: str | None,
    finish: str = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] | None = (900, 30),
) -> Body:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    body: Body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    if usage is not None:
        total = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        body["usage"] = total | {"total_tokens": sum(usage)}
    return body


def error(status: int, code: str | None = None, param: str | None = None, message: str = "no",
          headers: tuple[tuple[str, str], ...] = ()) -> Reply:  # fmt: skip
    """An error of OpenAI's form; unless told otherwise it asks for a pause of 5 ms."""
    about = {"message": message, "type": code or "error", "param": param, "code": code}
    return Reply(status, {"error": about}, headers or (("retry-after-ms", "5"),))


def is_explain(body: Body) -> bool:
    return '"explanation"' in body["messages"][0]["content"]


def n_windows(body: Body) -> int:
    lines = body["messages"][1]["content"].splitlines()
    return sum(line.split(".")[0].isdigit() for line in lines)


def plain_judge(body: Body) -> str:
    """Says the same of all latents, and 1 of every other window."""
    if is_explain(body):
        return json.dumps({"category": "low_level", "score": 4, "explanation": "a word"})
    return json.dumps({"labels": [i % 2 for i in range(n_windows(body))]})


class JudgeServer:
    """Answers as `judge` does, unless `misbehave` has something else in mind.

    Args:
        judge: Content of the reply to a request's body.
        misbehave: Gets a request's body and how often it came before; a Reply to send instead.
        delay: Seconds that every answer takes.
    """

    def __init__(
        self,
        judge: Judge = plain_judge,
        misbehave: Callable[[Body, int], Reply | None] | None = None,
        delay: float = 0.0,
    ) -> None:
        self.judge, self.misbehave, self.delay = judge, misbehave, delay
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.queries: list[str] = []
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Replies, by request, of which the last byte has gone."""
        self.read: Counter[str] = Counter()
        """Replies, by request, that the client has surely read whole: another request followed
        on the same connection."""
        self.again: Counter[str] = Counter()
        """Times that a request came although its reply had surely been read."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "JudgeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        self.http.shutdown()
        self.http.server_close()
        self._thread.join()

    def wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def answer(self, path: str, headers: dict[str, str], raw: bytes) -> tuple[Reply, str]:
        body = json.loads(raw)
        key = raw.decode()
        with self._lock:
            times = self.asked[key]
            self.asked[key] += 1
            self.again[key] += self.read[key] > 0
            self.requests.append(body)
            self.headers.append(headers)
            self.queries.append(urlsplit(path).query)
        if urlsplit(path).path != "/v1/chat/completions":
            return error(404, "not_found"), key
        reply = self.misbehave(body, times) if self.misbehave else None
        return reply or Reply(body=completion(self.judge(body))), key

    def delivered(self, key: str, how: Counter[str]) -> None:
        with self._lock:
            how[key] += 1


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        before: str | None = None

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def do_POST(self) -> None:
            if self.before is not None:
                server.delivered(self.before, server.read)
                self.before = None
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            reply, key = server.answer(self.path, dict(self.headers), raw)
            server.wait(server.delay + reply.delay)
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            data = text.encode()
            lines = [f"HTTP/1.1 {reply.status} x", "Content-Type: application/json"]
            lines += [f"Content-Length: {len(data)}", *(f"{k}: {v}" for k, v in reply.headers)]
            whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + data
            self.close_connection = reply.cut
            try:
                if reply.cut:
                    self.connection.sendall(whole[: -len(data) // 2])
                    return
                self.connection.sendall(whole)
            except OSError:  # the client has gone
                self.close_connection = True
                return
            if reply.status == 200:
                server.delivered(key, server.sent)
                self.before = key

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def wait_until(true: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return true()
