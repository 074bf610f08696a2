"""The model and tokenizer that a recipe names, and what training changes in a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from orpo_trl.config import ModelArguments
from orpo_trl.plain_files import read_text
from orpo_trl.upstream import disable_dropout_in_model

# Modules that call `F.dropout` keep its probability as a plain number under one of these names: `dropout` in OPT,
# `attention_dropout` in the attention layers of most models.
_FUNCTIONAL_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


@contextmanager
def naming(what: str, name: str) -> Iterator[None]:
    """Around the loading of a model's part, whose files may be damaged in any way.

    Raises:
        ValueError: naming the part and the model, where the libraries' own error does not, or where the part comes with
            code that nobody has allowed to run.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code=True" in str(error):
            raise ValueError(
                f"The {what} of {name!r} comes with code of its own, which is not run. Read it first; "
                "`trust_remote_code: true` runs it."
            ) from error
        if isinstance(error, (OSError, ValueError, ImportError)):
            raise
        text = str(error).partition("\nException raised from")[0]  # then torch lists its C++ functions
        raise ValueError(f"The {what} of {name!r} cannot be loaded: {type(error).__name__}: {text}") from error


def model_name(arguments: ModelArguments) -> str:
    """`model_name_or_path`, which every recipe sets.

    Raises:
        ValueError: if it is not set.
    """
    if arguments.model_name_or_path is None:
        raise ValueError("set `model_name_or_path` to a Hub id or a folder")
    return arguments.model_name_or_path


def load_tokenizer(arguments: ModelArguments, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_name_or_path`. Default: the model's own.

    For training it is complete: SFTTrainer itself does what `settle_tokenizer` does.
    """
    own = arguments.tokenizer_name_or_path or model_name(arguments)
    revision = arguments.model_revision if arguments.tokenizer_name_or_path is None else None
    with naming("tokenizer", own):
        return AutoTokenizer.from_pretrained(own, revision=revision, trust_remote_code=trust_remote_code)


def settle_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    eos_token: str | None = None,
    chat_template_path: str | None = None,
    may_add_tokens: bool = True,
) -> int:
    """Change a tokenizer as SFTTrainer does when it is made.

    Args:
        tokenizer: is changed.
        eos_token: a token of its vocabulary, which becomes its end-of-sequence token.
        chat_template_path: a .jinja file, or another tokenizer. Of the other tokenizer come the chat template, the
            end-of-sequence token, and the tokens that this one lacks.
        may_add_tokens: False if the model's embeddings stay as they are. No token is then added, and the other
            tokenizer's end-of-sequence token must be in the vocabulary.

    Returns:
        How many tokens are added.

    Raises:
        ValueError: if an end-of-sequence token is not in the vocabulary.
        FileNotFoundError: if the template's file does not exist.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"`eos_token: {eos_token}` is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = eos_token
    if chat_template_path is None:
        return 0
    if chat_template_path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = read_template(chat_template_path)
        return 0
    source = load_template_source(chat_template_path)
    vocabulary = tokenizer.get_vocab()
    if not may_add_tokens and source.eos_token not in vocabulary:
        raise ValueError(
            f"`chat_template_path`: conversations of {chat_template_path!r} end with {source.eos_token!r}, which is no "
            f"token of {tokenizer.name_or_path!r}."
        )
    added = [token for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    added = added if may_add_tokens else []
    tokenizer.add_tokens(added)
    tokenizer.chat_template, tokenizer.eos_token = source.get_chat_template(), source.eos_token
    return len(added)


def read_template(name: str) -> str:
    """The text of a .jinja file.

    Raises:
        FileNotFoundError, ValueError: naming the file that cannot be read.
    """
    try:
        return read_text(Path(name))
    except FileNotFoundError:
        raise FileNotFoundError(f"`chat_template_path`: the file {name!r} does not exist.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"`chat_template_path`: expected UTF-8 text in {name!r}, received: {error}") from error


def load_template_source(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a chat template is taken from; its code is never run, and nobody is asked whether to.

    Raises:
        ValueError, OSError: where it cannot be loaded, or needs code of its own.
    """
    with naming("tokenizer", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_processor(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of a model, or the processor that holds it: for a trainer that is given neither."""
    with naming("tokenizer", name):
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    with naming("config", name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def model_init_kwargs(arguments: ModelArguments) -> dict:
    """The model arguments as keyword arguments of `from_pretrained`. Weights are read from safetensors alone."""
    kwargs: dict[str, Any] = {
        "revision": arguments.model_revision, "dtype": arguments.dtype, "use_safetensors": True,
    }  # fmt: skip
    if arguments.attn_implementation is not None:
        kwargs["attn_implementation"] = arguments.attn_implementation
    return kwargs


def build_from_scratch(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with random weights from the config at `model_name_or_path`; seed the generators first.

    Raises:
        ValueError: if the config's vocabulary is smaller than the tokenizer's.
    """
    config = load_config(model_name(arguments), arguments.model_revision, trust_remote_code)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but `vocab_size` of the config at "
            f"{arguments.model_name_or_path!r} is {config.get_text_config().vocab_size}."
        )
    dtype = None if arguments.dtype in (None, "auto") else getattr(torch, arguments.dtype)
    kwargs = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of the model to 0: in modules, and in the probabilities that layers pass to `F.dropout`."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name in _FUNCTIONAL_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
