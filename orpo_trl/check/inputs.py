"""The steps that look at what a run reads: recipe, model config, tokenizer, template, rows."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from orpo_trl.attention import why_not_exact
from orpo_trl.check.results import CheckOptions, DataResult, Failed, ModelResult, RecipeResult, Skipped
from orpo_trl.check.scored_tokens import show_pair
from orpo_trl.model import load_config, load_tokenizer, model_init_kwargs, model_name, settle_tokenizer
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import UNRENDERED_ADVICE, pair_lengths, prepare_pairs
from orpo_trl.pairs.rendering import render
from orpo_trl.pairs.rows import REASONING_KEYS, ChatPair, RowError, row_to_pair
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.recipe.parse import build_settings, load_recipe
from orpo_trl.trainer_checks import adapter_note
from orpo_trl.weights import refuse_pickles

# Rows to prepare without `--full`, chosen at random.
SAMPLE = 2_000
# Rows of each set in which tools are looked for.
_LOOKED_AT = 200
_SYSTEM = {"role": "system", "content": "Count with care."}
_TALK = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
]
_ANSWER = {"role": "assistant", "content": "That is 4."}
_THOUGHTS = "Two and two make four."
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "first": {"type": "integer", "description": "A number."},
                    "second": {"type": "integer", "description": "Another number."},
                },
                "required": ["first", "second"],
            },
        },
    }
]
_CALL = {
    "role": "assistant",
    "content": "",
    # Some templates want an id of nine letters or digits.
    "tool_calls": [
        {"id": "add000001", "type": "function", "function": {"name": "add", "arguments": {"first": 2, "second": 2}}}
    ],
}
_RESULT = {"role": "tool", "name": "add", "tool_call_id": "add000001", "content": "The sum is 4."}


def check_recipe(options: CheckOptions) -> Iterator[str | RecipeResult]:
    """Settings, their files, and what they need from the network."""
    recipe = load_recipe(options.arguments)
    own = {key: recipe.settings.get(key) for key in ("deepspeed", "fsdp")}
    found = RecipeResult(*build_settings(recipe, with_engine=False), own)
    training = found.training
    if options.is_on_gpu and recipe.settings.get("bf16") is None and not training.fp16:
        training.bf16 = True  # the default of a GPU, which this machine may not have
    yield found
    files = dict.fromkeys(place.file for place in recipe.places.values())
    yield f"{len(recipe.settings)} settings from {', '.join(files)}"
    yield (
        f"beta {training.beta:g}, NLL over the {training.nll_scope} as {training.nll_reduction}; learning rate "
        f"{training.learning_rate:g}, {getattr(training.lr_scheduler_type, 'value', training.lr_scheduler_type)}"
    )
    if found.model_args.use_peft and (note := adapter_note(training.learning_rate)):
        yield note
    remote = _remote(found)
    yield f"Needs the network, unless cached: {'; '.join(remote)}" if remote else "No step needs the network."


def _remote(recipe: RecipeResult) -> list[str]:
    """The names that are no local files, each with its key."""
    model_args, data_args = recipe.model_args, recipe.data_args
    names = (
        ("model config: `model_name_or_path`", model_args.model_name_or_path),
        ("tokenizer: `tokenizer_name_or_path`", model_args.tokenizer_name_or_path),
        ("chat template: `chat_template_path`", recipe.training.chat_template_path),
        ("data: `dataset_name`", data_args.dataset_name),
        *(("data: `datasets`", entry["path"]) for entry in data_args.datasets),
        *(("data: `eval_datasets`", entry["path"]) for entry in data_args.eval_datasets.values()),
    )
    return [
        f"{key} {name}"
        for key, name in names
        if name and not Path(name).expanduser().exists() and not name.endswith((".jinja", ".j2"))
    ]


def check_model(options: CheckOptions, recipe: RecipeResult) -> Iterator[str | ModelResult]:
    """The model's config and size, its tokenizer, and the layout that it reads."""
    arguments, training = recipe.model_args, recipe.training
    kwargs = {} if arguments.from_scratch else model_init_kwargs(arguments) | _as_dict(training.model_init_kwargs)
    config = _load_config(recipe, kwargs.get("revision", arguments.model_revision))
    attention = kwargs.get("attn_implementation")
    # A flash attention needs its package, and is as exact as torch's own, which replaces it here.
    attention = attention if attention in (None, "eager", "sdpa", "flex_attention") else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=training.trust_remote_code, attn_implementation=attention
        )
    why_padded = why_not_exact(model, bool(training.neftune_noise_alpha))
    weights = sum(weight.numel() for weight in model.parameters())
    yield f"{config.model_type}, {weights:,} weights"
    tokenizer = load_tokenizer(arguments, training.trust_remote_code)
    added = settle_tokenizer(tokenizer, training.eos_token, training.chat_template_path)
    found = ModelResult(config, tokenizer, training.pair_layout == "padded" or why_padded is not None)
    yield found
    text = config.get_text_config()
    yield f"tokenizer: {len(tokenizer):,} tokens, the model embeds {text.vocab_size:,}"
    if added:
        yield f"{added} tokens are added to both for the chat template of {training.chat_template_path}"
    elif len(tokenizer) > text.vocab_size:
        raise Failed(f"The tokenizer has {len(tokenizer):,} tokens, and the model embeds {text.vocab_size:,}.")
    longest = getattr(text, "max_position_embeddings", None)
    if training.max_length is not None and longest is not None and training.max_length > longest:
        raise Failed(f"`max_length: {training.max_length}` is more than the model's {longest} positions.")
    if training.pair_layout == "shared_prefix" and why_padded:
        raise Failed(f"`pair_layout: shared_prefix`: {why_padded}. Set `pair_layout: padded` or `auto`.")
    yield f"layout: {'padded: ' + (why_padded or 'as asked') if found.is_padded else 'shared prefix'}"


def _as_dict(kwargs: dict | str | None) -> dict:
    return kwargs if isinstance(kwargs, dict) else {}


def _load_config(recipe: RecipeResult, revision: str | None) -> PreTrainedConfig:
    name = model_name(recipe.model_args)
    if not recipe.model_args.from_scratch:
        refuse_pickles(name)
    try:
        return load_config(name, revision, recipe.training.trust_remote_code)
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(f"no config of `model_name_or_path: {name}`: {error}") from error


def check_template(options: CheckOptions, recipe: RecipeResult, model: ModelResult) -> Iterator[str]:
    """Whether the chat template renders a conversation as training needs it."""
    tokenizer = model.tokenizer
    if tokenizer.eos_token_id is None:
        raise Failed("The tokenizer has no end-of-sequence token; set `eos_token` to a token of its vocabulary.")
    if not tokenizer.chat_template:
        raise Skipped("no chat template; rows of plain text need none")
    pair, refused = _trial(tokenizer, _have_tools(recipe))
    rendering = render(pair, tokenizer)
    prompt, (whole,) = rendering.prompt, rendering.dialogues
    yield repr(whole)
    yield from refused
    if rendering.losses:
        words = "\n".join(f"{kind}: {words!r}" for kind, words in rendering.losses)
        raise Failed(f"The template leaves out words of a conversation, or renders a turn in two ways:\n{words}")
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(prompt, whole, strict=False)))
    if common < len(prompt):
        yield f"the prompt ends with {prompt[common:]!r} only where no answer follows: training leaves that out"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if back.split() != whole.split():  # SentencePiece writes a space after special tokens
        raise Failed(f"The tokens decode to another text:\n{whole!r}\n{back!r}")
    answer = tokenizer(whole[common:], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in answer:
        raise Failed(
            f"The template never writes the end-of-sequence token {tokenizer.eos_token!r} after an answer, so that the "
            "model would not learn to stop. Set `eos_token` to the token that ends a turn."
        )
    yield f"all turns, and the end-of-sequence token {tokenizer.eos_token!r}, come back as they were"
    # Templates have one name or another for thoughts. One that knows none of them trains answers without.
    known = [name for name in REASONING_KEYS if _renders_thoughts(tokenizer, {**_ANSWER, name: _THOUGHTS})]
    names = ", ".join(f"`{name}`" for name in known)
    yield "thoughts of an answer: " + (f"rendered from {names}" if known else "the template renders none")


def _trial(tokenizer: PreTrainedTokenizerBase, has_tools: bool) -> tuple[ChatPair, list[str]]:
    """A conversation of every kind of turn that the template accepts, and a line for each kind that it refuses."""
    pair, refused = ChatPair(_TALK, [_ANSWER], None), []
    kinds: list[tuple] = [("a system turn", [_SYSTEM], [], {})]
    if has_tools:
        kinds.append(("a tool call", [], [_CALL, _RESULT], {"tools": _TOOLS}))
    for kind, first, last, options in kinds:
        more = replace(pair, prompt=[*first, *pair.prompt, *last], options=options)
        try:
            render(more, tokenizer)
        except RowError as error:
            refused.append(f"the template refuses {kind}: a row with one is malformed ({error.received:.80})")
        else:
            pair = more
    return pair, refused


def _have_tools(recipe: RecipeResult) -> bool:
    """Whether a row has tools or calls one, of some from all over each set."""
    training = recipe.training
    with suppress(Exception):  # rows that cannot be loaded are the matter of the step "Data"
        for rows in recipe.sets.values():
            if isinstance(rows, Dataset):
                rows = rows.select(range(0, len(rows), max(1, len(rows) // _LOOKED_AT)))
            for row in islice(rows, _LOOKED_AT):
                with suppress(RowError):
                    pair = row_to_pair(row, training.strings_as_messages, training.prompt_turns)
                    if isinstance(pair, ChatPair) and _has_tools(pair):
                        return True
    return False


def _has_tools(pair: ChatPair) -> bool:
    turns = (*pair.prompt, *pair.chosen, *(pair.rejected or ()))
    return bool(pair.options.get("tools")) or any(turn.get("tool_calls") for turn in turns)


def _renders_thoughts(tokenizer: PreTrainedTokenizerBase, answer: dict) -> bool:
    try:
        return not render(ChatPair(_TALK, [answer], None), tokenizer).losses
    except RowError:
        return False


def check_data(options: CheckOptions, recipe: RecipeResult, model: ModelResult) -> Iterator[str | DataResult]:
    """Prepares rows of the training and evaluation sets."""
    training = recipe.training
    rules = PairRules.of(training)
    for name, rows in recipe.sets.items():
        sample, total = _sample(rows, options.full, training.seed)
        pairs, report = prepare_pairs(
            sample, model.tokenizer, rules, name, training.on_malformed, training.on_unrendered
        )
        if total is None:
            yield f"{name}: the first {len(sample):,} rows of a stream"
        elif len(sample) < total:
            yield f"{name}: {len(sample):,} rows at random out of {total:,} (--full: all)"
        yield from str(report).splitlines()
        if name == "train" and isinstance(pairs, Dataset) and report is not None:
            num_pairs = round(report.kept * (total or len(sample)) / len(sample))
            yield DataResult(pairs, pair_lengths(pairs), num_pairs, is_stream=total is None)
            _check_training_pairs(recipe, report, is_stream=total is None)
        if report is not None and report.losses and training.on_unrendered == "warn":
            raise Failed(
                "\n".join(["The chat template leaves out words of the rows:", *report.losses, UNRENDERED_ADVICE])
            )


def _sample(rows: Dataset | IterableDataset, full: bool, seed: int) -> tuple[Dataset, int | None]:
    """Rows to prepare, and the number of all rows; None for a stream."""
    if isinstance(rows, IterableDataset):
        return Dataset.from_list(list(rows.take(SAMPLE))), None
    if full or len(rows) <= SAMPLE:
        return rows, len(rows)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:SAMPLE]
    return rows.select(np.sort(chosen)), len(rows)


def _check_training_pairs(recipe: RecipeResult, report: PreparationReport, is_stream: bool) -> None:
    cut = sum(source.cut_chosen for source in report.sources.values())
    if cut > report.kept / 2:
        raise Failed(
            f"{cut:,} of {report.kept:,} chosen responses are cut, and with them the end-of-sequence token that would "
            "teach the model to stop. Raise `max_length`, or drop long prompts by `max_prompt_length`."
        )
    if not report.pairs and recipe.training.beta:
        raise Failed("No row has a rejected response, so there is no odds-ratio term.")
    if is_stream and recipe.training.max_steps <= 0:
        raise Failed("`dataset_streaming: true` needs `max_steps`.")


def check_pair(options: CheckOptions, recipe: RecipeResult, model: ModelResult, data: DataResult) -> Iterator[str]:
    """Shows one pair, token by token."""
    whole = np.flatnonzero(data.lengths.is_pair)
    if not len(whole):
        raise Skipped("no row has a rejected response")
    shortest = int(whole[data.lengths.unique[whole].argmin()])
    yield "the shortest of the pairs, token by token"
    yield from show_pair(data.pairs[shortest], recipe.training, model.tokenizer, options.color)
