"""Who answers: a model in this process, or a server."""

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from orpo_trl.attention import without_adapter
from orpo_trl.callbacks.record import tokenizer_digest
from orpo_trl.config import ModelArguments
from orpo_trl.endpoint import Endpoint, EndpointError, Reply, Request
from orpo_trl.evaluations import OWN_TEMPLATE
from orpo_trl.generate.sampling import Sampling, processors
from orpo_trl.generation import generate_batch, stop_token_ids
from orpo_trl.pairs.rendering import render_turns
from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.tokenize import prompt_ids
from orpo_trl.scoring.models import load_model, load_scoring_tokenizer, require_model

# About so many places of each weight stand for it in the digest of a model.
_PLACES = 64


@dataclass(frozen=True)
class Prompt:
    """What one answer follows: the number of its conversation, all turns before it, and how it is drawn."""

    index: int
    messages: list[dict[str, Any]]
    sampling: Sampling


# The number of a conversation, its answer, and the answer's tokens where they were counted.
OnAnswers = Callable[[list[tuple[int, str, int | None]]], None]


class Engine(Protocol):
    @property
    def identity(self) -> dict[str, Any]:
        """What decides answers beside the prompts and their settings, as plain values."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What is worth recording beside the answers."""
        ...

    def answer(self, prompts: Sequence[Prompt], done: Collection[int], on_answers: OnAnswers) -> dict[int, str]:
        """Answer all prompts but those whose conversations are in `done`; errors by number of the conversation."""
        ...


class LocalModel:
    """A model of transformers, or an adapter that is merged into its model.

    The batches follow from the lengths of all prompts: they are the same for any number of processes, and after a
    restart. The longest prompts come first, so that what does not fit into memory fails at once.

    Args:
        model: Hub id or folder, of a model or of a PEFT adapter.
        device: where it runs.
        dtype: of the weights, as in `ModelArguments`.
        chat_template_path: as in `load_scoring_tokenizer`; None: the model's own.
        batch_size: answers at a time.
        rank, ranks: this process answers every `ranks`-th batch.
        default_template: whose template is taken where the model has none: a tokenizer's name.

    Raises:
        ValueError, OSError: where the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        dtype: str = "auto",
        chat_template_path: str | None = None,
        batch_size: int = 16,
        trust_remote_code: bool = False,
        rank: int = 0,
        ranks: int = 1,
        default_template: str | None = None,
    ):
        arguments = ModelArguments(model_name_or_path=model, dtype=dtype)
        require_model(arguments, trust_remote_code)
        self.tokenizer = load_scoring_tokenizer(arguments, chat_template_path, trust_remote_code)
        self.template_of = chat_template_path or OWN_TEMPLATE
        if not self.tokenizer.chat_template and default_template:
            self.template_of = default_template
            self.tokenizer = load_scoring_tokenizer(arguments, default_template, trust_remote_code)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {model!r} has no chat template. Set --chat_template_path to a .jinja file or to a "
                "tokenizer that has one."
            )
        loaded: Any = load_model(arguments, device, trust_remote_code)
        self.name, self.device, self.batch_size, self.rank, self.ranks = model, device, batch_size, rank, ranks
        self._digest = _weights_digest(loaded)  # before merging, which rounds otherwise on each device
        self.is_adapter = without_adapter(loaded) is not loaded
        self.model = cast(PreTrainedModel, loaded.merge_and_unload() if self.is_adapter else loaded)
        config = self.model.generation_config or GenerationConfig()
        self.stop_ids = stop_token_ids(self.tokenizer, config.eos_token_id)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.room: int = positions or sys.maxsize  # tokens of a prompt with its answer
        self._check_vocabulary()

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": self._digest, "tokenizer": tokenizer_digest(self.tokenizer), "dtype": str(self.model.dtype)}

    @property
    def settings(self) -> dict[str, Any]:
        template = str(self.tokenizer.chat_template)
        return {
            "adapter_merged": self.is_adapter,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            "batch_size": self.batch_size,
            "processes": self.ranks,
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(self.stop_ids),
            "stop_token_ids": self.stop_ids,
            "template_of": self.template_of,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "template": template,
        }

    def answer(self, prompts: Sequence[Prompt], done: Collection[int], on_answers: OnAnswers) -> dict[int, str]:
        ids = self._encode(prompts)
        asked = max((prompt.sampling.max_new_tokens for prompt in prompts), default=0)
        room = self.room - max(map(len, ids), default=0)
        if room < asked and self.rank == 0:
            told = f"answers in the batch of the longest prompt end after {room:,}, not {asked:,}"
            print(f"{self.name} takes {self.room:,} tokens with the answer: {told}.", file=sys.stderr)
        for number, batch in enumerate(_batches([len(one) for one in ids], self.batch_size)):
            if number % self.ranks == self.rank and any(prompts[k].index not in done for k in batch):
                on_answers(self._answer([prompts[k] for k in batch], [ids[k] for k in batch]))
        return {}

    def _answer(self, prompts: list[Prompt], ids: list[list[int]]) -> list[tuple[int, str, int | None]]:
        try:
            answers = self.generate(ids, [prompt.sampling for prompt in prompts])
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--batch_size {self.batch_size}: out of memory, set fewer. {error}") from error
        return [
            (prompt.index, self.decode(answer), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def generate(
        self, ids: list[list[int]], samplings: list[Sampling], streamer: TextStreamer | None = None
    ) -> list[torch.Tensor]:
        """Answers to a batch of prompts, as `generate_batch` returns them."""
        longest = max(map(len, ids))
        return generate_batch(
            self.model,
            ids,
            max_new_tokens=min(samplings[0].max_new_tokens, self.room - longest),
            stop_ids=self.stop_ids,
            pad_id=_padding(self.tokenizer),
            device=self.device,
            processors=processors(samplings, longest, self.device),
            streamer=streamer,
        )

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, with the header of the next answer behind it.

        Raises:
            RowError: where the template refuses it.
            ValueError: where it leaves no room for an answer.
        """
        (ids,) = prompt_ids([render_turns(messages, self.tokenizer, add_generation_prompt=True)], self.tokenizer)
        if len(ids) >= self.room:
            raise ValueError(f"{len(ids):,} tokens, and the model takes {self.room:,} with the answer")
        return ids

    def decode(self, tokens: torch.Tensor) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            try:
                found.append(self.encode(prompt.messages))
            except RowError as error:
                raise ValueError(
                    f"Prompt {prompt.index + 1}: the chat template of {self.name!r} refuses it: {error.received}"
                ) from error
            except ValueError as error:
                raise ValueError(f"Prompt {prompt.index + 1}: {error}") from error
        return found

    def _check_vocabulary(self) -> None:
        size, known = len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        if size > known:
            raise ValueError(f"{self.name!r}: its tokenizer has {size:,} tokens, and the model embeds {known:,}")


class RemoteModel:
    """A model behind a server, which renders the conversations itself."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    @property
    def identity(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint.url, "served_model": self.endpoint.model}

    @property
    def settings(self) -> dict[str, Any]:
        return {"workers": self.endpoint.workers, "template": None, "stop_tokens": None}

    def answer(self, prompts: Sequence[Prompt], done: Collection[int], on_answers: OnAnswers) -> dict[int, str]:
        missing = [prompt for prompt in prompts if prompt.index not in done]
        errors: dict[int, str] = {}

        def keep(place: int, reply: Reply | EndpointError) -> None:
            index = missing[place].index
            if isinstance(reply, Reply):
                on_answers([(index, reply.text, reply.completion_tokens)])
            elif reply.is_of_all:
                raise reply
            else:
                errors[index] = str(reply)

        self.endpoint.ask_all([_request(prompt) for prompt in missing], keep)
        return errors


def _request(prompt: Prompt) -> Request:
    sampling = prompt.sampling
    arguments: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    if sampling.top_p < 1:  # TGI refuses 1
        arguments["top_p"] = sampling.top_p
    return Request(prompt.messages, arguments)


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(int(cast(int, token)) for token in found if token is not None)


def _weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names, shapes and some values of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(len(flat) // _PLACES, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
