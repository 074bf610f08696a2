"""The steps that look at what a run reads: recipe, model config, tokenizer, template, rows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from orpo_trl.attention import why_not_exact
from orpo_trl.check.flight import Failed, Preflight, Skipped
from orpo_trl.check.pair import show_pair
from orpo_trl.config import ORPOConfig
from orpo_trl.model import load_tokenizer, model_init_kwargs
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import pair_lengths, prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.recipe.parse import build_settings, load_recipe

# Rows that are prepared without `--full`, chosen at random from all.
SAMPLE = 2_000
_TALK = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
]
_ANSWER = {"role": "assistant", "content": "That is 4."}


def check_recipe(flight: Preflight) -> Iterator[str]:
    recipe = load_recipe(flight.arguments)
    flight.own_engine = {key: recipe.settings.get(key) for key in ("deepspeed", "fsdp")}
    flight.model_args, flight.data_args, flight.training = build_settings(recipe, with_engine=False)
    files = dict.fromkeys(place.file for place in recipe.places.values())
    training = flight.training
    yield f"{len(recipe.settings)} settings from {', '.join(files)}"
    yield (
        f"beta {training.beta:g}, NLL over the {training.nll_scope} as {training.nll_reduction}; learning rate "
        f"{training.learning_rate:g}, {training.lr_scheduler_type.value}"
    )
    remote = [
        f"{key} {name}"
        for key, name in (
            ("model config: `model_name_or_path`", flight.model_args.model_name_or_path),
            ("tokenizer: `tokenizer_name_or_path`", flight.model_args.tokenizer_name_or_path),
            ("chat template: `chat_template_path`", training.chat_template_path),
            ("data: `dataset_name`", flight.data_args.dataset_name),
            *(("data: `datasets`", entry["path"]) for entry in flight.data_args.datasets),
            *(("data: `eval_datasets`", entry["path"]) for entry in flight.data_args.eval_datasets.values()),
        )
        if name and not Path(name).expanduser().exists() and not name.endswith((".jinja", ".j2"))
    ]
    yield f"Needs the network, unless cached: {'; '.join(remote)}" if remote else "No step needs the network."


def check_model(flight: Preflight) -> Iterator[str]:
    arguments, training = flight.need("model_args", "Recipe"), flight.training
    kwargs = {} if arguments.from_scratch else {**model_init_kwargs(arguments), **(training.model_init_kwargs or {})}
    try:
        config = AutoConfig.from_pretrained(
            arguments.model_name_or_path,
            revision=kwargs.get("revision", arguments.model_revision),
            trust_remote_code=training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise Failed(f"no config of `model_name_or_path: {arguments.model_name_or_path}`: {error}") from error
    attention = kwargs.get("attn_implementation")
    # A flash attention needs its package to be built, and is as exact as what stands in for it here.
    attention = attention if attention in (None, "eager", "sdpa", "flex_attention") else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=training.trust_remote_code, attn_implementation=attention
        )
    flight.config, flight.why_padded = config, why_not_exact(model)
    weights = sum(weight.numel() for weight in model.parameters())
    yield f"{config.model_type}, {weights:,} weights"
    tokenizer = load_tokenizer(arguments, training.trust_remote_code)
    added = _settle_tokenizer(tokenizer, training)
    flight.tokenizer = tokenizer
    vocabulary = config.get_text_config().vocab_size
    yield f"tokenizer: {len(tokenizer):,} tokens, the model embeds {vocabulary:,}"
    if added:
        yield f"{added} tokens are added to both for the chat template of {training.chat_template_path}"
    elif len(tokenizer) > vocabulary:
        raise Failed(f"The tokenizer has {len(tokenizer):,} tokens, and the model embeds {vocabulary:,}.")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if training.max_length is not None and longest is not None and training.max_length > longest:
        raise Failed(f"`max_length: {training.max_length}` is more than the model's {longest} positions.")
    if training.pair_layout == "shared_prefix" and flight.why_padded:
        raise Failed(f"`pair_layout: shared_prefix`: {flight.why_padded}. Set `pair_layout: padded` or `auto`.")
    yield f"layout: {'padded: ' + (flight.why_padded or 'as asked') if flight.is_padded else 'shared prefix'}"


def _settle_tokenizer(tokenizer: PreTrainedTokenizerBase, training: ORPOConfig) -> int:
    """Does to a tokenizer what SFTTrainer does when it is made; returns how many tokens that adds."""
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise Failed(f"`eos_token: {training.eos_token}` is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = training.eos_token
    path = training.chat_template_path
    if path is None:
        return 0
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise Failed(f"`chat_template_path`: the file {path!r} does not exist.")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return 0
    source = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = source.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    added = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(added)
    tokenizer.eos_token = source.eos_token
    return len(added)


def check_template(flight: Preflight) -> Iterator[str]:
    tokenizer = flight.need("tokenizer", "Model config and tokenizer")
    if tokenizer.eos_token_id is None:
        raise Failed("The tokenizer has no end-of-sequence token; set `eos_token` to a token of its vocabulary.")
    if not tokenizer.chat_template:
        raise Skipped("no chat template; rows of plain text need none")
    prompt = tokenizer.apply_chat_template(_TALK, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*_TALK, _ANSWER], tokenize=False)
    yield repr(whole)
    if not whole.startswith(prompt):
        raise Failed(f"A conversation does not begin with its own prompt:\n{prompt!r}\n{whole!r}")
    if _ANSWER["content"] not in whole[len(prompt) :]:
        raise Failed(f"The answer is not in what follows the prompt: {whole[len(prompt) :]!r}")
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back.split() != whole.split():  # SentencePiece writes a space behind special tokens
        raise Failed(f"The tokens read back as another text:\n{whole!r}\n{back!r}")
    answer = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in answer:
        raise Failed(
            f"The template never writes the end-of-sequence token {tokenizer.eos_token!r} after an answer, so that the "
            "model would not learn to stop. Set `eos_token` to the token that ends a turn."
        )
    yield f"prompt, answer and end-of-sequence token {tokenizer.eos_token!r} come back as they were"


def check_data(flight: Preflight) -> Iterator[str]:
    tokenizer, training = flight.need("tokenizer", "Model config and tokenizer"), flight.training
    with_test = training.eval_strategy != "no"
    train, test = load_pairs(flight.data_args, with_test, seed=training.seed)
    rules = PairRules.of(training)
    sets = {"train": train, **(test if isinstance(test, dict) else {"eval": test} if with_test else {})}
    for name, rows in sets.items():
        sample, total = _sample(rows, flight.options["full"], training.seed)
        pairs, report = prepare_pairs(sample, tokenizer, rules, name, training.on_malformed)
        if total is None:
            yield f"{name}: the first {len(sample):,} rows of a stream"
        elif len(sample) < total:
            yield f"{name}: {len(sample):,} rows at random out of {total:,} (--full: all)"
        yield from str(report).splitlines()
        if name == "train":
            _note_training_pairs(flight, pairs, report, len(sample), total)


def _sample(rows: Dataset | IterableDataset, full: bool, seed: int) -> tuple[Dataset, int | None]:
    """Rows to prepare, and how many there are in all; None for a stream."""
    if isinstance(rows, IterableDataset):
        return Dataset.from_list(list(rows.take(SAMPLE))), None
    if full or len(rows) <= SAMPLE:
        return rows, len(rows)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:SAMPLE]
    return rows.select(np.sort(chosen)), len(rows)


def _note_training_pairs(
    flight: Preflight, pairs: Dataset, report: PreparationReport, rows: int, total: int | None
) -> None:
    flight.pairs, flight.is_stream = pairs, total is None
    lengths = pair_lengths(pairs)
    flight.lengths = np.stack([lengths.prompt, lengths.chosen, lengths.rejected], axis=1)
    flight.num_pairs = round(report.kept * (total or rows) / rows)
    cut = sum(source.cut_chosen for source in report.sources.values())
    if cut > report.kept / 2:
        raise Failed(
            f"{cut:,} of {report.kept:,} chosen responses are cut, and with them the end-of-sequence token that would "
            "teach the model to stop. Raise `max_length`, or drop long prompts by `max_prompt_length`."
        )
    if not report.pairs and flight.training.beta:
        raise Failed("No row has a rejected response, so there is no odds-ratio term.")
    if total is None and flight.training.max_steps <= 0:
        raise Failed("`dataset_streaming: true` needs `max_steps`.")


def check_pair(flight: Preflight) -> Iterator[str]:
    pairs = flight.need("pairs", "Data")
    whole = np.flatnonzero(flight.lengths[:, 2])
    if not len(whole):
        raise Skipped("no row has a rejected response")
    shortest = int(whole[flight.lengths[whole].sum(1).argmin()])
    yield "the shortest of the pairs, token by token"
    yield from show_pair(pairs[shortest], flight.training, flight.tokenizer, flight.options["color"])
