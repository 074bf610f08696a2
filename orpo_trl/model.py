"""The model and tokenizer that a recipe names, and what training changes in a model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orpo_trl.config import ModelArguments
from orpo_trl.upstream import disable_dropout_in_model

# Modules that call `F.dropout` keep its probability as a plain number under one of these names (OPT: `dropout`;
# attention layers of most models: `attention_dropout`).
_FUNCTIONAL_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def load_tokenizer(arguments: ModelArguments, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_name_or_path`, by default the model's."""
    own = arguments.tokenizer_name_or_path is None
    return AutoTokenizer.from_pretrained(
        arguments.model_name_or_path if own else arguments.tokenizer_name_or_path,
        revision=arguments.model_revision if own else None,
        trust_remote_code=trust_remote_code,
    )


def model_init_kwargs(arguments: ModelArguments) -> dict:
    """Keyword arguments of `from_pretrained` that the model arguments stand for."""
    kwargs = {"revision": arguments.model_revision, "dtype": arguments.dtype}
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    return kwargs


def build_from_scratch(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights from the config at `model_name_or_path`; seed the generators first.

    Raises:
        ValueError: where the config's vocabulary is smaller than the tokenizer's.
    """
    config = AutoConfig.from_pretrained(arguments.model_name_or_path, revision=arguments.model_revision)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but `vocab_size` of the config at "
            f"{arguments.model_name_or_path!r} is {config.get_text_config().vocab_size}."
        )
    dtype = None if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype)
    kwargs = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of the model to 0: the modules, and the probabilities that layers hand to `F.dropout`."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name in _FUNCTIONAL_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
