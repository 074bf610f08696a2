"""The command `orpo-trl chat`: questions from standard input, answers as they come.

transformers has a chat too. It needs a server of its own in another terminal, which loads no adapter and leaves out the
token that the tokenizer puts before a text, where the template does not write it.
"""

import sys
from typing import Any

from transformers import TextStreamer

from orpo_trl.devices import torch_device
from orpo_trl.generate.engines import LocalModel
from orpo_trl.generate.sampling import Sampling, seed_of
from orpo_trl.output import answer

_NEW = "/new"


class _Shown(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        answer(text, end="\n" if stream_end else "")


def run_chat(
    model: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, device: str | None, **options: Any
) -> None:
    """Answer each line of standard input, with all lines and answers before it.

    Args:
        model: Hub id or folder, of a model or of a PEFT adapter.
        max_new_tokens, temperature, top_p: as in `Sampling`.
        seed: the same one, and the same lines, have the same answers.
        device: torch's name of the device.
        options: of `LocalModel`.

    Raises:
        ValueError, OSError: where the model cannot be loaded, or the conversation is too long for it.
    """
    engine = LocalModel(model, torch_device(device), **options)
    streamer: Any = _Shown(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(f"{_NEW} begins a new conversation, Ctrl-D ends.", file=sys.stderr)
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == _NEW:
            turns = []
        elif line:
            turns.append({"role": "user", "content": line})
            sampling = Sampling(max_new_tokens, temperature, top_p, seed_of(seed, 0, len(turns)))
            (tokens,) = engine.generate([engine.encode(turns)], [sampling], streamer)
            turns.append({"role": "assistant", "content": engine.decode(tokens)})
