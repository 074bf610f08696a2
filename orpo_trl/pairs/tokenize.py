"""Rows to token ids: `tokenize_rows` is the function that `datasets` maps over a source."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from datasets import Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from orpo_trl.config import ORPOConfig
from orpo_trl.pairs.rendering import render
from orpo_trl.pairs.row_errors import own_words
from orpo_trl.pairs.rows import Pair, RowError, TextPair, is_empty, row_to_pair
from orpo_trl.pairs.transcripts import TURN_ENDS

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
UNRENDERED = "words left out by the chat template"
DROP_REASONS = (MALFORMED, UNRENDERED, EMPTY_PROMPT, EMPTY_CHOSEN, EMPTY_REJECTED, TIE, LONG_PROMPT, NO_ROOM, CUT_TIE)

_IDS = ListOf(Value("int32"))
_IDS_READ = "prompt_ids,chosen_ids,rejected_ids"
_EMPTY_SIDES = (EMPTY_CHOSEN, EMPTY_REJECTED)
PAIR_FEATURES = {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS, "length": Value("int32")}
TOKENIZED_FEATURES = Features(
    {
        **PAIR_FEATURES,
        "status": Value("string"),
        "problem": Value("string"),
        "chosen_cut": Value("bool"),
        "rejected_cut": Value("bool"),
        "prompt_changed": Value("bool"),
        "is_text": Value("bool"),
        "read": Value("string"),
        "remarks": Value("string"),
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
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    rules: PairRules,
    features: Mapping[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Token ids of a batch of rows, for `datasets.Dataset.map(batched=True)`.

    Args:
        batch: column name to values.
        tokenizer: renders conversations and encodes texts, each text once, in one call for the batch.
        rules: limits of length, and how strings are read.
        features: types of the columns, where they are known.

    Returns:
        The columns of `TOKENIZED_FEATURES`. A row that is not kept has no ids; `status` says why, and `problem` holds
        the error of a malformed row. `is_text`: the row is no conversation. `read`: the columns that were used, with
        commas between them. `remarks`: JSON of `[[kind, words], ...]`, what the template left out of the row and what
        else is worth a warning, or None.

    Raises:
        ValueError: where the tokenizer has no chat template for a conversation, or one that is no valid template.
        TemplateLimit: where the chat template does not end, or asks for too much memory.
    """
    names = list(batch)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    records: list[dict[str, Any]] = [{} for _ in rows]
    texts: list[str] = []
    spans: dict[int, tuple[Pair, slice]] = {}
    for index, row in enumerate(rows):
        try:
            if row.get("prompt_ids") is not None:
                records[index] = _record(_check_ids(row, tokenizer), rules) | {"read": _IDS_READ}
                continue
            pair = row_to_pair(row, rules.strings_as_messages, rules.prompt_turns, features)
            texts_of_row, empty, remarks = _texts(pair, tokenizer)
        except RowError as error:
            records[index] = {"status": MALFORMED, "problem": str(error)}
            continue
        records[index] = {
            "status": empty,
            "is_text": isinstance(pair, TextPair),
            "read": ",".join(pair.read),
            "remarks": json.dumps(remarks) if remarks else None,
        }
        if empty is None:
            spans[index] = (pair, slice(len(texts), len(texts) + len(texts_of_row)))
            texts.extend(texts_of_row)

    encoded = _encode(texts, tokenizer)
    bos, ends = leading_special_ids(tokenizer), _end_tokens(tokenizer)
    for index, (pair, span) in spans.items():
        prompt, *full = encoded[span]
        has_end = [not isinstance(pair, TextPair) or text.rstrip().endswith(ends) for text in texts[span][1:]]
        records[index] |= _record(_split(prompt, full, bos, tokenizer.eos_token_id, has_end), rules)
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


def prompt_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of rendered prompts, as training has them: with the tokenizer's own first token once, whether the template
    writes it or not."""
    bos = leading_special_ids(tokenizer)
    return [ids if ids[: len(bos)] == bos else [*bos, *ids] for ids in _encode(texts, tokenizer)]


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text: `[bos_token_id]` for Mistral, none for Qwen."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    return next((special[:k] for k in range(len(special)) if special[k : k + len(bare)] == bare), [])


def _texts(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], str | None, list[Sequence[str]]]:
    """Texts of the prompt and of the dialogue with each response, the reason to drop the row as empty, and remarks."""
    remarks: list[Sequence[str]] = [(note, "") for note in pair.notes]
    responses = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    empty = [is_empty(response) for response in responses]
    if any(empty):
        return [], _EMPTY_SIDES[empty.index(True)], remarks
    if isinstance(pair, TextPair):
        dialogues = [pair.prompt + response for response in (pair.chosen, pair.rejected) if response is not None]
        return [pair.prompt, *dialogues], None, remarks
    with own_words(pair.names):
        rendering = render(pair, tokenizer)
    remarks += rendering.losses
    if any(rendering.is_empty):
        return [], _EMPTY_SIDES[rendering.is_empty.index(True)], remarks
    return [rendering.prompt, *rendering.dialogues], None, remarks


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What a text ends with that was rendered before, and needs no end-of-sequence token behind it.

    Beside that token, the ends of turns in other formats, where the tokenizer has each as a token of its own. A
    tokenizer that spells `<|im_end|>` in pieces never stops at it.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return (str(tokenizer.eos_token), *(end for end in TURN_ENDS if end in added))


def _split(prompt: list[int], full: list[list[int]], bos: list[int], eos: Any, has_end: list[bool]) -> _Ids:
    """Cut each encoded prompt + response where its response starts.

    `prompt` is what the model will see when it generates, so the response is whatever follows it in `full`. Where the
    tokenizer merges the end of the prompt with the start of a response, or the template renders the end of the prompt
    differently once an answer follows, the prompt is shortened, for both responses, to what is common to all.
    """
    common = min((_common_prefix(prompt, ids) for ids in full), default=0)
    responses = [ids[common:] for ids in full]
    responses = [ids if ends else [*ids, eos] for ids, ends in zip(responses, has_end, strict=True)]
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
