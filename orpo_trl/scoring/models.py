"""The model and tokenizer to score with: a Hub id or a folder, of a model or of a PEFT adapter."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from orpo_trl.config import ModelArguments
from orpo_trl.model import load_config, load_tokenizer, model_init_kwargs, model_name, naming, settle_tokenizer
from orpo_trl.plain_files import read_text
from orpo_trl.upstream import find_adapter_config_file, is_peft_available
from orpo_trl.weights import UnsafeWeights, refuse_pickled_adapter, refuse_pickles


def require_model(arguments: ModelArguments, trust_remote_code: bool = False) -> None:
    """Reads the config of the model, or of the model that an adapter is for.

    Raises:
        ValueError: if there is no such model, or if it is an adapter and peft is not installed.
    """
    name, revision = model_name(arguments), arguments.model_revision
    require_files(name)
    try:
        adapter = adapter_config_file(arguments)
        if adapter is not None:
            name, revision = base_of(Path(adapter))
            refuse_pickles(name)
        load_config(name, revision, trust_remote_code=trust_remote_code)
    except UnsafeWeights:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"The model {name!r} could not be loaded: {error}") from error


def require_files(name: str) -> None:
    """Looks at the files of a model or an adapter, where the name is one of a folder.

    Raises:
        ValueError: if there is no such folder, or its weights are no safetensors.
    """
    if name.startswith((".", "/")) and not Path(name).exists():
        raise ValueError(f"The model {name!r} does not exist (looked for {Path(name).resolve()}).")
    refuse_pickles(name)


def load_model(arguments: ModelArguments, device: torch.device, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model on a device, in evaluation mode.

    peft loads adapters: the loader of transformers leaves out the magnitudes of DoRA.

    Raises:
        ValueError, OSError: if the weights cannot be loaded.
    """
    with naming("weights", model_name(arguments)):
        return _load_model(arguments, device, trust_remote_code)


def _load_model(arguments: ModelArguments, device: torch.device, trust_remote_code: bool) -> torch.nn.Module:
    options = {"dtype": arguments.dtype, "device_map": {"": device}, "trust_remote_code": trust_remote_code}
    if adapter_config_file(arguments) is None:
        options = model_init_kwargs(arguments) | options
        return AutoModelForCausalLM.from_pretrained(model_name(arguments), **options).eval()
    from peft import AutoPeftModelForCausalLM

    refuse_pickled_adapter(model_name(arguments))
    return AutoPeftModelForCausalLM.from_pretrained(model_name(arguments), use_safetensors=True, **options).eval()


def load_scoring_tokenizer(
    arguments: ModelArguments, chat_template_path: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the arguments, with the chat template of a .jinja file or of another tokenizer.

    Raises:
        ValueError: if there is no tokenizer, or the template's end-of-sequence token is not in its vocabulary.
        FileNotFoundError: if the template's file does not exist.
    """
    try:
        tokenizer = load_tokenizer(arguments, trust_remote_code)
    except (OSError, ValueError) as error:
        name = arguments.tokenizer_name_or_path or arguments.model_name_or_path
        problem = f"{name!r} has no tokenizer that can be loaded. Name one with --tokenizer."
        raise ValueError(f"{problem}\n{error}") from error
    settle_tokenizer(tokenizer, chat_template_path=chat_template_path, may_add_tokens=False)
    return tokenizer


def base_of(adapter_config: Path) -> tuple[str, str | None]:
    """Hub id or folder of the model that an adapter is for, and its revision, from its `adapter_config.json`.

    Raises:
        ValueError: if the file does not name one.
    """
    found = json.loads(read_text(adapter_config))
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(base, str):
        raise ValueError(f"{adapter_config}: expected the adapter's `base_model_name_or_path`, received {base!r:.60}")
    return base, found.get("revision")


def adapter_config_file(arguments: ModelArguments) -> str | None:
    """The file that says what an adapter is; None of a model that is none.

    Raises:
        ValueError: if it is an adapter and peft is not installed.
    """
    found = find_adapter_config_file(model_name(arguments), revision=arguments.model_revision)
    if found is not None and not is_peft_available():
        raise ValueError(
            f"The model {arguments.model_name_or_path!r} is an adapter, which needs peft: pip install 'orpo-trl[peft]'"
        )
    return found
