"""Answers from a server that speaks OpenAI's chat API: vLLM, SGLang, TGI, `transformers serve`, OpenAI itself."""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "OPENAI_API_KEY"
_OPENAI = "https://api.openai.com"
# Servers of one's own need no key, but the library sends one.
_NO_KEY = "none"
# Seconds before a request is sent again whose answer could not be read; they double each time. The library's own are
# 0.5 and 8.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
# Seconds without any answer after which the user is told.
_SILENCE = 10.0

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A conversation to answer: its turns (`role`, `content`), and arguments of the API such as `temperature`."""

    messages: Sequence[Message]
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """An answer: its text, the whole response as the server sent it, and the tokens that the server counted."""

    text: str
    raw: dict[str, Any]
    prompt_tokens: int | None
    completion_tokens: int | None


class EndpointError(ValueError):
    """A request that got no answer, after all retries.

    Attributes:
        status: of HTTP, such as 401; None where no answer came, or one that cannot be read.
    """

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status

    @property
    def is_of_all(self) -> bool:
        """Whether any other request would fail as well: the key, the address or the model is wrong."""
        return self.status in (401, 403, 404)


class _Unreadable(Exception):
    """An answer that is no answer of the API, in words."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server. The key is read from the variable OPENAI_API_KEY alone.

    A request is sent again only after a failure: 408, 409, 429 (after the server's `Retry-After`), 5xx, a lost
    connection, no byte for `timeout` seconds, a body that is no JSON or has no choice with a text.

    Args:
        url: of the API, such as http://localhost:8000/v1; None: OpenAI's own, or that of OPENAI_BASE_URL.
        model: name that the server knows.
        workers: requests at the same time.
        timeout: seconds.
        retries: times that one request is sent again.
    """

    url: str | None
    model: str
    workers: int = 8
    timeout: float = 600.0
    retries: int = 8

    def __post_init__(self):
        parts = urlsplit(self.url or _OPENAI)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint: expected an address such as http://localhost:8000/v1, received {self.url!r}")
        if parts.username or parts.password:
            raise ValueError(f"endpoint: expected an address without a user; a key is read from {KEY_VARIABLE}")

    @property
    def name(self) -> str:
        """The model, and where it runs unless that is OpenAI: a name alone does not say who answers there."""
        parts = urlsplit(self.url or os.environ.get("OPENAI_BASE_URL") or _OPENAI)
        if parts.hostname == urlsplit(_OPENAI).hostname:
            return self.model
        return f"{self.model} at {parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def ask(self, messages: Sequence[Message], **sampling: Any) -> Reply:
        """The answer to a conversation.

        Args:
            messages: its turns.
            sampling: arguments of the API: `temperature`, `max_tokens`, `seed`, …

        Raises:
            EndpointError: after all retries, or at once where another try would not help.
        """
        client, left, wait = self._client, self.retries, _FIRST_WAIT
        from openai import OpenAIError

        while True:
            create: Any = client.with_options(max_retries=left).chat.completions.with_raw_response.create
            try:
                response = create(model=self.model, messages=list(messages), **sampling)
            except OpenAIError as error:
                raise EndpointError(self._words(error), getattr(error, "status_code", None)) from None
            try:
                return _read_reply(response.http_response.content)
            except _Unreadable as error:
                left -= response.retries_taken + 1
                if left < 0:
                    raise EndpointError(self._words(error)) from None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def ask_all(self, requests: Sequence[Request], on_reply: Callable[[int, Reply | EndpointError], None]) -> None:
        """Ask for all answers, `workers` at a time.

        Args:
            requests: each is sent once, and again only after a failure.
            on_reply: is called in this thread with the place of the request in `requests`, and its reply or error, as
                soon as it is there. If it raises, nothing more is sent, and the exception goes on.
        """
        waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Reply | EndpointError | BaseException]] = queue.SimpleQueue()
        stopped = threading.Event()
        # The next one is sent when a reply was taken: what a kill loses is one request of each worker.
        places = iter(range(len(requests)))

        def work() -> None:
            while (index := waiting.get()) is not None and not stopped.is_set():
                try:
                    done.put((index, self.ask(requests[index].messages, **requests[index].sampling)))
                except BaseException as error:
                    done.put((index, error))

        # Daemons: Ctrl-C does not wait for answers, as it would with the threads of concurrent.futures.
        if requests:
            _ = self._client  # made once, and its errors are raised here
        workers = min(self.workers, len(requests))
        for _ in range(workers):
            waiting.put(next(places))
            threading.Thread(target=work, daemon=True).start()
        try:
            for number in range(len(requests)):
                index, found = self._first_of(done) if number == 0 else done.get()
                if not isinstance(found, Reply | EndpointError):
                    raise found
                on_reply(index, found)
                waiting.put(next(places, None))
        finally:
            stopped.set()
            for _ in range(workers):
                waiting.put(None)

    def _first_of(self, done: queue.SimpleQueue) -> Any:
        """The first answer. Retries are silent, so a server that is not there looks like one that thinks."""
        try:
            return done.get(timeout=_SILENCE)
        except queue.Empty:
            logger.warning(
                "No answer yet from %s after %.0f seconds. A request that fails is sent again, %d times at most.",
                self.url or "OpenAI", _SILENCE, self.retries,
            )  # fmt: skip
            return done.get()

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ValueError("An endpoint needs openai: pip install 'orpo-trl[eval]'") from error
        return openai.OpenAI(base_url=self.url, api_key=os.environ.get(KEY_VARIABLE) or _NO_KEY, timeout=self.timeout)

    def _words(self, error: Exception) -> str:
        """What went wrong, in one line and without the key, which some servers repeat."""
        text, cause = " ".join(str(error).split()), error.__cause__
        if cause is not None:
            text += f" ({type(cause).__name__}: {cause})"
        key = os.environ.get(KEY_VARIABLE)
        text = text.replace(key, f"${{{KEY_VARIABLE}}}") if key else text
        return f"{self.url or 'OpenAI'}, model {self.model!r}: {text:.500}"


def _read_reply(body: bytes) -> Reply:
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raise _Unreadable(f"expected JSON, received {body[:60]!r}") from None
    try:
        text = raw["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise _Unreadable(f"expected an answer with choices, received {body[:200]!r}") from None
    if not isinstance(text, str):
        raise _Unreadable(f"expected a choice with a text, received {body[:200]!r}")
    usage = raw.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(text, raw, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
