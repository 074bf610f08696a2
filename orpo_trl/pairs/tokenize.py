"""Rows to token ids: `tokenize_rows` is the function that `datasets` maps over a source."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from datasets import Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from orpo_trl.config import ORPOConfig
from orpo_trl.pairs.rows import ChatPair, Pair, RowError, TextPair, is_empty, row_to_pair

# What became of a row. KEPT rows reach the model; each other status is a reason for dropping the row.
KEPT = "kept"
MALFORMED = "malformed"
EMPTY_PROMPT = "empty prompt"
EMPTY_CHOSEN = "empty chosen"
EMPTY_REJECTED = "empty rejected"
TIE = "chosen equals rejected"
LONG_PROMPT = "prompt of max_prompt_length or more"
NO_ROOM = "prompt fills max_length"
CUT_TIE = "chosen equals rejected once cut"
DROP_REASONS = (MALFORMED, EMPTY_PROMPT, EMPTY_CHOSEN, EMPTY_REJECTED, TIE, LONG_PROMPT, NO_ROOM, CUT_TIE)

_IDS = ListOf(Value("int32"))
PAIR_FEATURES = {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS, "length": Value("int32")}
TOKENIZED_FEATURES = Features(
    {
        **PAIR_FEATURES,
        "status": Value("string"),
        "problem": Value("string"),
        "chosen_cut": Value("bool"),
        "rejected_cut": Value("bool"),
        "prompt_changed": Value("bool"),
    }
)


@dataclass(frozen=True)
class PairRules:
    """What decides the tokens of a pair, beside its row and the tokenizer. Lengths are in tokens; None: no limit."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    strings_as_messages: bool = False
    prompt_turns: str = "auto"

    @classmethod
    def of(cls, settings: ORPOConfig) -> "PairRules":
        return cls(**{rule.name: getattr(settings, rule.name) for rule in fields(cls)})


@dataclass
class _Ids:
    """Token ids of one row. `rejected` is None for a row of the NLL term alone."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None
    prompt_changed: bool = False


def tokenize_rows(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, rules: PairRules
) -> dict[str, list[Any]]:
    """Token ids of a batch of rows, for `datasets.Dataset.map(batched=True)`.

    Args:
        batch: column name to values.
        tokenizer: renders conversations and encodes texts, each text once, in one call for the batch.
        rules: limits of length, and how strings are read.

    Returns:
        The columns of `TOKENIZED_FEATURES`. A row that is not kept has no ids; `status` says why, and `problem` holds
        the error of a malformed row.
    """
    names = list(batch)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    records: list[dict[str, Any]] = [{} for _ in rows]
    texts: list[str] = []
    spans: dict[int, tuple[Pair, slice]] = {}
    for index, row in enumerate(rows):
        try:
            if row.get("prompt_ids") is not None:
                records[index] = _record(_check_ids(row, tokenizer), rules)
                continue
            pair = row_to_pair(row, rules.strings_as_messages, rules.prompt_turns)
            empty = _empty_side(pair)
            if empty:
                records[index] = {"status": empty}
                continue
            rendered = _render(pair, tokenizer)
        except RowError as error:
            records[index] = {"status": MALFORMED, "problem": str(error)}
            continue
        spans[index] = (pair, slice(len(texts), len(texts) + len(rendered)))
        texts.extend(rendered)

    encoded = _encode(texts, tokenizer)
    bos = leading_special_ids(tokenizer)
    eos: Any = tokenizer.eos_token_id  # one id, or none
    for index, (pair, span) in spans.items():
        prompt, *full = encoded[span]
        ids = _split(prompt, full, bos, None if isinstance(pair, ChatPair) else eos)
        records[index] = _record(ids, rules)
    return {name: [record.get(name) for record in records] for name in TOKENIZED_FEATURES}


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, no special tokens added."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # verbose: rows beyond the tokenizer's `model_max_length` are cut later, not worth its warning
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    # What the tokenizer's own call does, without the offsets and masks, which take a third of its time.
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text: `[bos_token_id]` for Mistral, none for Qwen."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    return next((special[:k] for k in range(len(special)) if special[k : k + len(bare)] == bare), [])


def _empty_side(pair: Pair) -> str | None:
    if is_empty(pair.chosen):
        return EMPTY_CHOSEN
    if pair.rejected is not None and is_empty(pair.rejected):
        return EMPTY_REJECTED
    return None


def _render(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the prompt, of the dialogue with its chosen and, where there is one, with its rejected response."""
    if isinstance(pair, TextPair):
        responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        return [pair.prompt, *(pair.prompt + response for response in responses)]
    responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    if not tokenizer.chat_template:
        raise ValueError(
            "The rows hold conversations, but the tokenizer has no chat template. Set `chat_template_path` to a Jinja "
            "file or to a tokenizer that has one."
        )

    def render(messages: list, **kwargs) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs, **pair.options))

    from jinja2 import TemplateError

    try:
        prompt = render(pair.prompt, add_generation_prompt=True)
        return [prompt, *(render([*pair.prompt, *turns]) for turns in responses)]
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        # Templates refuse by `raise_exception`, or trip over a turn that they were not written for.
        raise RowError("chosen", "turns that the chat template accepts", f"{type(error).__name__}: {error}") from error


def _split(prompt: list[int], full: list[list[int]], bos: list[int], eos: int | None) -> _Ids:
    """Cut each encoded prompt + response where its response starts.

    `prompt` is what the model will see when it generates, so the response is whatever follows it in `full`. Where the
    tokenizer merges the end of the prompt with the start of a response, or the template renders the end of the prompt
    differently once an answer follows, the prompt is shortened, for both responses, to what is common to all.
    """
    common = min((_common_prefix(prompt, ids) for ids in full), default=0)
    responses = [ids[common:] for ids in full]
    if eos is not None:
        responses = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in responses]
    kept = prompt[:common]
    if bos and kept[: len(bos)] != bos:
        kept = bos + kept
    rejected = responses[1] if len(responses) > 1 else None
    return _Ids(kept, responses[0], rejected, prompt_changed=common < len(prompt))


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _check_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Ids:
    vocabulary = len(tokenizer)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = row.get(name)
        if ids is None and name == "rejected_ids":
            continue
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise RowError(name, "a list of token ids", f"{type(ids).__name__} {ids!r:.60}")
        outside = next((token for token in ids if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise RowError(name, f"token ids from 0 to {vocabulary - 1}", str(outside))
    return _Ids(row["prompt_ids"], row["chosen_ids"], row.get("rejected_ids"))


def _record(ids: _Ids, rules: PairRules) -> dict[str, Any]:
    """Apply the paper's rules to one row's ids: which rows are dropped, and where the others are cut."""
    status = _drop_reason(ids, rules)
    if status:
        return {"status": status}
    room = None if rules.max_length is None else rules.max_length - len(ids.prompt)
    limits = [limit for limit in (room, rules.max_completion_length) if limit is not None]
    limit = min(limits) if limits else None
    chosen = ids.chosen[:limit]
    rejected = None if ids.rejected is None else ids.rejected[:limit]
    if chosen == rejected:
        return {"status": CUT_TIE}
    return {
        "prompt_ids": ids.prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "length": len(ids.prompt) + len(chosen) + len(rejected or ()),
        "status": KEPT,
        "chosen_cut": len(chosen) < len(ids.chosen),
        "rejected_cut": len(rejected or ()) < len(ids.rejected or ()),
        "prompt_changed": ids.prompt_changed,
    }


def _drop_reason(ids: _Ids, rules: PairRules) -> str | None:
    if not ids.prompt:
        return EMPTY_PROMPT
    if not ids.chosen:
        return EMPTY_CHOSEN
    if ids.rejected is not None and not ids.rejected:
        return EMPTY_REJECTED
    if ids.chosen == ids.rejected:
        return TIE
    if rules.max_prompt_length is not None and len(ids.prompt) >= rules.max_prompt_length:
        return LONG_PROMPT
    if rules.max_length is not None and len(ids.prompt) >= rules.max_length:
        return NO_ROOM
    return None
