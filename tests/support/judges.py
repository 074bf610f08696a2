"""A judge of one's own, over real HTTP, and answers for it."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile_server import HostileServer, completion, content_of


def number_of(body: dict[str, Any], most: int) -> int:
    """From 0 to `most` - 1, by the content of a request alone."""
    return int(hashlib.sha256(content_of(body).encode()).hexdigest(), 16) % most


def share_of_second(body: dict[str, Any]) -> float:
    """The probability that a judge of AlpacaEval 2 gives to `M`, the second answer: 0.01 to 0.99."""
    return (1 + number_of(body, 99)) / 100


def with_logprobs(body: dict[str, Any], text: str) -> dict[str, Any]:
    """The response of a judge of AlpacaEval 2: log-probabilities of `m` and `M`.

    Args:
        text: `m` or `M`; any other text has no such tokens.
    """
    response = completion(body, text)
    if body.get("logprobs"):
        second = share_of_second(body)
        tokens = {"m": math.log(1 - second), "M": math.log(second)} if text in ("m", "M") else {text: -0.1}
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens.items()]
        response["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return response


def prefer(body: dict[str, Any]) -> str:
    """The letter that a judge of AlpacaEval 2 answers with."""
    return "M" if share_of_second(body) > 0.5 else "m"


class JudgeServer(HostileServer):
    """A server whose replies are verdicts; the first `wrong_first` replies to each content are `wrong`."""

    def __init__(
        self, verdict: Callable[[dict[str, Any]], str] = prefer, wrong: str = "", wrong_first: int = 0, **options: Any
    ):
        super().__init__(self._answer, **{"complete": with_logprobs, **options})
        self.verdict, self.wrong, self.wrong_first = verdict, wrong, wrong_first

    def _answer(self, body: dict[str, Any]) -> str:
        is_wrong = self.answered[content_of(body)] <= self.wrong_first
        return self.wrong if is_wrong else self.verdict(body)


def write_answers(folder: Path, count: int) -> tuple[Path, Path]:
    """Answers, and reference outputs to the same instructions, as AlpacaEval has them."""
    paths = folder / "answers.json", folder / "references.json"
    for path, generator in zip(paths, ("mine", "reference"), strict=True):
        rows = [
            {
                "instruction": f"Tell me about {i}.",
                "output": f"{generator} says {i}",
                "generator": generator,
                "dataset": "d",
            }
            for i in range(count)
        ]
        path.write_text(json.dumps(rows), encoding="utf-8")
    return paths
