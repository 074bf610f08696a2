"""The model and tokenizer to evaluate, by the name of a Hub id or a folder, which may be a PEFT adapter's."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_peft_available

from orpo_trl.config import ModelArguments
from orpo_trl.model import load_tokenizer, model_init_kwargs


def find_device(name: str | None = None) -> torch.device:
    """The device of that name, by default the accelerator of this machine, or its CPU where it has none.

    Raises:
        ValueError: where torch cannot use it.
    """
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ValueError(f"--device: torch cannot use {name!r}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def require_model(arguments: ModelArguments, trust_remote_code: bool = False) -> None:
    """Reads the config of the model, or of the model that an adapter is for.

    Raises:
        ValueError: where there is no such model; or it is an adapter, and peft is not installed.
    """
    name = arguments.model_name_or_path
    if name.startswith((".", "/")) and not Path(name).exists():
        raise ValueError(f"The model {name!r} does not exist (looked for {Path(name).resolve()}).")
    try:
        adapter = _adapter_config_file(arguments)
        if adapter is not None:
            name = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name!r} could not be loaded: {error}") from error


def load_model(arguments: ModelArguments, device: torch.device, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model on a device, in evaluation mode.

    An adapter is loaded by peft: transformers' own loader leaves out the magnitudes of DoRA.

    Raises:
        ValueError, OSError: where the weights cannot be loaded.
    """
    options = {"dtype": arguments.dtype, "device_map": {"": device}, "trust_remote_code": trust_remote_code}
    if _adapter_config_file(arguments) is None:
        options = model_init_kwargs(arguments) | options
        return AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, **options).eval()
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(arguments.model_name_or_path, **options).eval()


def load_tokenizer_for(
    arguments: ModelArguments, chat_template_path: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the arguments, with the chat template of a .jinja file, or of another tokenizer.

    Raises:
        ValueError: where there is no tokenizer, or the template's end-of-sequence token is not in its vocabulary.
        FileNotFoundError: where the template's file does not exist.
    """
    name = arguments.tokenizer_name_or_path or arguments.model_name_or_path
    try:
        tokenizer = load_tokenizer(arguments, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} has no tokenizer that can be loaded. Name one with --tokenizer.\n{error}"
        ) from error
    if chat_template_path is None:
        return tokenizer
    if chat_template_path.endswith((".jinja", ".j2")):
        if not Path(chat_template_path).is_file():
            raise FileNotFoundError(f"--chat_template_path: the file {chat_template_path!r} does not exist.")
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        return tokenizer
    source = AutoTokenizer.from_pretrained(chat_template_path)
    if source.eos_token not in tokenizer.get_vocab():
        raise ValueError(
            f"--chat_template_path: conversations of {chat_template_path!r} end with {source.eos_token!r}, which is no "
            f"token of {name!r}."
        )
    tokenizer.chat_template, tokenizer.eos_token = source.get_chat_template(), source.eos_token
    return tokenizer


def _adapter_config_file(arguments: ModelArguments) -> str | None:
    found = find_adapter_config_file(arguments.model_name_or_path, revision=arguments.model_revision)
    if found is not None and not is_peft_available():
        raise ValueError(
            f"The model {arguments.model_name_or_path!r} is an adapter, which needs peft: pip install 'orpo-trl[peft]'"
        )
    return found
