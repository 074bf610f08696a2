"""Models, pairs and settings that are small enough to train in a test. Nothing comes from the Hub."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from orpo_trl import ORPOConfig

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOKENIZER = REPOSITORY / "recipes" / "quickstart" / "model"
WORDS = "time year people way day man thing woman life child world school state family student group".split()


def tiny_model(vocabulary: int = 768, seed: int = 0, **kwargs) -> MistralForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "initializer_range": 0.1,
        "pad_token_id": None,
    }
    return MistralForCausalLM(MistralConfig(**{**settings, **kwargs}))


def save_model(folder: Path, seed: int = 0, **kwargs) -> Path:
    """Saves a tiny model and the quickstart's tokenizer in a folder, and returns the folder."""
    tiny_model(seed=seed, **kwargs).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def make_rows(count: int, nll_only_every: int | None = None, seed: int = 0) -> list[dict]:
    """Rows of text of very uneven lengths. Every `nll_only_every`-th row has no rejected response."""
    generator = torch.Generator().manual_seed(seed)

    def text(longest: int) -> str:
        size = int(torch.randint(1, longest, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=generator))

    rows = [{"prompt": text(20) + ":", "chosen": " " + text(30), "rejected": " " + text(12)} for _ in range(count)]
    if nll_only_every:
        for row in rows[::nll_only_every]:
            row["rejected"] = None
    return rows


def make_dataset(count: int, **kwargs) -> Dataset:
    return Dataset.from_list(make_rows(count, **kwargs))


def settings(output_dir, **kwargs) -> ORPOConfig:
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_first_step": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2,
    }
    return ORPOConfig(output_dir=str(output_dir), **{**defaults, **kwargs})
