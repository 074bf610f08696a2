"""Operations of training against closed forms and documented figures."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MixtralConfig

from orpo_trl import ORPOConfig
from orpo_trl.config import ModelArguments
from orpo_trl.flops import planned_weights, train_flops, training_time
from orpo_trl.lengths import PairLengths

MISTRAL_7B = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LAYER = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096  # q, k and v, o, MLP, two norms
BODY = 32 * LAYER + 4096
HEAD = 32000 * 4096


# Operations of one token that sees one key: 4 for each of 32 x 128 dimensions and 32 layers.
ATTENTION = 4 * 4096 * 32


def flops(lengths: list, use_peft: bool = False, checkpointing: bool = False, scope: str = "sequence", **kwargs):
    args = ORPOConfig("unused", bf16=False, gradient_checkpointing=checkpointing, nll_scope=scope)
    return train_flops(MISTRAL_7B, ModelArguments(use_peft=use_peft), args, PairLengths(*np.array(lengths).T), **kwargs)


def test_mistral_7b_takes_six_operations_for_each_weight_and_token():
    """6 N D of one row, with the 7.24e9 parameters less the 0.13e9 of the embeddings; its last token is not scored."""
    seen = sum(range(1, 1001))
    assert flops([(100, 900, 0)]) == 6 * (1000 * BODY + 999 * HEAD) + 3 * ATTENTION * seen
    assert flops([(100, 900, 0)]) == pytest.approx(6 * 1000 * (7.24e9 - 0.13e9) + 3 * ATTENTION * seen, rel=2e-3)


def test_shared_prompt_runs_once():
    """Prompt and chosen are 7 tokens; the branch is the last prompt token and 2 more, which see 4, 5 and 6 keys."""
    seen = torch.ones(7, 7).tril().sum().item() + 4 + 5 + 6
    assert flops([(4, 3, 2)]) == 6 * ((7 + 3) * BODY + (6 + 2) * HEAD) + 3 * ATTENTION * seen


def test_padded_pair_runs_both_rows_at_the_length_of_the_longer():
    seen = 2 * torch.ones(7, 7).tril().sum().item()
    assert flops([(4, 3, 2)], is_padded=True) == 6 * (14 * BODY + (6 + 2) * HEAD) + 3 * ATTENTION * seen


def test_pairs_add_up():
    assert flops([(4, 3, 2), (9, 5, 0)]) == flops([(4, 3, 2)]) + flops([(9, 5, 0)])


def test_nll_of_the_completion_scores_no_prompt():
    assert flops([(50, 3, 2)]) - flops([(50, 3, 2)], scope="completion") == 6 * 49 * HEAD


def test_checkpointing_adds_a_third_of_the_layers_to_time_and_not_to_model_flops():
    once, again = flops([(4, 3, 2)]), flops([(4, 3, 2)], checkpointing=True)
    assert again - once == pytest.approx((once - 6 * 8 * HEAD) / 3)


def test_frozen_weights_need_no_gradients_of_their_own():
    assert flops([(4, 3, 2)]) - flops([(4, 3, 2)], use_peft=True) == 2 * (10 * BODY + 8 * HEAD)


def test_mixture_of_experts_counts_the_experts_of_a_token():
    """Mixtral-8x7B: 46.7e9 parameters, 12.9e9 of them active (Jiang et al. 2024), embeddings included."""
    config = MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    weights = planned_weights(config)
    assert weights.body + 2 * HEAD == pytest.approx(46.7e9, rel=1e-3)
    assert weights.active + 2 * HEAD == pytest.approx(12.9e9, rel=2e-3)


def test_tied_head_is_counted_although_it_is_the_embeddings():
    config, untied = (
        MistralConfig(
            vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=is_tied,
        )
        for is_tied in (True, False)
    )  # fmt: skip
    assert planned_weights(config) == planned_weights(untied)
    assert planned_weights(config).head == 800


def test_time_is_operations_over_what_the_devices_reach():
    assert training_time(8 * 312e12 * 60, devices=8, peak_flops=312e12, utilisation=0.5) == 120
    with pytest.raises(ValueError, match="utilisation"):
        training_time(1e15, 8, 312e12, 40)
