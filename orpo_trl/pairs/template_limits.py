"""Limits of a chat template: it is a program of somebody else, and may never end or ask for any amount of memory.

transformers runs templates in Jinja's sandbox, which keeps them from code and files, but not from `'a' * 10**10`.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

# Seconds that a template may take for a pair. The longest conversations take milliseconds.
TIME_LIMIT = 10.0
# CPU seconds of a pair that count as slow, and of all slow pairs together that a template may take.
SLOW, SLOW_LIMIT = 0.5, 60.0
# Bytes that a process may grow by while a template runs. Other threads may need memory at the same time.
MEMORY_LIMIT = 1 << 30
# Characters of a rendered conversation: some million tokens.
MAX_RENDERED = 10_000_000

_PAGE = resource.getpagesize() if resource else 0
# CPU seconds of the slow pairs of each template, in this process.
_spent: dict[str, float] = {}


class TemplateLimit(ValueError):
    """A chat template that does not end, or asks for memory without bound; the text is what it does."""


class _TimeIsUp(BaseException):
    """No `Exception`: Jinja catches all of these where it computes constants, and then begins anew."""


@contextmanager
def template_limits(template: str) -> Iterator[None]:
    """Inside, a template is ended when it takes too much time or memory for a pair, or is slow for many.

    Only the main thread of a process can be interrupted, so that in others there are no limits. Linux alone limits
    memory.

    Raises:
        TemplateLimit: where the template has reached a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start = time.thread_time()
    try:
        with _time_limit(), _memory_limit():
            yield
    except _TimeIsUp:
        raise TemplateLimit(f"did not end within {TIME_LIMIT:g} seconds.") from None
    except MemoryError:
        gigabytes = MEMORY_LIMIT / (1 << 30)
        raise TemplateLimit(f"asks for more than {gigabytes:g} GiB of memory.") from None
    finally:
        _count(template, time.thread_time() - start)


def _count(template: str, seconds: float) -> None:
    if seconds < SLOW:
        return
    _spent[template] = _spent.get(template, 0.0) + seconds
    if _spent[template] > SLOW_LIMIT:
        raise TemplateLimit(f"took {_spent.pop(template):.0f} s for a few pairs.")


@contextmanager
def _time_limit() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TimeIsUp

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.001), interval)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """A limit on addresses that are in use, which Python answers with a MemoryError."""
    used = _addresses_in_use()
    if resource is None or used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = [used + MEMORY_LIMIT, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _addresses_in_use() -> int | None:
    """Bytes; None where the system does not tell. Called for each pair, so without the layers of `open`."""
    try:
        status = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(status, 20).split()[0]) * _PAGE
    finally:
        os.close(status)


def check_length(rendered: str) -> str:
    """A rendered conversation.

    Raises:
        TemplateLimit: where it is too long for any tokenizer.
    """
    if len(rendered) > MAX_RENDERED:
        raise TemplateLimit(f"renders {len(rendered):,} characters for a pair; expected at most {MAX_RENDERED:,}.")
    return rendered
