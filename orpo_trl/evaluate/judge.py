"""Another model as the judge of answers: each judgement is asked for, read, kept, and counted."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from orpo_trl.commands import Unfinished
from orpo_trl.endpoint import KEY_VARIABLE, Endpoint, EndpointError, Message, Reply, Request
from orpo_trl.evaluate.judge_cost import Tokens, ask_leave, estimate, price_of
from orpo_trl.evaluate.judgements import Judgements, key_of, open_judgements
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluations import FOLDER
from orpo_trl.printable import printable

# Times that one start asks for a verdict that can be read.
_TRIES = 3
GOES_ON = "The same command goes on from here, and sends again only what is missing."
# Requests in a row without an answer, each after the endpoint's own retries: the server is gone, or the quota is spent.
_LOST_IN_A_ROW = 20


@dataclass(frozen=True)
class Judge:
    """A model that judges.

    Attributes:
        sampling: arguments of the API.
        read: the verdict in a choice of the API (`text` is its text); raises ValueError where there is none.
        usual_tokens: of a reply, for the estimate of costs.
        price: USD per million tokens of prompts and of replies; None for that of a known judge.
        yes: whether to send without asking.
    """

    endpoint: Endpoint
    sampling: Mapping[str, Any]
    read: Callable[[dict[str, Any]], float]
    usual_tokens: int
    price: tuple[float, float] | None = None
    yes: bool = False

    def key(self, messages: Sequence[Message]) -> str:
        return key_of(self.endpoint.name, messages, self.sampling)


@dataclass
class Judged:
    """Judgements in the order of their conversations.

    Attributes:
        verdicts: None where there is none.
        choices: of the API, which the verdicts were read from.
        problems: why a verdict is missing, by its place.
        tokens: of all replies that are kept for these conversations, those of earlier starts among them.
    """

    verdicts: list[float | None]
    choices: list[dict[str, Any] | None]
    problems: dict[int, str]
    tokens: Tokens


def judge_all(conversations: Sequence[Sequence[Message]], judge: Judge, path: Path) -> Judged:
    """Judge, and keep each reply as soon as it is there.

    Only what `path` does not have is sent, and each content once, however often it occurs. A verdict that cannot be
    read is asked for again; a later start asks again for those that are still missing. What was on its way when a
    process was killed is sent again: nobody has its reply.

    Args:
        conversations: one for each judgement.
        path: file of kept replies.

    Raises:
        ValueError: where nothing may be sent, or the server refuses every request.
        Unfinished: where the server does not answer any more.
    """
    keys = [judge.key(messages) for messages in conversations]
    with open_judgements(path) as kept:
        round_ = _Round(judge, kept)
        for key, messages in zip(keys, conversations, strict=True):
            if key not in round_.verdicts and not any(round_.take(key, reply) for reply in kept.replies(key)):
                round_.waiting[key] = messages
        if round_.waiting:
            round_.run()
        tokens = sum((_tokens(reply) for key in dict.fromkeys(keys) for reply in kept.replies(key)), Tokens())
    return Judged(
        [round_.verdicts.get(key) for key in keys],
        [round_.choices.get(key) for key in keys],
        {place: round_.problems[key] for place, key in enumerate(keys) if key not in round_.verdicts},
        tokens,
    )


def endpoint_of(options: Options, model: str) -> Endpoint:
    """The judge's server, as the options say."""
    return Endpoint(options.endpoint, model, options.workers, options.timeout)


def path_of(target: Target, options: Options, benchmark: str) -> Path:
    """The file of kept replies, beside the evaluation."""
    return (options.output or target.folder) / FOLDER / f"{benchmark}.judgements.jsonl"


def missing_note(missing: Sequence[object], of: str, problem: str | None) -> list[str]:
    """What to say of items without a verdict: their names, and why one has none.

    Args:
        of: what the names are, such as `rows`.
    """
    if not missing:
        return []
    because = f" For example: {problem}" if problem else ""
    return [f"No verdict for {len(missing)} {of}: {', '.join(map(str, missing))}.{because}"]


@dataclass
class _Round:
    """What one start asks for, by key."""

    judge: Judge
    kept: Judgements
    waiting: dict[str, Sequence[Message]] = field(default_factory=dict)
    verdicts: dict[str, float] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    used: Tokens = field(default_factory=Tokens)
    lost: int = 0

    def take(self, key: str, reply: dict[str, Any]) -> bool:
        """Read a reply's verdict, and say whether there is one."""
        try:
            self.verdicts[key] = self.judge.read(reply["choice"])
        except ValueError as error:
            self.problems[key] = str(error)
            return False
        self.choices[key] = reply["choice"]
        return True

    def run(self) -> None:
        """Ask for what is waiting."""
        judge, model = self.judge, self.judge.endpoint.model
        if judge.endpoint.url is None and not (os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_BASE_URL")):
            raise ValueError(
                f"The judge {model} at OpenAI needs a key in {KEY_VARIABLE}. Another server: --endpoint URL"
            )
        price = price_of(model, judge.price)
        expected = estimate(list(self.waiting.values()), judge.endpoint, judge.usual_tokens)
        ask_leave(len(self.waiting), model, expected, price, judge.yes)
        with tqdm(total=len(self.waiting), desc="Judging", unit="judgement", file=sys.stderr) as bar:
            for _ in range(_TRIES):
                keys = list(self.waiting)
                requests = [Request(self.waiting[key], judge.sampling) for key in keys]
                judge.endpoint.ask_all(requests, lambda place, reply, keys=keys: self._keep(keys[place], reply, bar))
        print(printable(f"Used: {self.used.text(price)}. Estimated: {expected.text(price)}."), file=sys.stderr)

    def _keep(self, key: str, reply: Reply | EndpointError, bar: Any) -> None:
        if isinstance(reply, EndpointError):
            self._count_lost(key, reply)
        else:
            self.lost = 0
            kept = self.kept.add(key, self.judge.endpoint.model, reply)
            self.used += _tokens(kept)
            if not self.take(key, kept):
                return
        del self.waiting[key]  # read, or the endpoint has tried it again and again
        bar.update(key in self.verdicts)

    def _count_lost(self, key: str, error: EndpointError) -> None:
        if error.is_of_all:
            raise error
        self.problems[key] = str(error)
        self.lost += 1
        if self.lost == _LOST_IN_A_ROW:
            raise Unfinished(f"{_LOST_IN_A_ROW} requests in a row got no answer. {GOES_ON} The last one: {error}")


def _tokens(reply: dict[str, Any]) -> Tokens:
    return Tokens(reply.get("prompt_tokens") or 0, reply.get("completion_tokens") or 0)
