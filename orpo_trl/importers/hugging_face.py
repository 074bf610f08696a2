"""TRL's `--config` files and alignment-handbook's recipes, whose script runs TRL's ORPOTrainer.

Keys: trl.experimental.orpo.ORPOConfig, trl.ScriptArguments and trl.ModelConfig; the handbook's src/alignment/configs.py
and data.py, in its older form (`dataset_mixer`) and its newer one (`dataset_mixture`).
"""

import hashlib
from typing import Any

from orpo_trl.importers.conversions import TRL_OBJECTIVE, convert_shared, labelled, set_datasets
from orpo_trl.importers.draft import Draft, Tool
from orpo_trl.importers.foreign_keys import CONVERTED, DROPPED, RENAMED
from orpo_trl.pairs.columns import ROW_COLUMNS

_RENAMED = {"streaming": "dataset_streaming"}
_TRL_CONVERTED = {
    "beta": ("beta", ""),
    "max_prompt_length": ("max_prompt_length", ""),
}
_TRL_DROPPED = {
    "env": "set the environment variables where the run starts",
    "ignore_bias_buffers": "no attention buffers are ignored",
    "model_code_revision": "`model_revision` is that of the code too",
    "precompute_ref_log_probs": "ORPO has no reference model",
    "config": "a recipe is one file; `extends` names a parent",
}
_HANDBOOK_CONVERTED = {
    "chat_template": ("chat_template_path", "a .jinja file; unset, the tokenizer's own"),
    "dataset_mixer": ("datasets", "each with `path`, and `weight` for its share"),
    "dataset_splits": ("dataset_train_split", "and dataset_test_split"),
    "dataset_configs": ("dataset_config", "or `name` of each entry of `datasets`"),
    "dataset_mixture": ("datasets", "each with `path`, `name`, `split`, `columns`, `weight`"),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "auto_insert_empty_system_msg": (None, "no turn is added to a conversation"),
}
_HANDBOOK_DROPPED = {
    "text_column": DROPPED["dataset_text_field"],
    "truncation_side": DROPPED["truncation_mode"],
    "base_model_revision": "an adapter to go on from; merge it into the model first",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "wandb_run_group": "set the environment variable WANDB_RUN_GROUP",
    "benchmarks": "no benchmark runs beside the training",
    "callbacks": "the handbook's callbacks do not run here",
    "system_prompt": "no turn is added; write it into the rows or the template",
}
# SHA-256 of the template of the authors and of the handbook's ORPO recipes, without white space.
_AUTHORS_TEMPLATE = "8705a1897ece1a1b355e1f4d36687f331d6680f5d897d1ae314b3fc506e136b8"
# Keys of TRL's other trainers that its ORPOTrainer does not have.
_OTHERS = {
    "loss_type": "DPO's",
    "precompute_ref_log_probs": "DPO's",
    "ref_model_init_kwargs": "DPO's",
    "desirable_weight": "KTO's",
    "cpo_alpha": "CPO's",
    "max_seq_length": "SFT's",
    "dataset_text_field": "SFT's",
    "completion_only_loss": "SFT's",
    "num_generations": "GRPO's",
}


def _check(values: dict[str, Any]) -> str | None:
    others = [f"`{key}`, a key of {whose}" for key, whose in _OTHERS.items() if values.get(key) is not None]
    if others:
        return f"expected a config of TRL's ORPOTrainer, found {' and '.join(others)}"
    if values.get("beta") is None:
        return (
            "expected `beta`, ORPO's weight (TRL's default is 0.1; write it to say that this is ORPO), found no `beta`"
        )
    return None


def _convert_trl(draft: Draft) -> None:
    draft.set("beta", draft.number("beta", 0.1), "beta")
    draft.set("nll_scope", "sequence", why=TRL_OBJECTIVE)
    draft.set("nll_reduction", "micro_batch_mean", why=TRL_OBJECTIVE)
    draft.differs(
        "TRL's NLL covers prompt and chosen response, as a mean over the tokens of each micro-batch and then over "
        "micro-batches: `nll_reduction: micro_batch_mean` does the same. `token_mean` does not depend on how a batch "
        "is split."
    )
    draft.differs(
        "TRL appends an end-of-sequence token to a response that does not end in one; here conversations end as the "
        "chat template ends them."
    )
    sources = draft.settings.get("datasets")
    if isinstance(sources, list):
        draft.settings["datasets"] = [
            _choose_columns(draft, entry, "datasets", index) for index, entry in enumerate(sources)
        ]
    if draft.has("max_prompt_length"):
        draft.set("max_prompt_length", draft.number("max_prompt_length"), "max_prompt_length")
        draft.differs(
            "max_prompt_length: TRL cuts the prompt of a pair above max_length to this many tokens, by default at its "
            "start; here a row whose prompt has this many tokens or more is dropped.",
            "max_prompt_length",
        )
    if "max_length" in draft.config.values and not draft.has("max_length"):
        draft.default("max_length", 512, "what `max_length: null` means to TRL")
    draft.differs(
        "max_length: where the prompt alone fills a row, TRL trains on an empty response; here the row is dropped.",
        "max_length" if draft.has("max_length") else None,
    )
    convert_shared(draft)
    draft.default("learning_rate", 1.0e-6)


def _convert_handbook(draft: Draft) -> None:
    if draft.flag("use_flash_attention_2"):
        draft.set("attn_implementation", "flash_attention_2", "use_flash_attention_2")
    draft.silent("use_flash_attention_2")
    _convert_template(draft)
    _convert_trl(draft)
    evaluates = draft.settings.get("eval_strategy", "no") != "no"
    if draft.has("dataset_mixer"):
        _convert_mixer(draft, evaluates)
        draft.differs(
            "The handbook's older script drops rows whose text holds a HumanEval prompt; here such rows are kept.",
            "dataset_mixer",
        )
        if draft.take("auto_insert_empty_system_msg", bool, "true or false", True):
            draft.differs(
                "The handbook's older script puts an empty system turn before a conversation without one, where the "
                "template knows system turns; here no turn is added.",
                "auto_insert_empty_system_msg" if draft.has("auto_insert_empty_system_msg") else None,
            )
    elif draft.has("dataset_mixture"):
        _convert_mixture(draft, evaluates)
    for key in ("dataset_splits", "dataset_configs"):
        if not draft.has("dataset_mixer") and draft.has(key):
            draft.drop(key, "it only has a meaning beside `dataset_mixer`")
    draft.silent("auto_insert_empty_system_msg")


def _convert_template(draft: Draft) -> None:
    template = draft.take("chat_template", str, "a template")
    if template is None:
        return
    bare = "".join(template.replace("\\n", "").split())
    if hashlib.sha256(bare.encode()).hexdigest() == _AUTHORS_TEMPLATE:
        draft.set("chat_template_path", "recipes/templates/orpo.jinja", "chat_template", why="the same template")
    else:
        draft.drop(
            "chat_template",
            "a recipe holds no template: write it to a .jinja file, and name that in `chat_template_path`; until then "
            "the tokenizer's own is used",
        )


def _convert_mixer(draft: Draft, evaluates: bool) -> None:
    mixer = draft.take("dataset_mixer", dict, "a mapping of datasets to proportions", {})
    splits = draft.take("dataset_splits", list, "a list of splits", ["train", "test"])
    configs = draft.take("dataset_configs", list, "a list with a configuration for each dataset", [None] * len(mixer))
    if len(configs) != len(mixer):
        draft.config.fail("dataset_configs", f"expected {len(mixer)} configurations, received {len(configs)}")
    sources = [{"path": path} | ({"name": name} if name else {}) for path, name in zip(mixer, configs, strict=True)]
    train = [
        source | ({"split": split} if split != "train" else {}) | ({"weight": share} if share != 1 else {})
        for (source, share) in zip(sources, mixer.values(), strict=True)
        for split in splits
        if "train" in str(split)
    ]
    test = [source | {"split": split} for source in sources for split in splits if "test" in str(split)]
    if not train:
        draft.config.fail("dataset_splits", f"expected a split named train, received {splits}")
    keys = ("dataset_mixer", "dataset_splits", "dataset_configs")
    set_datasets(draft, train, *keys)
    if test and evaluates:
        one = "dataset_name" in draft.settings and len(test) == 1
        if one:
            draft.set("dataset_test_split", test[0]["split"], "dataset_splits")
        else:
            draft.set("eval_datasets", labelled(test), *keys)
    draft.silent(*keys)
    if any(share != 1 for share in mixer.values()):
        draft.differs(
            "A proportion in dataset_mixer takes that share of a dataset's rows, the first rows; `weight` takes random "
            "rows.",
            "dataset_mixer",
        )


def _choose_columns(draft: Draft, entry: Any, *place: Any) -> Any:
    """A source, `place` in the config, with those of its `columns` that a pair is read from: the others were for a step
    of the user's own."""
    columns = entry.get("columns") if isinstance(entry, dict) else None
    if not isinstance(columns, list):
        return entry
    others = [f"`{column}`" for column in columns if column not in ROW_COLUMNS]
    if others:
        key, *path = place
        draft.drop(key, f"no pair is read from {', '.join(others)}", (*path, "columns"))
    return {**entry, "columns": [column for column in columns if column in ROW_COLUMNS]}


def _convert_mixture(draft: Draft, evaluates: bool) -> None:
    mixture = draft.take("dataset_mixture", dict, "a mapping with `datasets`", {})
    names = {"id": "path", "config": "name", "split": "split", "columns": "columns", "weight": "weight"}
    entries = []
    for index, theirs in enumerate(mixture.get("datasets") or []):
        if not isinstance(theirs, dict) or not theirs.get("id"):
            draft.config.fail(
                "dataset_mixture", f"expected a mapping with `id` for each dataset, received {theirs!r:.60}"
            )
        entry = {names[name]: value for name, value in theirs.items() if name in names and value is not None}
        entries.append(_choose_columns(draft, entry, "dataset_mixture", "datasets", index))
        for name in theirs:
            if name not in names:
                draft.drop("dataset_mixture", "left out", ("datasets", index, name))
    if not entries:
        draft.config.fail("dataset_mixture", "expected a list `datasets`, found none")
    set_datasets(draft, entries, "dataset_mixture")
    for name, value in mixture.items():
        if name == "test_split_size" and value is not None and evaluates:
            draft.set("test_split_size", value, "dataset_mixture")
        elif name == "seed":
            draft.drop("dataset_mixture", "`seed` decides which rows are drawn and held out", ("seed",))
        elif name != "datasets" and value is not None:
            why = "nothing is evaluated, because `eval_strategy` is no" if name == "test_split_size" else "left out"
            draft.drop("dataset_mixture", why, (name,))


TRL = Tool(
    id="trl",
    name="TRL",
    renamed={**RENAMED, **_RENAMED},
    converted={**CONVERTED, **_TRL_CONVERTED},
    dropped={**DROPPED, **_TRL_DROPPED},
    switches=frozenset(
        "remove_unused_columns do_train do_eval do_predict overwrite_output_dir ignore_bias_buffers "
        "bf16_full_eval fp16_full_eval is_encoder_decoder".split()
    ),
    convert=_convert_trl,
    check=_check,
)
HANDBOOK = Tool(
    id="alignment_handbook",
    name="alignment-handbook",
    renamed={**RENAMED, **_RENAMED, "preprocessing_num_workers": "dataset_num_proc"},
    converted={**CONVERTED, **_TRL_CONVERTED, **_HANDBOOK_CONVERTED},
    dropped={**DROPPED, **_TRL_DROPPED, **_HANDBOOK_DROPPED},
    switches=TRL.switches,
    convert=_convert_handbook,
    check=_check,
)
