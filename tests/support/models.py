"""Tiny models with random weights, of every type that reads packed rows, with all kinds of layers that the type has."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# Types name the same setting differently: a value for each name. Windows are shorter than the rows of the tests.
_SMALL = {
    "vocab_size": 99, "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "intermediate_size": 48,
    "ffn_dim": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 6,
    "query_pre_attn_scalar": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 8,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "state_size": 4, "expand": 2,
    "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0,
    "residual_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OWN = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"sliding_window": 4096},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True},
    "persimmon": {"num_key_value_heads": None},
}
_WITH_BOTH_KINDS_OF_LAYER = {"cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "smollm3"}


def tiny_of_type(model_type: str, **kwargs) -> PreTrainedModel:
    """A model of 2 layers and 99 tokens."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    settings = {name: value for name, value in _SMALL.items() if name in known}
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        settings["num_key_value_heads"] = 4
    if model_type in _WITH_BOTH_KINDS_OF_LAYER:
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    implementation = kwargs.pop("attn_implementation", None)
    config = config_class(**{**settings, **_OWN.get(model_type, {}), **kwargs})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for weight in model.parameters():
        if weight.dim() > 1:
            # With the usual 0.02, scores are too small to show the effect of soft-capping, windows and masks.
            torch.nn.init.normal_(weight, std=0.3)
    return model
