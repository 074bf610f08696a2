"""The command `orpo-trl merge`: from a PEFT adapter to a plain model that any program can load.

The adapter's changes are added to the weights of its base model, in 16 or 32 bits. What comes out is loaded again and
gives pairs the log-probabilities that base and adapter gave them; a folder that does not is deleted.
"""

import gc
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from orpo_trl.checkpoints import sync_files
from orpo_trl.config import DataArguments, ModelArguments
from orpo_trl.devices import torch_device
from orpo_trl.model import load_config, load_tokenizer, naming
from orpo_trl.model_card import write_merged_card
from orpo_trl.pairs.load import load_pairs
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.plain_files import new_folder
from orpo_trl.printable import printable
from orpo_trl.scoring.models import adapter_config_file, base_of, require_files, require_model
from orpo_trl.upstream import MISSING_ADAPTER_KEYS, is_write_error
from orpo_trl.weights import refuse_pickled_adapter

# How far rounding the weights moves a mean token log-probability, as a share of it or, below 1, as it is. Both sides
# are computed in 32 bits: in bfloat16 the rounding of what SmolLM2-135M computes moves one by 0.2, that of its merged
# weights by 0.014 (float16: 0.019 and 0.0034; float32: 2e-5).
ROUNDING = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4, torch.float64: 1e-6}
# Names of weights that somebody has quantised by bitsandbytes end so; without it, they are the weights' own.
_QUANTISED_NAME = re.compile(r"(-unsloth)?-bnb-(4|8)bit/?$", re.IGNORECASE)
# Tokens of a row of the check; longer rows say no more of the weights.
_MAX_LENGTH = 2048
# Prompt, chosen, rejected: what is compared where no pairs are given.
_TEXTS = (
    ("What is the capital of France?", " The capital of France is Paris.", " I do not know."),
    ("Count from one to five:", " one, two, three, four, five", " five, three, nine"),
    ("def add(a, b):", "\n    return a + b\n", "\n    print(a)\n"),
    ("Translate to German: good morning.", " Guten Morgen.", " Buenos días."),
    ("Why is the sky blue?", " Air scatters blue light more than red light.", " Because it is blue."),
    ("The opposite of hot is", " cold.", " hot."),
    ("Write a line of a poem about the sea.", " The tide forgets the names we wrote in sand.", " Sea sea sea."),
    ("7 * 8 =", " 56", " 54"),
    ('{"name": "Ada", "born":', " 1815}", " yes}"),
    ("List three fruits:", "\n- apple\n- pear\n- plum", "\n1. bread"),
)


class MergeError(RuntimeError):
    """A merged model that is not base and adapter; the message says by how much it differs."""


@dataclass(frozen=True)
class Comparison:
    """Mean token log-probabilities of responses, before and after the merge.

    Attributes:
        responses: how many.
        effect: the largest change that the adapter makes to its base.
        difference: the largest difference between the merged model and the adapter on its base.
        allowed: what rounding explains of it.
    """

    responses: int
    effect: float
    difference: float
    allowed: float


def merge_adapter(
    adapter: str,
    output: Path,
    *,
    base: str | None = None,
    data: str | None = None,
    split: str = "train",
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Write base and adapter as one plain model, with tokenizer, chat template, generation config and card.

    Args:
        adapter: Hub id or folder of a PEFT adapter; the output folder of a run may be one.
        output: a folder that does not exist yet.
        base: Hub id or folder of the base model, where it is not the one that the adapter names. Of a base that
            bitsandbytes has quantised, the adapter's default are its 16-bit weights.
        data, split: pairs to compare log-probabilities over, as in `DataArguments`. Default: ten short ones.
        dtype: of the weights, as in `ModelArguments`; 'auto' for that of the base.
        device: torch's name of the device that holds the model; by default the CPU.
        trust_remote_code: run code that comes with the base.

    Returns:
        How log-probabilities have changed.

    Raises:
        ValueError, OSError: for what the user can fix.
        MergeError: where the merged model differs by more than rounding; no folder is left.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    where = torch_device(device or "cpu")
    base, revision = _base_to_load(adapter, base, trust_remote_code)
    tokenizer = _load_tokenizer(adapter, base, revision, trust_remote_code)
    with new_folder(output) as folder:
        config = load_config(base, revision, trust_remote_code)
        pairs = _pairs(tokenizer, data, split, config)
        _say(f"Loading {base} and the adapter {adapter}")
        model, dtypes = _load(adapter, base, revision, tokenizer, dtype, where, trust_remote_code)
        with model.disable_adapter():
            of_base = _logps(model, pairs, "Base")
        before = _logps(model, pairs, "Adapter")
        merged = _merge(model, dtypes)
        del model
        _settle_generation(merged, tokenizer)
        try:
            # The original format of unpacked weights is that of 4 bits, which is not made again.
            merged.save_pretrained(folder, save_original_format=not _quantisation(config))
            tokenizer.save_pretrained(folder)
        except Exception as error:
            if not is_write_error(error):
                raise
            raise OSError(f"{output}: the model could not be written: {error}") from error
        write_merged_card(folder, model_name=output.name, adapter=adapter, base_model=base)
        of_type = merged.dtype
        del merged  # two models at a time would take twice the memory
        gc.collect()
        after = _logps(_load_merged(folder, where, trust_remote_code), pairs, "Merged")
        found = compare(of_base, before, after, of_type)
        sync_files(folder)
    return found


def compare(base: list[float], before: list[float], after: list[float], dtype: torch.dtype) -> Comparison:
    """Compare mean token log-probabilities of the same responses.

    Raises:
        MergeError: where they differ by more than rounding explains, or one is not finite.
    """
    differences = [abs(one - other) for one, other in zip(before, after, strict=True)]
    shares = [difference / max(1.0, abs(one)) for difference, one in zip(differences, before, strict=True)]
    worst = max(range(len(shares)), key=lambda index: shares[index] if math.isfinite(shares[index]) else math.inf)
    effect = max(abs(one - other) for one, other in zip(base, before, strict=True))
    allowed = ROUNDING[dtype] * max(1.0, abs(before[worst]))
    if not shares[worst] <= ROUNDING[dtype]:
        raise MergeError(
            f"The merged model is not base and adapter: a mean token log-probability of {before[worst]:.4f} has become "
            f"{after[worst]:.4f}; expected a difference of at most {allowed:.1g} ({_word(dtype)}). Nothing is kept."
        )
    return Comparison(len(before), effect, max(differences), allowed)


def describe(found: Comparison, output: Path, dtype: str) -> str:
    """What the check has found, and what to do next, as text for people."""
    lines = [
        f"Log-probabilities of {found.responses:,} responses: the adapter changes them by up to {found.effect:.4f}, "
        f"the merge by up to {found.difference:.1g} (rounding explains {found.allowed:.1g})."
    ]
    if found.effect <= found.allowed:
        lines.append(
            "The adapter changes less than rounding does, so that the comparison says little"
            + ("." if dtype == "float32" else "; `--dtype float32` says more.")
        )
    lines.append(f"Next: orpo-trl generate {output} PROMPTS -o answers.json, or vllm serve {output}")
    return "\n".join(lines)


# ---- What to load ----------------------------------------------------------------------------------------------------


def _base_to_load(adapter: str, given: str | None, trust_remote_code: bool) -> tuple[str, str]:
    """The base model and its revision. Config, adapter and remote code are looked at before any weights are loaded."""
    require_files(adapter)
    arguments = ModelArguments(model_name_or_path=adapter)
    try:
        file = adapter_config_file(arguments)
    except OSError:
        file = None
    if file is None:
        require_model(arguments, trust_remote_code)  # raises where there is nothing of this name
        raise ValueError(f"{adapter!r} is a whole model, and no adapter: there is nothing to merge.")
    refuse_pickled_adapter(adapter)
    named, revision = base_of(Path(file))
    base = given or _QUANTISED_NAME.sub("", named)
    revision = revision if revision is not None and base == named else "main"
    try:
        require_model(ModelArguments(model_name_or_path=base, model_revision=revision), trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{error}\nThe base model of {adapter!r} can be named with --base.") from error
    method = _quantisation(load_config(base, revision, trust_remote_code))
    if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"The weights of {base!r} are quantised, which needs bitsandbytes: pip install 'orpo-trl[quant]'; or name "
            "its 16-bit weights with --base."
        )
    if method not in ("", "bitsandbytes"):
        raise ValueError(f"The weights of {base!r} are quantised ({method}). Name its 16-bit weights with --base.")
    return base, revision


def _quantisation(config: PreTrainedConfig) -> str:
    """The method by which a model's stored weights are quantised; '' where they are not."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))


def _load_tokenizer(adapter: str, base: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer, since training may have changed it, or that of the base."""
    try:
        return load_tokenizer(ModelArguments(model_name_or_path=adapter), trust_remote_code)
    except (OSError, ValueError):
        _say(f"The adapter has no tokenizer; that of {base} is taken.")
        return load_tokenizer(ModelArguments(model_name_or_path=base, model_revision=revision), trust_remote_code)


def _pairs(tokenizer: PreTrainedTokenizerBase, data: str | None, split: str, config: PreTrainedConfig) -> Dataset:
    """Prepared pairs to compare over, cut to what the model reads."""
    limit = min(getattr(config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH, _MAX_LENGTH)
    if data is None:
        rows: Any = Dataset.from_list(
            [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in _TEXTS]
        )
        return prepare_pairs(rows, tokenizer, PairRules(), "built-in")[0]
    rows = load_pairs(DataArguments(dataset_name=data, dataset_train_split=split), with_test=False)[0]
    pairs, report = prepare_pairs(cast(Dataset, rows), tokenizer, PairRules(max_length=limit), split)
    _say(str(report))
    return pairs


# ---- The models ------------------------------------------------------------------------------------------------------


def _load(
    adapter: str,
    base: str,
    revision: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: torch.device,
    trusted: bool,
) -> tuple[Any, dict[str, torch.dtype]]:
    """The adapter on its base in 32 bits, in evaluation mode, and the type of each of the base's weights."""
    from peft import PeftModelForCausalLM

    with naming("weights", base):
        model = AutoModelForCausalLM.from_pretrained(
            base, revision=revision, dtype=dtype, device_map={"": device}, use_safetensors=True,
            trust_remote_code=trusted,
        )  # fmt: skip
        if _quantisation(model.config):
            model = cast(PreTrainedModel, model.dequantize())
    if len(tokenizer) > cast(Any, model.get_input_embeddings()).weight.shape[0]:  # tokens that training has added
        model.resize_token_embeddings(len(tokenizer))
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    model = _in_32_bits(model)
    with naming("adapter", adapter), warnings.catch_warnings():
        warnings.filterwarnings("error", MISSING_ADAPTER_KEYS)
        try:
            loaded = PeftModelForCausalLM.from_pretrained(model, adapter)
        except UserWarning as error:
            raise ValueError(f"The adapter {adapter!r} has not all of its weights. {error!s:.300}") from error
    if loaded.active_peft_config.is_prompt_learning:
        kind = type(loaded.active_peft_config).__name__
        raise ValueError(f"{adapter!r} puts virtual tokens before the prompt ({kind}), which no weights can stand for.")
    return loaded.eval(), dtypes


def _merge(model: Any, dtypes: dict[str, torch.dtype]) -> PreTrainedModel:
    """The plain model, with weights of the types of the base."""
    plain = model.get_base_model()
    for layer in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        # Tied weights are one tensor. An adapter on one of the two layers changes that layer alone.
        weight = getattr(getattr(layer, "base_layer", None), "weight", None)
        if weight is not None and plain.config.get_text_config().tie_word_embeddings:
            layer.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    merged = model.merge_and_unload(progressbar=sys.stderr.isatty())
    usual = next(iter(dtypes.values()))  # of a head that is no longer tied
    for name, weight in merged.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtypes.get(name, usual))
    _settle_tying(merged)
    return merged


def _settle_tying(model: PreTrainedModel) -> None:
    """Embeddings and LM head that training has made different are no longer tied: the config must say so, because
    loading would throw one of them away."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    text_config: Any = model.config.get_text_config()
    if head is None or not text_config.tie_word_embeddings or torch.equal(head.weight, embeddings.weight):
        return
    for config in {id(config): config for config in (model.config, text_config)}.values():
        config.tie_word_embeddings = False


def _settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let answers end where the tokenizer's conversations do, besides where those of the base end."""
    config = model.generation_config
    if config is None or tokenizer.eos_token_id is None:
        return
    of_base = config.eos_token_id
    of_base = of_base if isinstance(of_base, list) else [] if of_base is None else [of_base]
    stops = list(dict.fromkeys([cast(int, tokenizer.eos_token_id), *of_base]))
    config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id


def _load_merged(folder: Path, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    with naming("weights", str(folder)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    return _in_32_bits(model).eval()


def _in_32_bits(model: Any) -> Any:
    """The model with weights of 32 bits, where they have fewer: their values stay."""
    return model.float() if model.dtype.itemsize < torch.float32.itemsize else model


@torch.inference_mode()
def _logps(model: Any, pairs: Dataset, what: str) -> list[float]:
    """Mean token log-probabilities of all responses, one row at a time.

    Plain forward passes with logits, and not `score_pairs`: its fused head does not see an adapter on the LM head, and
    what the check compares should hang on as little as possible.
    """
    found = []
    for pair in tqdm(cast(Any, pairs), desc=what, leave=False, disable=not sys.stderr.isatty()):
        for response in _responses(pair):
            ids = torch.tensor([pair["prompt_ids"] + response], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
            logps = logits.double().log_softmax(-1).gather(-1, ids[0, -len(response) :, None])
            found.append(logps.mean().item())
    return found


def _responses(pair: dict) -> Iterator[list[int]]:
    return (pair[f"{side}_ids"] for side in ("chosen", "rejected") if pair[f"{side}_ids"] is not None)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)
