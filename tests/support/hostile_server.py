"""A server that speaks OpenAI's chat API, counts what it is asked, and misbehaves on a seeded plan."""

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "429", "429 with Retry-After", "500", "reset", "half answer", "no JSON", "no choices", "no text", "silence",
)  # fmt: skip


def echo(body: dict[str, Any]) -> str:
    """The default answer: the last turn, marked."""
    return f"answer to: {body['messages'][-1]['content']}"


def content_of(body: dict[str, Any]) -> str:
    """What requests are counted by: the turns of a conversation."""
    return json.dumps(body["messages"], sort_keys=True)


class HostileServer:
    """Answers at `url` while it is open as a context.

    Whether a request fails, and how, depends on the seed, its content, and how often this content was sent: never on
    the order of threads.

    Args:
        answer: makes the text of an answer from the request's body.
        faults: ways to fail, of `FAULTS`.
        share: of the first tries of each content, and of each later try up to `most`, that fails.
        most: failures of one content in a row.
        silence: seconds without an answer.
        retry_after: seconds in the header.
        complete: makes the response from the request's body and the text; see `completion`.

    Attributes:
        asked: how often each content was sent (`content_of`).
        answered: how often each content got its answer.
        failed: how often each fault was shown.
        bodies: every request, as it came.
        most_at_once: requests that were here at the same time.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = echo,
        faults: Sequence[str] = FAULTS,
        share: float = 0.0,
        seed: int = 0,
        most: int = 3,
        silence: float = 30.0,
        retry_after: float = 0.2,
        complete: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
    ):
        self.answer, self.faults, self.share, self.seed, self.most = answer, faults, share, seed, most
        self.silence, self.retry_after, self.complete = silence, retry_after, complete or completion
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.most_at_once = self._now = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> "HostileServer":
        owner = self

        class Handler(_Handler):
            server_of = owner

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def fault_of(self, content: str, tries: int) -> str | None:
        """How the try number `tries` (from 1) of a content fails; None: it is answered."""
        chance = random.Random(f"{self.seed} {tries} {content}")
        return chance.choice(self.faults) if tries <= self.most and chance.random() < self.share else None

    def take(self, body: dict[str, Any], key: str) -> tuple[str, str | None]:
        content = content_of(body)
        with self.lock:
            self.asked[content] += 1
            self.bodies.append(body)
            self.keys.add(key)
            fault = self.fault_of(content, self.asked[content])
            if fault is None:
                self.answered[content] += 1
            else:
                self.failed[fault] += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        return content, fault

    def leave(self) -> None:
        with self.lock:
            self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    server_of: HostileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server_of
        _, fault = server.take(body, self.headers.get("Authorization", ""))
        try:
            if fault is None:
                self._send(200, server.complete(body, server.answer(body)))
            else:
                self._fail(fault, body)
        finally:
            server.leave()

    def _fail(self, fault: str, body: dict[str, Any]) -> None:
        server = self.server_of
        right = json.dumps(server.complete(body, server.answer(body))).encode()
        if fault == "429":
            self._send(429, {"error": {"message": "too many requests"}})
        elif fault == "429 with Retry-After":
            self._send(429, {"error": {"message": "too many"}}, {"Retry-After": str(server.retry_after)})
        elif fault == "500":
            self._send(500, {"error": {"message": "internal error"}})
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "half answer":
            self._write(200, right[: len(right) // 2], len(right))
            self.close_connection = True
        elif fault == "no JSON":
            self._write(200, right[: len(right) // 2])
        elif fault == "no choices":
            self._send(200, {"object": "chat.completion", "choices": []})
        elif fault == "no text":
            self._send(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]})
        elif fault == "silence":
            server.closing.wait(server.silence)
            self.close_connection = True
        else:  # a status of HTTP, such as "401"
            self._send(int(fault), {"error": {"message": f"refused {self.headers.get('Authorization')}"}})

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._write(status, json.dumps(body).encode(), headers=headers)

    def _write(
        self, status: int, body: bytes, length: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    """The response of the API; a token is a word here."""
    words = sum(len(turn["content"].split()) for turn in body["messages"])
    return {
        "id": f"chatcmpl-{random.getrandbits(32):08x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": words, "completion_tokens": len(text.split()), "total_tokens": words + len(text.split()),
        },
    }  # fmt: skip
