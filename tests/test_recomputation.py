"""Gradient checkpointing on a CPU that nobody has set."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig

from orpo_trl import ORPOConfig, recomputation
from orpo_trl.config import ModelArguments
from orpo_trl.lengths import PairLengths
from orpo_trl.memory import Sharding, count_weights, estimate_memory, largest_batch
from orpo_trl.recomputation import ROOMY, arguments_of, leave_out_checkpointing

MISTRAL = MistralConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=None, pad_token_id=None,
)  # fmt: skip
FULL = ModelArguments()
LORA = ModelArguments(use_peft=True, lora_r=8, lora_target_modules=["all-linear"])
LENGTHS = PairLengths(prompt=np.full(50, 20), chosen=np.full(50, 300), rejected=np.full(50, 200))


def decide(training: ORPOConfig) -> str:
    return leave_out_checkpointing(MISTRAL, FULL, training, Sharding("single"), LENGTHS, is_padded=False)


@pytest.mark.parametrize("room", [0.99, 1.01])
def test_checkpointing_is_left_out_where_the_memory_holds_the_activations(monkeypatch, room):
    training = ORPOConfig("unused", use_cpu=True)
    without = ORPOConfig("unused", bf16=False, gradient_checkpointing=False)
    batch, _ = largest_batch(without, LENGTHS, is_padded=False)
    needed = estimate_memory(MISTRAL, FULL, without, Sharding("single"), batch, "cpu").total
    monkeypatch.setattr(recomputation, "cpu_memory", lambda: room * needed / ROOMY)
    note = decide(training)
    assert training.gradient_checkpointing is (room < 1)
    assert note.startswith(f"Gradient checkpointing is {'on' if room < 1 else 'off'}: without it, about ")


@pytest.mark.parametrize("asked", [True, False])
def test_checkpointing_that_is_set_stays(asked):
    training = ORPOConfig("unused", use_cpu=True, gradient_checkpointing=asked)
    assert decide(training) == ""
    assert training.gradient_checkpointing is asked


def test_arguments_of_a_loaded_model_plan_the_same_weights():
    model = AutoModelForCausalLM.from_config(MISTRAL, dtype=torch.float32)
    assert count_weights(MISTRAL, arguments_of(model)) == count_weights(MISTRAL, FULL)
    adapter = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    assert count_weights(MISTRAL, arguments_of(adapter)) == count_weights(MISTRAL, LORA)
    assert arguments_of(adapter).dtype == "float32"
