"""Answers of a model to a batch of prompts, and which tokens end one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

from orpo_trl.pairs.rendering import render_turns
from orpo_trl.pairs.row_errors import RowError
from orpo_trl.upstream import pad

_ANSWER = "an answer to look for"
_EXCHANGE = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, of_model: int | Sequence[int] | None = None) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, those of the model, the template's end of a turn.

    Some models have three of them that differ. Whoever waits for one alone gets answers that go on with a made-up
    question.

    Args:
        tokenizer: its chat template may be absent.
        of_model: `eos_token_id` of the model's generation config.
    """
    known = [of_model] if isinstance(of_model, int) else list(of_model or ())
    found = [tokenizer.eos_token_id, *known, _end_of_turn(tokenizer)]
    return sorted({int(token) for token in found if token is not None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the template puts behind an answer."""
    if not tokenizer.chat_template:
        return None
    try:
        rendered = render_turns(_EXCHANGE, tokenizer)
    except (RowError, ValueError):  # a template for other turns than these
        return None
    behind = rendered.rpartition(_ANSWER)[2]
    special = tokenizer.added_tokens_decoder
    return next((token for token in tokenizer.encode(behind, add_special_tokens=False) if token in special), None)


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    device: torch.device,
    processors: LogitsProcessorList | None = None,
    streamer: TextStreamer | None = None,
) -> list[torch.Tensor]:
    """The most likely tokens behind each prompt, after `processors` have changed the logits.

    Args:
        model: a causal language model, in evaluation mode.
        prompts: token ids `[tokens]` of each; they are padded on the left.
        max_new_tokens: of each answer.
        stop_ids: end an answer.
        pad_id: fills prompts, and answers that have ended.
        streamer: gets the tokens of a single prompt as they come.

    Returns:
        Token ids `[new tokens]` of each answer, int64 on the CPU, up to its stop token and without it.
    """
    batch = [torch.as_tensor(ids) for ids in prompts]
    input_ids = pad(batch, padding_value=pad_id, padding_side="left")
    mask = pad([torch.ones_like(ids) for ids in batch], padding_value=0, padding_side="left")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=list(stop_ids), use_cache=True
    )
    with torch.no_grad(), _without_own_settings(model):
        generated = model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
            streamer=streamer,
        )
    return [_until(answer, stop_ids) for answer in generated[:, input_ids.shape[1] :].cpu()]


@contextmanager
def _without_own_settings(model: torch.nn.Module) -> Iterator[None]:
    """Without what the model's own file asks for, such as a penalty for repetition: `generate` fills in from there."""
    holders: Any = [module for module in model.modules() if "generation_config" in vars(module)]
    own = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in zip(holders, own, strict=True):
            module.generation_config = config


def _until(answer: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    ends = torch.isin(answer, torch.tensor(list(stop_ids))).nonzero()
    return answer[: int(ends[0])] if len(ends) else answer
