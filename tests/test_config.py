import dataclasses

import pytest
import torch
from trl import SFTConfig
from trl.experimental.orpo import ORPOConfig as TRLConfig

from orpo_trl import ORPOConfig


def test_takes_every_argument_of_trl_with_its_default(tmp_path):
    own = {f.name: f for f in dataclasses.fields(ORPOConfig)}
    trl = {f.name: f for f in dataclasses.fields(TRLConfig)}
    assert set(trl) <= set(own)
    differing = {name for name in trl if own[name].default != trl[name].default}
    # None stands for 1, and lets `global_batch_size` decide; and for on, and lets a CPU's memory decide.
    assert differing == {
        "learning_rate", "logging_nan_inf_filter", "train_sampling_strategy", "gradient_accumulation_steps",
        "gradient_checkpointing", "logging_first_step",
    }  # fmt: skip


def test_what_is_not_set_is_decided_by_the_device(tmp_path):
    """This suite runs on a CPU, and `use_cpu` makes one of a machine with a GPU."""
    open_ = ORPOConfig(str(tmp_path), use_cpu=True)
    assert (open_.bf16, open_.gradient_checkpointing, open_.is_checkpointing_open) == (False, True, True)
    asked = ORPOConfig(str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=True)
    assert (asked.bf16, asked.gradient_checkpointing, asked.is_checkpointing_open) == (True, True, False)
    assert not ORPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=False).is_checkpointing_open
    if hasattr(asked, "activation_checkpointing"):  # its newer name
        renamed = ORPOConfig(str(tmp_path), use_cpu=True, activation_checkpointing=False)
        assert (renamed.gradient_checkpointing, renamed.is_checkpointing_open) == (False, False)


def test_learning_rate_is_the_papers(tmp_path):
    assert ORPOConfig(str(tmp_path)).learning_rate == 5e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packing", True),
        ("packing_strategy", "wrapped"),
        ("eval_packing", True),
        ("padding_free", True),
        ("completion_only_loss", True),
        ("assistant_only_loss", True),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
        ("dataset_text_field", "content"),
        ("dataset_kwargs", {"skip_prepare_dataset": True}),
        ("truncation_mode", "keep_end"),
        ("average_tokens_across_devices", False),
        ("label_names", ["labels"]),
        ("include_for_metrics", ["inputs"]),
        ("batch_eval_metrics", True),
        ("eval_do_concat_batches", False),
        ("length_column_name", "len"),
        ("logging_nan_inf_filter", True),
        ("accelerator_config", {"dispatch_batches": True}),
        ("is_encoder_decoder", True),
        ("accelerator_config", {"split_batches": True}),
    ],
)
def test_argument_without_meaning_is_refused_by_name(tmp_path, name, value):
    """TRL accepts these and ignores them (known failure 23)."""
    with pytest.raises(ValueError, match=f"`{name}"):
        ORPOConfig(str(tmp_path), **{name: value})


def test_every_argument_of_sft_is_known(tmp_path):
    """A new SFTConfig argument must be looked at: does it mean something for pairs?"""
    own_of_sft = set(SFTConfig.__annotations__)
    refused = {
        "dataset_text_field", "dataset_kwargs", "truncation_mode", "packing", "packing_strategy", "padding_free",
        "eval_packing", "completion_only_loss", "assistant_only_loss", "loss_type",
    }  # fmt: skip
    used = {
        "learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "chat_template_path",
        "dataset_num_proc", "eos_token", "max_length", "shuffle_dataset", "pad_to_multiple_of",
        "activation_offloading", "pad_token",
    }  # fmt: skip
    assert {name for name in own_of_sft if not name.startswith("_")} == refused | used


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": -0.1}, "`beta` must be a finite number >= 0, got -0.1"),
        ({"beta": float("nan")}, "`beta` must be"),
        ({"nll_scope": "prompt"}, "`nll_scope` must be one of sequence, completion, got 'prompt'"),
        ({"nll_reduction": "mean"}, "`nll_reduction` must be one of token_mean, "),
        ({"beta": None}, "`beta` must be"),
        ({"max_length": "long"}, "`max_length` must be 2 or more"),
        ({"bf16_full_eval": True}, "`bf16_full_eval: true` would cast the weights that are trained on"),
        ({"fp16_full_eval": True}, "`fp16_full_eval: true` would cast the weights that are trained on"),
        (
            {"eos_token": "<e>", "chat_template_path": "some/model"},
            "`chat_template_path` names the tokenizer some/model",
        ),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be at least 0"),
        ({"prompt_turns": "last"}, "`prompt_turns` must be one of auto, all, first"),
        ({"max_length": 1}, "`max_length` must be 2 or more"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be 1 or more"),
        ({"nll_reduction": "max_length", "max_length": None}, "`max_length` is None"),
        ({"pair_layout": "packed"}, "`pair_layout` must be one of auto, shared_prefix, padded, got 'packed'"),
        (
            {"neftune_noise_alpha": 5.0, "pair_layout": "shared_prefix"},
            "`neftune_noise_alpha` adds noise by the width of a row",
        ),
        ({"train_sampling_strategy": "sorted"}, "`train_sampling_strategy` must be one of auto, random, "),
        ({"max_tokens_per_micro_batch": 0}, "`max_tokens_per_micro_batch` must be 1 or more"),
        (
            {"max_tokens_per_micro_batch": 4096, "nll_reduction": "micro_batch_mean"},
            "`max_tokens_per_micro_batch` would change the loss of `nll_reduction: micro_batch_mean`",
        ),
        pytest.param(
            {"activation_offloading": True},
            "`activation_offloading: true` moves activations from an accelerator",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator"),
        ),
        ({"on_malformed": "ignore"}, "`on_malformed` must be one of error, drop"),
    ],
)
def test_value_out_of_range_is_named(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match="ORPOConfig") as error:
        ORPOConfig(str(tmp_path), **kwargs)
    assert message in str(error.value)


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(ValueError, match="ORPOConfig") as error:
        ORPOConfig(str(tmp_path), beta=-1, packing=True, max_length=0)
    assert str(error.value).count("\n  - ") == 3


def test_max_length_none_means_no_limit(tmp_path):
    """TRL reads None as 512 (known failure 18); see also tests/pairs/test_prepare.py."""
    assert ORPOConfig(str(tmp_path), max_length=None).max_length is None


def test_arguments_of_checkpointing_do_not_turn_it_off(tmp_path):
    config = ORPOConfig(str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True)
    assert config.gradient_checkpointing
    assert not config.is_checkpointing_open


@pytest.mark.parametrize(
    ("asked", "settings", "expected"),
    [
        ("bf16", {}, (True, False, "bf16")),
        ("fp16", {}, (False, True, "fp16")),
        ("fp8", {}, (False, False, "fp8")),
        ("no", {}, (False, False, "no")),
        ("no", {"bf16": True}, (True, False, "bf16")),
        ("fp16", {"bf16": True}, (True, False, "bf16")),  # a recipe with these two is refused
    ],
)
def test_precision_of_accelerates_config_is_taken_where_none_is_set(asked, settings, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = ORPOConfig(str(tmp_path), use_cpu=True, **settings)
    assert (bool(config.bf16), config.fp16, config.mixed_precision) == expected
