"""The packed row compared with padded rows and with TRL's loss, for every model type that reads it; and refusals."""

import copy
import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig
from support.models import tiny_of_type
from support.small import REPOSITORY, TOKENIZER, make_dataset, settings, tiny_model
from transformers import CONFIG_MAPPING, AttentionInterface
from transformers.integrations import flash_attention
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

import orpo_trl.attention
import orpo_trl.varlen
from orpo_trl import ORPOTrainer
from orpo_trl.attention import EXACT_MODEL_TYPES, enable_packed_rows, reading_packed_row, why_not_exact
from orpo_trl.batch import MODEL_INPUTS, PairCollator
from orpo_trl.losses import log_odds_ratio, nll_sum, odds_ratio_loss, pair_logps

BETA = 0.5
# The models that issue reports and papers of ORPO name, tested on more pairs than the rest.
COMMON = {
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "llama", "mistral", "mixtral", "opt", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
}  # fmt: skip
TOKEN = st.integers(3, 98)
# A type that the lowest version of transformers does not have is skipped there; constraints.txt has all of them.
MODEL_TYPES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason=f"transformers has no {name} yet"))
    for name in sorted(EXACT_MODEL_TYPES)
]


def ids(least: int, most: int):
    return st.lists(TOKEN, min_size=least, max_size=most)


@st.composite
def pair_lists(draw, nll_only: bool = True):
    """1 to 4 pairs. Prompts have 1 token or most of the row, and may be shared by pairs; some answers have 1 token."""
    prompts = draw(st.lists(st.one_of(ids(1, 1), ids(2, 10), ids(20, 30)), min_size=1, max_size=2))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        response = st.one_of(ids(1, 1), ids(2, 12))
        rejected = draw(st.none() | response if nll_only else response)
        prompt = draw(st.sampled_from(prompts))
        pairs.append({"prompt_ids": prompt, "chosen_ids": draw(response), "rejected_ids": rejected})
    return pairs


def gradients(loss: torch.Tensor, model) -> torch.Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def token_logps(model, batch: dict) -> torch.Tensor:
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch and name != "shift_labels"}
    with reading_packed_row(model) if "segments" in batch else nullcontext():
        logits = model(**inputs, use_cache=False).logits.float()
    labels = batch["shift_labels"]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(labels == -100, 0)


def loss_of(model, pairs: list[dict], layout: str) -> torch.Tensor:
    batch = on_device(PairCollator(0, layout=layout)(pairs), model.device)
    logps = token_logps(model, batch)
    of_pairs = pair_logps(logps, batch["completion_index"], batch["completion_lengths"], batch["num_pairs"])
    odds_ratio = odds_ratio_loss(log_odds_ratio(*of_pairs)).sum() / max(batch["num_pairs"], 1)
    return nll_sum(logps, batch["nll_divisors"]) / batch["num_nll_units"] + BETA * odds_ratio


def assert_same(loss, gradient, other_loss, other_gradient):
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    assert (gradient - other_gradient).norm() <= 1e-4 * other_gradient.norm()


@functools.cache
def model_of_type(model_type: str):
    """The model, and the same one reading packed rows."""
    model = tiny_of_type(model_type)
    packed = copy.deepcopy(model)
    enable_packed_rows(packed)
    return model, packed


# ---- Exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_rows_equal_padded_ones(model_type):
    model, packed = model_of_type(model_type)
    assert why_not_exact(model) is None

    @hypothesis_settings(max_examples=8 if model_type in COMMON else 3)
    @given(pair_lists())
    def check(pairs):
        loss = loss_of(packed, pairs, "shared_prefix")
        expected = loss_of(model, pairs, "padded")
        assert_same(loss, gradients(loss, packed), expected, gradients(expected, model))

    check()


@functools.cache
def trl_trainer(folder) -> TRLTrainer:
    args = TRLConfig(str(folder), use_cpu=True, bf16=False, report_to="none", beta=BETA)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return TRLTrainer(tiny_model(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def trl_batch(pairs: list[dict]) -> dict[str, torch.Tensor]:
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        longest = max(len(prompt + response) for prompt, response in rows)

        def padded(values, padding, longest=longest):
            return torch.tensor([row + [padding] * (longest - len(row)) for row in values])

        batch[f"{side}_input_ids"] = padded([prompt + response for prompt, response in rows], 0)
        batch[f"{side}_labels"] = padded([[-100] * len(prompt) + response for prompt, response in rows], -100)
        batch[f"{side}_attention_mask"] = padded([[1] * len(prompt + response) for prompt, response in rows], 0)
    return batch


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_rows_equal_trl(model_type, tmp_path_factory):
    trl = trl_trainer(tmp_path_factory.getbasetemp())
    model, packed = model_of_type(model_type)

    @hypothesis_settings(max_examples=3 if model_type in COMMON else 1)
    @given(pair_lists(nll_only=False))
    def check(pairs):
        loss = loss_of(packed, pairs, "shared_prefix")
        expected, _ = trl.get_batch_loss_metrics(model, trl_batch(pairs), train_eval="train")
        assert_same(loss, gradients(loss, packed), expected, gradients(expected, model))

    check()


PAIRS = [
    {"prompt_ids": [5], "chosen_ids": [7, 8, 9], "rejected_ids": [9]},
    {"prompt_ids": list(range(10, 35)), "chosen_ids": [40], "rejected_ids": list(range(50, 60))},
    {"prompt_ids": list(range(10, 35)), "chosen_ids": list(range(60, 72)), "rejected_ids": list(range(50, 53))},
    {"prompt_ids": [11, 12, 13], "chosen_ids": [41, 42], "rejected_ids": None},
]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_checkpointed_layers_read_the_packed_row_again(model_type):
    model, packed = model_of_type(model_type)
    expected = loss_of(model, PAIRS, "padded")
    expected_gradient = gradients(expected, model)
    for use_reentrant in (True, False):
        checkpointed = copy.deepcopy(packed)
        checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = loss_of(checkpointed, PAIRS, "shared_prefix")
        loss.backward()
        weights = [weight for weight in checkpointed.parameters() if weight.grad is not None]
        assert_same(loss, torch.cat([weight.grad.flatten() for weight in weights]), expected, expected_gradient)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("pairs", [PAIRS[:3], PAIRS[3:], []])
def test_load_balancing_weighs_tokens_as_padded_rows_do(model_type, pairs, tokenizer, tmp_path):
    found = []
    for layout in ("padded", "shared_prefix"):
        model = tiny_of_type(model_type, output_router_logits=True, router_aux_loss_coef=0.1, vocab_size=768)
        options = {"pair_layout": layout, "beta": BETA}
        trainer = ORPOTrainer(
            model, settings(tmp_path, **options), train_dataset=make_dataset(4), processing_class=tokenizer
        )
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
        found.append((loss, gradients(loss, trainer.model)))
    if pairs:
        assert_same(*found[1], *found[0])
    else:
        assert all((gradient == 0).all() for _, gradient in found)


TRAINING_OPTIONS = [
    {},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"pad_to_multiple_of": 64},
    {"nll_scope": "completion", "nll_reduction": "sequence_mean"},
]


@pytest.mark.parametrize(("options", "lora"), [
    *((options, False) for options in TRAINING_OPTIONS),
    ({}, True),
    *(pytest.param(options, True, marks=pytest.mark.slow) for options in TRAINING_OPTIONS[1:]),
])  # fmt: skip
def test_training_is_the_same_in_both_layouts(options, lora, tokenizer, tmp_path):
    runs = {}
    for layout in ("padded", "shared_prefix"):
        trainer = ORPOTrainer(
            tiny_model(sliding_window=7),
            settings(tmp_path, pair_layout=layout, max_steps=4, train_sampling_strategy="random", **options),
            train_dataset=make_dataset(13, nll_only_every=5),
            eval_dataset=make_dataset(5, seed=1),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        )
        trainer.train()
        runs[layout] = [*(log for log in trainer.state.log_history if "loss" in log), trainer.evaluate()]
    for log, expected in zip(runs["shared_prefix"], runs["padded"], strict=True):
        speed = {name for name in expected if name.startswith(("throughput/", "memory/"))}
        speed |= {name for name in expected if name.endswith(("runtime", "per_second"))}
        for name in set(expected) - speed:
            assert log[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.long), True])
def test_torch_compile_trains_the_same(checkpointing, tokenizer, tmp_path):
    logs = []
    for compiled in (False, True):
        trainer = ORPOTrainer(
            tiny_model(sliding_window=7),
            settings(
                tmp_path,
                torch_compile=compiled,
                max_steps=3,
                gradient_checkpointing=checkpointing,
                pair_layout="shared_prefix",
            ),
            train_dataset=make_dataset(12),
            processing_class=tokenizer,
        )
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_model_is_one_graph(checkpointing, tokenizer, tmp_path, monkeypatch):
    """Ten batches of changing lengths, with the call that CUDA gets: the graph that has the layers has all of them."""

    def varlen_attn(query, key, value, *ends, **options):  # of the right shape is enough to be traced
        return query + key.mean() + value.mean()

    monkeypatch.setattr(orpo_trl.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(orpo_trl.varlen, "is_exact", lambda *args, **kwargs: True)
    activations = []

    def count(graph, example_inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        nodes = [node for part in parts for node in part.graph.nodes]
        activations.append(sum(node.target is torch.nn.functional.silu for node in nodes))  # one in each layer
        return graph.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", count)
    torch._dynamo.reset()
    trainer = ORPOTrainer(
        tiny_model(),
        settings(
            tmp_path,
            torch_compile=True,
            torch_compile_backend="eager",
            max_steps=10,
            gradient_checkpointing=checkpointing,
            pair_layout="shared_prefix",
        ),
        train_dataset=make_dataset(40),
        processing_class=tokenizer,
    )
    trainer.train()
    with_layers = [count for count in activations if count]
    assert set(with_layers) == {trainer.model.config.num_hidden_layers}
    assert len(with_layers) <= 3, "one for the first length, and one for all others"


def test_bf16_is_as_near_to_fp32_as_padded_rows_are():
    model = tiny_model(99, sliding_window=7)
    packed = copy.deepcopy(model)
    enable_packed_rows(packed)
    reference = gradients(loss_of(model, PAIRS, "padded"), model)
    errors = {}
    for name, half, layout in (("padded", model, "padded"), ("packed", packed, "shared_prefix")):
        half = half.bfloat16()
        loss = loss_of(half, PAIRS, layout)
        errors[name] = (gradients(loss, half).float() - reference).norm() / reference.norm()
    assert errors["packed"] < max(2 * errors["padded"], 0.03)


# ---- Kernels that a CPU does not have, replaced by what their documentation says -------------------------------------


def reference_varlen(query, key, value, query_ends, key_ends, scale, window):
    """`[tokens, heads, dim]`, float64: each segment alone, causal and aligned at its end, `window` keys to the left."""
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends), strict=True):
        q, k, v = (x.double() for x in (query[a:b], key[c:d], value[c:d]))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = (distance < 0) | (distance > window if window >= 0 else False)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


@pytest.mark.parametrize("shares_heads", [True, False], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen2"])
def test_one_variable_length_call_reads_all_segments(model_type, shares_heads, monkeypatch):
    """The call that CUDA gets, on a kernel written out from torch.nn.attention.varlen's documentation."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
        assert max_q == cu_q.diff().max()
        assert max_k == cu_k.diff().max()
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert shares_heads or not enable_gqa
        assert window_size[1] == 0
        return reference_varlen(query, key, value, cu_q.tolist(), cu_k.tolist(), scale, window_size[0])

    monkeypatch.setattr(orpo_trl.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(orpo_trl.varlen, "is_exact", lambda *args, **kwargs: True)
    monkeypatch.setattr(orpo_trl.varlen, "_SHARES_HEADS", shares_heads)
    model, packed = model_of_type(model_type)
    loss, expected = loss_of(packed, PAIRS, "shared_prefix"), loss_of(model, PAIRS, "padded")
    assert_same(loss, gradients(loss, packed), expected, gradients(expected, model))


@pytest.mark.parametrize("dtype", orpo_trl.varlen.DTYPES)
@pytest.mark.parametrize("is_at_end", [True, False], ids=["bottom right", "top left"])
def test_self_test_finds_a_causal_mask_at_the_wrong_end(is_at_end, dtype, monkeypatch):
    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert query.dtype == dtype
        outputs = []
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
            part = (tensor.transpose(0, 1) for tensor in (query[a:b], key[c:d], value[c:d]))
            visible = torch.ones(b - a, d - c).tril(d - c - (b - a) if is_at_end else 0).bool()
            outputs.append(torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=visible).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(orpo_trl.varlen, "varlen_attn", varlen_attn)
    problem = orpo_trl.varlen.kernel_problem(dtype, torch.device("cpu"))
    assert problem is None if is_at_end else "is wrong by" in problem


def test_self_test_tells_of_a_kernel_that_does_not_run():
    problem = orpo_trl.varlen.kernel_problem(torch.bfloat16, torch.device("cpu"))  # torch has none for CPUs
    assert "does not run" in problem


def test_kernel_is_not_used_before_it_was_tested(monkeypatch):
    """Also where a card says that it could: ROCm reports `is_cuda` and a capability above 8.0."""
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 3, 64))
    monkeypatch.setattr(orpo_trl.varlen, "_right", set())
    assert not orpo_trl.varlen.is_exact(query, query)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(orpo_trl.varlen, "kernel_problem", lambda *arguments: None)
    orpo_trl.varlen.test_kernel()
    assert not orpo_trl.varlen.is_exact(query, query)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(orpo_trl.varlen, "_tested", set())
    orpo_trl.varlen.test_kernel()
    assert orpo_trl.varlen.is_exact(query, query)


def test_flash_attention_of_transformers_reads_all_segments(monkeypatch):
    """`attn_implementation: flash_attention_2` and kernels of the Hub, up to transformers' call of the kernel."""

    def forward(query, key, value, mask, softmax_scale, sliding_window, cu_seq_lens_q, cu_seq_lens_k, **kwargs):
        assert mask is None
        assert kwargs["is_causal"]
        window = -1 if sliding_window is None else sliding_window - 1
        ends = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
        assert kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
        assert kwargs["max_length_k"] == cu_seq_lens_k.diff().max()
        return reference_varlen(query[0], key[0], value[0], *ends, softmax_scale, window)[None]

    model, packed = tiny_of_type("mistral"), tiny_of_type("mistral")
    name = "flash_attention_2"
    before = AttentionInterface()[name]
    packed.config._attn_implementation = name
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", forward)
    try:
        assert why_not_exact(packed) is None
        enable_packed_rows(packed)
        loss, expected = loss_of(packed, PAIRS, "shared_prefix"), loss_of(model, PAIRS, "padded")
    finally:
        AttentionInterface.register(name, before)
    assert_same(loss, gradients(loss, packed), expected, gradients(expected, model))


def test_autocast_reaches_the_kernel():
    """torch's autocast does not know the kernel, and rotary embeddings leave fp32 queries."""
    for tensor in torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16):
        assert orpo_trl.attention._in_autocast_dtype(tensor) is tensor
        with torch.autocast("cpu", torch.bfloat16):
            assert orpo_trl.attention._in_autocast_dtype(tensor).dtype == torch.bfloat16


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_device(batch, device):
    if isinstance(batch, dict):
        return {name: on_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


@needs_cuda
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen2"])
def test_cuda_kernel_is_as_near_to_fp32_as_padded_rows_are(model_type, autocast, monkeypatch):
    """bf16 through FlashAttention, with weights in bf16 or under autocast; fp32 has no kernel and is exact."""
    kernel, calls = orpo_trl.varlen.varlen_attn, []
    monkeypatch.setattr(
        orpo_trl.varlen, "varlen_attn", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
    )
    model, packed = (copy.deepcopy(m).cuda() for m in model_of_type(model_type))
    reference = gradients(loss_of(model, PAIRS, "padded"), model)
    exact = gradients(loss_of(packed, PAIRS, "shared_prefix"), packed)
    assert not calls
    assert (exact - reference).norm() <= 1e-4 * reference.norm()
    errors = {}
    for layout, half in (("padded", model), ("shared_prefix", packed)):
        half = half if autocast else half.bfloat16()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = loss_of(half, PAIRS, layout)
        errors[layout] = (gradients(loss, half).float() - reference).norm() / reference.norm()
    assert calls
    assert errors["shared_prefix"] < max(2 * errors["padded"], 0.03)


# ---- Calls without segments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt2", "gpt_oss"])
def test_generation_is_the_models_own(model_type):
    model, packed = model_of_type(model_type)
    rows = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]])
    inputs = {"input_ids": rows, "attention_mask": (rows != 0).long()}
    torch.testing.assert_close(packed(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    generated = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (packed, model)]
    assert generated[0].tolist() == generated[1].tolist()


def test_saved_config_is_the_models_own(tmp_path):
    model, packed = model_of_type("mistral")
    for name, saved in (("own", model), ("packed", packed)):
        saved.save_pretrained(tmp_path / name)
    assert (tmp_path / "own/config.json").read_text() == (tmp_path / "packed/config.json").read_text()


def test_a_second_trainer_of_one_model_packs_too(tokenizer, tmp_path):
    model = tiny_model()
    for _ in range(2):
        args = settings(tmp_path, pair_layout="shared_prefix", max_steps=1)
        trainer = ORPOTrainer(model, args, train_dataset=make_dataset(8), processing_class=tokenizer)
        trainer.train()
        assert "segments" in trainer.data_collator(trainer.train_dataset.select([0]).to_list())


def test_two_models_of_one_process_keep_their_own_attention():
    """Registered under one name, the second model's eager attention would be the first one's."""
    models = [tiny_of_type(name, attn_implementation="eager") for name in ("gemma2", "gpt_oss", "llama")]
    expected = [loss_of(model, PAIRS, "padded") for model in models]
    for model in models:
        enable_packed_rows(model)
    for model, loss in zip(models, expected, strict=True):
        assert loss_of(model, PAIRS, "shared_prefix").item() == pytest.approx(loss.item(), rel=1e-5)


# ---- Refused ---------------------------------------------------------------------------------------------------------

REFUSED = [
    (lambda: tiny_of_type("mamba"), "`mamba`"),
    (lambda: tiny_of_type("qwen3_next"), "`qwen3_next`"),
    (lambda: tiny_of_type("jamba"), "`jamba`"),
    (lambda: tiny_of_type("bloom"), "`bloom`"),
    (lambda: tiny_of_type("qwen2_moe", use_sliding_window=True, sliding_window=6, max_window_layers=1), "window"),
    (lambda: tiny_of_type("smollm3", use_sliding_window=False), "window into the mask"),
    (lambda: tiny_of_type("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager"), "reorder_and_upcast"),
    (lambda: tiny_of_type("gemma3_text", use_bidirectional_attention=True), "not causal"),
    (lambda: tiny_of_type("llama", is_causal=False), "is not causal"),
    (lambda: tiny_of_type("olmoe", sliding_window=6), "no sliding window in its mask"),
    (lambda: tiny_of_type("llama", attn_implementation="flex_attention"), "flex_attention"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_models_that_are_not_exact_are_refused_by_name(build, reason):
    assert reason in why_not_exact(build())


def test_auto_falls_back_to_padded_rows_with_one_log_line(tokenizer, tmp_path, caplog):
    model = tiny_of_type("mamba", vocab_size=768)
    args = settings(tmp_path, per_device_train_batch_size=1, max_length=40)
    trainer = ORPOTrainer(model, args, train_dataset=make_dataset(2), processing_class=tokenizer)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("orpo_trl")]
    assert [line for line in lines if "padded" in line] == [
        "Pairs are padded, and each prompt runs twice: MambaForCausalLM (model type `mamba`) is not known to read "
        "packed rows exactly."
    ]
    trainer.train()
    assert trainer.state.global_step == 2


def test_asking_for_what_is_not_exact_is_an_error(tokenizer, tmp_path):
    args = settings(tmp_path, pair_layout="shared_prefix")
    with pytest.raises(ValueError, match=r"`pair_layout: shared_prefix`: MambaForCausalLM .* `auto`"):
        ORPOTrainer(
            tiny_of_type("mamba", vocab_size=768), args, train_dataset=make_dataset(8), processing_class=tokenizer
        )


def test_a_packed_collator_of_the_user_is_read(tokenizer, tmp_path):
    def trainer(model):
        return ORPOTrainer(
            model, settings(tmp_path), PairCollator(0, layout="shared_prefix"), make_dataset(8), None, tokenizer
        )

    trainer(tiny_model()).train()
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        trainer(tiny_of_type("mamba", vocab_size=768))


def test_an_attention_changed_later_is_an_error_not_a_wrong_loss(tokenizer, tmp_path):
    trainer = ORPOTrainer(tiny_model(), settings(tmp_path), train_dataset=make_dataset(8), processing_class=tokenizer)
    trainer.model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="`attn_implementation` was changed"):
        trainer.train()


# ---- The table of docs/layouts.md ------------------------------------------------------------------------------------


def kinds(model_type: str) -> str:
    """The group of the table of docs/layouts.md, from the config of the tiny model of this type."""
    config = tiny_of_type(model_type).config
    if model_type == "gpt_oss":
        return "windows, sinks, mixture of experts"
    if getattr(config, "attn_logit_softcapping", None):
        return "windows, soft-capping"
    has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    names = [
        "windows" if getattr(config, "sliding_window", None) else "",
        "mixture of experts" if has_experts or "moe" in model_type else "",
    ]
    return ", ".join(filter(None, names)) or "full attention"


def models_table() -> str:
    groups: dict[str, list[str]] = {}
    for model_type in sorted(EXACT_MODEL_TYPES):
        groups.setdefault(kinds(model_type), []).append(model_type)
    lines = [f"| {kind} | {', '.join(types)} |" for kind, types in sorted(groups.items())]
    return "\n".join(["| attention | model types that read packed rows exactly |", "| --- | --- |", *lines])


@pytest.mark.skipif(not set(CONFIG_MAPPING) >= EXACT_MODEL_TYPES, reason="transformers has not all of the types yet")
def test_page_on_layouts_lists_the_models():
    page = (REPOSITORY / "docs" / "layouts.md").read_text(encoding="utf-8")
    assert models_table() in page, f"docs/layouts.md should hold:\n{models_table()}"


@pytest.mark.parametrize(("alpha", "layout"), [(None, "shared_prefix"), (0.0, "shared_prefix"), (5.0, "padded")])
def test_rows_are_padded_where_neftune_adds_noise(tokenizer, tmp_path, caplog, alpha, layout):
    """Its noise is alpha / sqrt(width * hidden size): a packed row, as wide as all rows together, got too little."""
    args = settings(tmp_path, neftune_noise_alpha=alpha, max_steps=1)
    trainer = ORPOTrainer(tiny_model(), args, train_dataset=make_dataset(4), processing_class=tokenizer)
    assert trainer.layout == layout
    assert any("`neftune_noise_alpha`" in message for message in caplog.messages) == (layout == "padded")
    widths = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *hook: widths.append(hook[2].shape[:2]))
    trainer.train()
    assert (widths[0][0] > 1) == (layout == "padded")


def test_neftune_with_a_collator_of_packed_rows_is_refused(tokenizer, tmp_path):
    collator = PairCollator(tokenizer.pad_token_id, layout="shared_prefix")
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha` adds noise .* Set `pair_layout: padded`"):
        ORPOTrainer(
            tiny_model(), settings(tmp_path, neftune_noise_alpha=5.0), collator, make_dataset(4),
            processing_class=tokenizer,
        )  # fmt: skip
