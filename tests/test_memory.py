"""Estimates of memory against real models and passes, closed forms, and real processes."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.processes import ENGINES, launch
from support.small import REPOSITORY
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from orpo_trl import ORPOConfig
from orpo_trl.activations import MicroBatch, measure_activations
from orpo_trl.attention import enable_packed_rows, reading_packed_row
from orpo_trl.batch import MODEL_INPUTS, PairCollator
from orpo_trl.config import ModelArguments
from orpo_trl.memory import Sharding, count_weights, dtypes_of, estimate_memory

GIB = 2**30
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None, "pad_token_id": None,
}  # fmt: skip
MISTRAL, QWEN3 = MistralConfig(**SMALL), Qwen3Config(**SMALL)
MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LINEAR_7B = 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)  # q, k and v, o, MLP
BATCH = MicroBatch(rows=16, tokens=24_000, longest=2048, is_packed=True)
ZERO3 = Sharding("zero3", 4)
FULL = ModelArguments()
LORA = ModelArguments(use_peft=True, lora_r=8, lora_target_modules=["all-linear"])


def settings(**kwargs) -> ORPOConfig:
    return ORPOConfig("unused", **{"bf16": False, "gradient_checkpointing": False, **kwargs})


def estimate(sharding=ZERO3, model_args=FULL, batch=BATCH, device="cuda", **kwargs):
    """Of Mistral-7B."""
    training = settings(**{"bf16": True, "gradient_checkpointing": True, **kwargs})
    return estimate_memory(MISTRAL_7B, model_args, training, sharding, batch, device)


def bytes_saved_by_a_real_pass(model, **inputs) -> int:
    """Bytes of all tensors, except weights, that the forward pass of the layers keeps for the backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = model.train().base_model(**inputs, use_cache=False)
    assert result.last_hidden_state.requires_grad
    return sum(saved.values())


def measured(config, batch: MicroBatch, **kwargs):
    training = settings(**kwargs)
    dtypes = dtypes_of(config, FULL, training, Sharding("single"))
    return measure_activations(config, FULL, training, batch, dtypes, "cpu")


# ---- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MISTRAL, QWEN3, MistralConfig(**SMALL, tie_word_embeddings=True)])
def test_weights_are_those_of_the_built_model(config):
    model = AutoModelForCausalLM.from_config(config)
    count = count_weights(config, FULL)
    assert count.total == count.trained == model.num_parameters()
    assert count.head == 300 * 64
    assert count.layer == sum(weight.numel() for weight in model.model.layers[0].parameters())
    assert count.largest == 300 * 64


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora_weights_are_those_of_peft(modules_to_save):
    model = get_peft_model(
        AutoModelForCausalLM.from_config(MISTRAL),
        LoraConfig(r=8, target_modules="all-linear", modules_to_save=modules_to_save, task_type="CAUSAL_LM"),
    )
    trained, total = model.get_nb_trainable_parameters()
    count = count_weights(MISTRAL, dataclasses.replace(LORA, lora_modules_to_save=modules_to_save))
    assert (count.trained, count.total) == (trained, total)
    assert count.trains_head == bool(modules_to_save)


# ---- Activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MISTRAL, QWEN3])
def test_saved_bytes_are_those_of_a_real_pass(config):
    ids = torch.zeros(4, 96, dtype=torch.int64)
    real = bytes_saved_by_a_real_pass(AutoModelForCausalLM.from_config(config), input_ids=ids)
    saved, _ = measured(config, MicroBatch(rows=4, tokens=4 * 96, longest=96, is_packed=False)).at(4)
    assert saved == pytest.approx(real, rel=0.02)


def test_saved_bytes_of_a_packed_row_are_those_of_a_real_pass():
    pair = {"prompt_ids": [5] * 64, "chosen_ids": [6] * 96, "rejected_ids": [7] * 96}
    batch = PairCollator(0, layout="shared_prefix")([pair] * 2)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch and name != "shift_labels"}
    model = AutoModelForCausalLM.from_config(MISTRAL)
    enable_packed_rows(model)
    with reading_packed_row(model):
        real = bytes_saved_by_a_real_pass(model, **inputs)
    tokens = batch["input_ids"].numel()
    saved, _ = measured(MISTRAL, MicroBatch(rows=4, tokens=tokens, longest=160, is_packed=True)).at(4)
    assert saved == pytest.approx(real, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers():
    batch = MicroBatch(rows=4, tokens=4 * 96, longest=96, is_packed=False)
    activations = measured(MISTRAL, batch, gradient_checkpointing=True)
    assert activations.at(11)[0] - activations.at(10)[0] == 4 * 96 * 64 * 4
    everything = measured(MISTRAL, batch)
    assert activations.at(4)[0] < everything.at(4)[0]
    assert activations.at(4)[1] < everything.at(4)[1]


def test_autocast_keeps_cast_copies_of_the_weights():
    """Two bytes for each weight of a layer's matrices, which a bf16 model does not need."""
    single, in_bf16 = Sharding("single"), ModelArguments(dtype="bfloat16")
    cast, plain = (estimate(single, args, optim="sgd", gradient_checkpointing=False) for args in (FULL, in_bf16))
    assert cast.parts["activations"] - plain.parts["activations"] > 2 * LINEAR_7B


# ---- State -----------------------------------------------------------------------------------------------------------


def test_mistral_7b_under_zero3_shares_eighteen_bytes_for_each_weight():
    """ZeRO (Rajbhandari et al. 2020): 2 bytes of weight, 2 of gradient, 4 of master copy and 8 of Adam, over 4 GPUs.

    The gradient is summed over the passes of a step in 4 bytes.
    """
    parts = estimate().parts
    weights = 7_241_732_096
    assert (parts["weights"], parts["gradients"]) == (2 * weights / 4, 4 * weights / 4)
    assert parts["fp32 master weights"] == 4 * weights / 4
    assert parts["optimizer"] == 8 * weights / 4


def test_each_strategy_holds_its_share():
    weights = 7_241_732_096
    fsdp, zero2, ddp = (estimate(Sharding(name, 8)).parts for name in ("fsdp2", "zero2", "ddp"))
    assert fsdp["weights"] == fsdp["gradients"] == 4 * weights / 8
    assert (zero2["weights"], zero2["gradients"]) == (2 * weights, 4 * weights / 8)
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (4 * weights, 4 * weights, 8 * weights)
    offloaded = estimate(Sharding("zero3_offload", 8)).parts
    assert not {"weights", "gradients", "optimizer", "fp32 master weights"} & set(offloaded)


def test_quantised_weights_take_half_a_byte_and_their_constants():
    """4 bits, and for 64 of them 32 bits, or 8 bits and for 256 of these 32 bits; all else in bf16."""
    rest = 7_241_732_096 - LINEAR_7B
    for nested, constants in ((False, 32 / 64), (True, 8 / 64 + 32 / 64 / 256)):
        model_args = dataclasses.replace(LORA, dtype="bfloat16", load_in_4bit=True, use_bnb_nested_quant=nested)
        adapter = count_weights(MISTRAL_7B, model_args).trained
        parts = estimate(Sharding("single"), model_args).parts
        assert parts["weights"] == pytest.approx(LINEAR_7B * (4 + constants) / 8 + 2 * rest + 2 * adapter, abs=64)


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("lion_32bit", 4), ("sgd", 0), ("adafactor", 4)],
)
def test_optimizer_state_is_of_the_weights_that_a_process_updates(optim, bytes_each):
    assert estimate(optim=optim).parts.get("optimizer", 0) == bytes_each * 7_241_732_096 / 4


def test_paged_state_counts_on_a_cpu_alone():
    assert "optimizer" not in estimate(optim="paged_adamw_32bit").parts
    assert estimate(optim="paged_adamw_32bit", device="cpu").parts["optimizer"] == 8 * 7_241_732_096 / 4


def test_less_is_needed_with_more_gpus_checkpointing_smaller_batches_and_lora():
    base = estimate().total
    assert estimate(Sharding("zero3", 8)).total < base
    assert base < estimate(gradient_checkpointing=False).total
    assert estimate(batch=MicroBatch(2, 3_000, 2048, True)).total < base
    assert estimate(model_args=LORA).total < base


def test_selective_checkpointing_is_estimated_as_checkpointing():
    assert estimate(gradient_checkpointing_kwargs={"selective": True}).total == estimate().total


def test_wrong_names_are_errors_that_list_the_known_ones():
    with pytest.raises(ValueError, match=r"optim: lomo.*Known are.*adamw_torch"):
        estimate(optim="lomo")
    with pytest.raises(ValueError, match=r"single, zero2.*got 'zero4'"):
        Sharding("zero4", 2)
    with pytest.raises(ValueError, match=r"cpu, cuda, got 'tpu'"):
        estimate(device="tpu")


# ---- Real processes --------------------------------------------------------------------------------------------------

# hidden size, intermediate size, layers, heads, key-value heads, vocabulary; pairs, prompt, response; checkpointing
RUNS = {
    "67M": ((512, 1536, 16, 8, 4, 16384), (2, 64, 320), False),
    "138M": ((768, 2048, 18, 12, 4, 16384), (2, 128, 128), True),
    "321M": ((1024, 4096, 20, 16, 4, 8192), (2, 192, 64), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["138M", *(pytest.param(name, marks=pytest.mark.long) for name in ("67M", "321M"))])
def test_peak_of_two_processes_under_zero3_is_within_15_percent(name, tmp_path):
    shape, (pairs, prompt, response), checkpointing = RUNS[name]
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size",
    )  # fmt: skip
    config = MistralConfig(**dict(zip(names, shape, strict=True)), sliding_window=None, pad_token_id=3)
    config.save_pretrained(tmp_path)
    job = {
        "folder": str(tmp_path), "pairs": pairs, "prompt": prompt, "response": response,
        "config": {"gradient_checkpointing": checkpointing},
    }  # fmt: skip
    launch(REPOSITORY / "tests" / "support" / "measure_memory.py", json.dumps(job), engine=ENGINES / "cpu_zero3.yaml")
    peaks = [int((tmp_path / f"peak_{rank}.txt").read_text()) for rank in range(2)]
    # The rejected branch repeats the last prompt token.
    batch = MicroBatch(2 * pairs, pairs * (prompt + 2 * response + 1), prompt + response, is_packed=True)
    training = settings(gradient_checkpointing=checkpointing)
    estimated = estimate_memory(config, FULL, training, Sharding("zero3", 2), batch, "cpu").total
    print(f"{name}: estimated {estimated / GIB:.2f} GiB, measured {[round(peak / GIB, 2) for peak in peaks]}")
    assert [estimated] * 2 == pytest.approx(peaks, rel=0.15)
