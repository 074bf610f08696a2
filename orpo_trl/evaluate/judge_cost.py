"""What judging costs: estimated and shown before anything is sent."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import click

from orpo_trl.endpoint import Endpoint, Message
from orpo_trl.printable import printable

# USD per million tokens, of the prompt and of the reply. OpenAI's price list as of 2025-11; alpaca_eval 0.6.6
# (decoders/openai.py) has the same prices of prompts for the first three.
_PRICES = {
    "gpt-4": (30.0, 60.0),
    "gpt-4-0613": (30.0, 60.0),
    "gpt-4-1106-preview": (10.0, 30.0),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4o": (2.5, 10.0),
    "gpt-4.1": (2.0, 8.0),
}
# Where the judge's own tokens cannot be counted. What judges read of Mistral-ORPO-β has 4.1 characters per token of
# Mistral in AlpacaEval, 3.9 in MT-Bench; its answers have 4.7 per token of GPT-4.
_CHARACTERS_PER_TOKEN, _CHARACTERS_PER_TOKEN_OF_OPENAI = 4.0, 4.6
# OpenAI's cookbook, "How to count tokens": what a chat adds for each message, and for the reply's start.
_TOKENS_PER_MESSAGE, _TOKENS_OF_REPLY_START = 3, 3


@dataclass(frozen=True)
class Tokens:
    """Tokens of prompts and of replies."""

    prompt: int = 0
    reply: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.reply + other.reply)

    def text(self, price: tuple[float, float] | None) -> str:
        """In words, with the cost where the price is known."""
        words = f"{self.prompt:,} tokens of prompts, {self.reply:,} of replies"
        if price is None:
            return words
        return f"{words}, {(self.prompt * price[0] + self.reply * price[1]) / 1e6:,.2f} USD"


def price_of(model: str, given: tuple[float, float] | None) -> tuple[float, float] | None:
    """USD per million tokens of prompts and of replies: the user's, else that of a known judge, else None."""
    return given or _PRICES.get(model)


def estimate(conversations: Sequence[Sequence[Message]], endpoint: Endpoint, usual_tokens: int) -> Tokens:
    """The tokens that judging will use, if each judgement is right at once.

    They are counted by tiktoken for OpenAI's own server, and elsewhere where TIKTOKEN_CACHE_DIR is set, if the judge's
    encoding can be had; else they are estimated from the characters.

    Args:
        conversations: one for each judgement.
        usual_tokens: of a reply.
    """
    count = _counter(endpoint)
    prompt = sum(
        _TOKENS_OF_REPLY_START + sum(_TOKENS_PER_MESSAGE + count(message["content"]) for message in messages)
        for messages in conversations
    )
    return Tokens(round(prompt), usual_tokens * len(conversations))


def ask_leave(count: int, model: str, tokens: Tokens, price: tuple[float, float] | None, yes: bool) -> None:
    """Show what is about to be sent, and ask.

    Args:
        count: requests.
        price: as `price_of` gives it.
        yes: send without asking.

    Raises:
        ValueError: where the answer is no, and where nobody can be asked.
    """
    unknown = "" if price else " Its price is not known here: --price IN OUT."
    print(printable(f"{count:,} judgements by {model}: about {tokens.text(price)}.{unknown}"), file=sys.stderr)
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ValueError("Nothing was sent: this is no terminal to ask at. Send without a question: --yes")
    if not click.confirm("Send them?", err=True):
        raise ValueError("Nothing was sent.")


def _counter(endpoint: Endpoint) -> Callable[[str], float]:
    # tiktoken downloads an encoding that it does not have; a machine with a server of its own may have no network.
    if endpoint.url is None or "TIKTOKEN_CACHE_DIR" in os.environ:
        # No tiktoken; the file of its encoding cannot be had, or is damaged; no model of OpenAI's.
        with suppress(ImportError, OSError, ValueError, KeyError):
            import tiktoken

            encoding = tiktoken.encoding_for_model(endpoint.model)
            return lambda text: len(encoding.encode_ordinary(text))
    characters = _CHARACTERS_PER_TOKEN_OF_OPENAI if endpoint.url is None else _CHARACTERS_PER_TOKEN
    return lambda text: len(text) / characters
