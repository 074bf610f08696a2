"""`orpo-trl merge`: the merged model against weights that are added up by hand in float64, and what a user sees."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import reference
from support.models import tiny_of_type
from support.processes import ORPO_TRL, TRAIN_ENVIRONMENT
from support.small import TOKENIZER, make_rows, settings, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from orpo_trl import ORPOTrainer
from orpo_trl.cli import main
from orpo_trl.merge import MergeError, compare, merge_adapter
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import PairRules


def run(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)], prog_name="orpo-trl")


def make_adapter(folder: Path, model: PreTrainedModel, tokenizer=None, peft_type=LoraConfig, **options: Any) -> Path:
    """Base and adapter with random weights, in `folder/base` and `folder/adapter`; returns the latter."""
    model.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    if tokenizer is not None and len(tokenizer) > base.config.vocab_size:
        base.resize_token_embeddings(len(tokenizer))
    if peft_type is LoraConfig:
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **options}
    adapted: Any = get_peft_model(base, peft_type(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    adapted.save_pretrained(folder / "adapter")
    (tokenizer or AutoTokenizer.from_pretrained(TOKENIZER)).save_pretrained(folder / "adapter")
    return folder / "adapter"


def by_hand(folder: Path) -> PreTrainedModel:
    """Base and LoRA adapter of `make_adapter` as one model in float64, from their files: W + s B A, with DoRA's
    magnitudes m (W + s B A) / |W + s B A| (arXiv 2402.09353, equation 5)."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found = {name.removeprefix("base_model.model."): weight.double() for name, weight in
             load_file(folder / "adapter" / "adapter_model.safetensors").items()}  # fmt: skip
    weights = dict(model.named_parameters())
    for name in [name for name in found if name.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        change = scaling * found[f"{module}.lora_B.weight"] @ found[name]
        base = weights[f"{module}.weight"]
        new = base.data + (change.T if config["fan_in_fan_out"] else change)
        magnitude = found.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            new = magnitude[:, None] * new / new.norm(dim=1, keepdim=True)
        base.data = new
    return model


def pairs_of_20(tokenizer) -> list[dict]:
    return cast(list, prepare_pairs(Dataset.from_list(make_rows(20)), tokenizer, PairRules())[0])


@torch.no_grad()
def largest_difference(folder: Path, truth: Any, dtype: torch.dtype | str = torch.float64) -> float:
    """Of the mean token log-probabilities of 20 pairs: the model of a folder against another one."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    differences = []
    for pair in pairs_of_20(tokenizer):
        for side in ("chosen", "rejected"):
            texts = pair["prompt_ids"], pair[f"{side}_ids"]
            one, other = (reference.token_logps(found.eval(), *texts)[len(texts[0]) - 1 :] for found in (model, truth))
            differences.append(abs(one.double().mean() - other.double().mean()).item())
    return max(differences)


# ---- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"target_modules": "all-linear", "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_merged_weights_are_those_added_up_by_hand(options, tmp_path):
    adapter = make_adapter(tmp_path, tiny_model(), **options)
    found = merge_adapter(str(adapter), tmp_path / "merged")
    truth = by_hand(tmp_path)
    assert found.effect > 0.01
    assert found.difference < 1e-5
    assert largest_difference(tmp_path / "merged", truth) < 1e-6
    assert not list(tmp_path.glob("merged/adapter*"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in truth.state_dict().items():
        assert torch.allclose(merged[name].double(), weight, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_rounded_once(dtype, tmp_path):
    kind = getattr(torch, dtype)
    adapter = make_adapter(tmp_path, tiny_model().to(kind))
    merge_adapter(str(adapter), tmp_path / "merged")
    truth = by_hand(tmp_path)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {kind}
    for name, weight in truth.state_dict().items():
        # A sum in float32, rounded once, is at most half a unit in the last place away.
        assert torch.all((merged[name].double() - weight).abs() <= weight.abs() * torch.finfo(kind).eps * 0.51 + 1e-7)
    assert largest_difference(tmp_path / "merged", truth) < 0.01


def test_transposed_weights_are_merged(tmp_path):
    model = tiny_of_type("gpt2", vocab_size=768, n_positions=256)
    adapter = make_adapter(tmp_path, model, target_modules=["c_attn"], fan_in_fan_out=True)
    merge_adapter(str(adapter), tmp_path / "merged")
    assert largest_difference(tmp_path / "merged", by_hand(tmp_path)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}},
        {"bias": "all"},
    ],
    ids=str,
)
def test_embeddings_and_heads_that_were_trained_are_kept(options, tied, tmp_path):
    adapter = make_adapter(tmp_path, tiny_model(tie_word_embeddings=tied), **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    from peft import PeftModel

    truth = PeftModel.from_pretrained(base, str(adapter)).double()
    merge_adapter(str(adapter), tmp_path / "merged")
    assert largest_difference(tmp_path / "merged", truth) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    is_tied = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert is_tied == (merged.config.tie_word_embeddings and tied)


def test_tokens_that_training_added_stay(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    known = len(tokenizer)
    tokenizer.add_tokens([f"<new{number}>" for number in range(772 - known)])  # the embeddings have 768 rows
    adapter = make_adapter(tmp_path, tiny_model(), tokenizer, trainable_token_indices={"embed_tokens": [768, 769]},
                           modules_to_save=["lm_head"])  # fmt: skip
    merge_adapter(str(adapter), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged["model.embed_tokens.weight"].shape[0] == merged["lm_head.weight"].shape[0] == len(tokenizer) == 772
    of_adapter = load_file(adapter / "adapter_model.safetensors")
    head = next(weight for name, weight in of_adapter.items() if "lm_head" in name)
    assert torch.equal(merged["lm_head.weight"], head)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<new0>") == len(
        AutoTokenizer.from_pretrained(TOKENIZER)
    )


def quantised(folder: Path) -> None:
    """Turn `folder/base` into the 4-bit weights of itself."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.bfloat16)
    shutil.rmtree(folder / "base")
    model.save_pretrained(folder / "base")


def test_adapter_of_qlora_goes_onto_16_bit_weights(tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert largest_difference(tmp_path / "merged", by_hand(tmp_path)) < 0.01
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_base_of_quantised_weights_is_replaced_by_its_own(tmp_path):
    adapter = make_adapter(tmp_path, tiny_model().bfloat16())
    shutil.copytree(tmp_path / "base", tmp_path / "sixteen")
    truth = by_hand(tmp_path)
    quantised(tmp_path)
    # Without 16-bit weights, the stored ones are unpacked.
    merge_adapter(str(adapter), tmp_path / "unpacked")
    merged = load_file(tmp_path / "unpacked" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "unpacked" / "config.json").read_text())
    difference = largest_difference(tmp_path / "unpacked", truth)
    assert difference > 1e-3  # those of 4 bits
    merge_adapter(str(adapter), tmp_path / "named", base=str(tmp_path / "sixteen"))
    assert largest_difference(tmp_path / "named", truth) < min(0.01, difference)
    # A name that ends in -bnb-4bit stands for the weights of the name before.
    (tmp_path / "base").rename(tmp_path / "sixteen-bnb-4bit")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "sixteen-bnb-4bit")})
    )
    merge_adapter(str(adapter), tmp_path / "stripped")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("named", "stripped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- The check -------------------------------------------------------------------------------------------------------


def test_differences_beyond_rounding_are_refused():
    found = compare([-1.0, -2.0], [-1.5, -4.0], [-1.5001, -4.0003], torch.float32)
    assert (found.responses, found.effect) == (2, 2.0)
    assert found.difference == pytest.approx(3e-4)
    assert found.allowed == pytest.approx(4e-4)
    for after in ([-1.5, -4.01], [-1.5, float("nan")], [float("-inf"), -4.0]):
        with pytest.raises(MergeError, match="is not base and adapter"):
            compare([-1.0, -2.0], [-1.5, -4.0], after, torch.float32)


def test_a_model_that_is_written_wrong_is_not_kept(tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path, tiny_model())
    save = PreTrainedModel.save_pretrained

    def damaged(self, folder, **kwargs):
        self.model.norm.weight.data *= 1.05
        save(self, folder, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    before = sorted(os.listdir(tmp_path))
    done = run(adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 1
    assert "Nothing is kept." in done.stderr
    assert done.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_folder_of_a_run_is_merged_with_its_card_and_template(tokenizer, tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=9)
    model.save_pretrained(tmp_path / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    rows = Dataset.from_list(make_rows(8))
    trainer = ORPOTrainer(
        str(tmp_path / "base"), settings(tmp_path / "run"), train_dataset=rows, processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(20)))
    done = run(tmp_path / "run", "-o", tmp_path / "merged", "--data", tmp_path / "rows.jsonl")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'merged'}\n"
    assert "Log-probabilities of 40 responses: the adapter changes them by up to 0." in done.stderr
    assert f"vllm serve {tmp_path / 'merged'}" in done.stderr
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert generation.eos_token_id == [tokenizer.eos_token_id, 9]
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers"
    assert "The adapter run merged into the weights of its base model base" in card.text
    ours, _, of_adapter = card.text.partition("The card of the adapter:")
    assert "Jiwoo Hong" in of_adapter
    assert str(tmp_path) not in ours


def test_tokenizer_of_the_base_stands_in(tmp_path):
    adapter = make_adapter(tmp_path, tiny_model())
    for path in [path for path in adapter.iterdir() if not path.name.startswith("adapter_")]:
        shutil.move(path, tmp_path / "base" / path.name)
    done = run(adapter, "-o", tmp_path / "merged", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "The adapter has no tokenizer" in done.stderr
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(AutoTokenizer.from_pretrained(TOKENIZER))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling"])
def test_nothing_is_written_over(kind, tmp_path):
    adapter = make_adapter(tmp_path, tiny_model())
    target = tmp_path / "merged"
    (tmp_path / "elsewhere").mkdir()
    {
        "folder": target.mkdir,
        "file": target.touch,
        "link": lambda: target.symlink_to(tmp_path / "elsewhere"),
        "dangling": lambda: target.symlink_to(tmp_path / "absent"),
    }[kind]()
    before = sorted(os.listdir(tmp_path))
    done = run(adapter, "-o", target)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "exists already" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
    assert not list((tmp_path / "elsewhere").iterdir())


def _without(adapter: Path, part: str) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if part not in name}, adapter / "adapter_model.safetensors")


def _as_pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def _with_base(adapter: Path, **settings: Any) -> None:
    path = adapter.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda adapter: _without(adapter, "layers.1.self_attn.q_proj.lora_B"), "has not all of its weights"),
        (_as_pickle, "has weights as pickles (adapter_model.bin)"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda adapter: shutil.rmtree(adapter.parent / "base"), "can be named with --base"),
        (lambda adapter: _with_base(adapter, quantization_config={"quant_method": "awq"}), "quantised (awq)"),
        (
            lambda adapter: _with_base(adapter, model_type="own", auto_map={"AutoConfig": "own.Own"}),
            "comes with code of its own",
        ),
        (lambda adapter: shutil.rmtree(adapter), "does not exist"),
        (lambda adapter: shutil.copytree(adapter.parent / "base", adapter, dirs_exist_ok=True) and
         (adapter / "adapter_config.json").unlink(), "is a whole model, and no adapter"),
    ],
    ids=["half", "pickle", "damaged", "no-base", "awq", "remote-code", "absent", "whole-model"],
)  # fmt: skip
def test_wrong_input_ends_with_a_message(spoil, message, tmp_path):
    adapter = make_adapter(tmp_path, tiny_model())
    spoil(adapter)
    done = run(adapter, "-o", tmp_path / "merged")
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "merged").exists()


def test_prompt_tuning_is_refused(tmp_path):
    adapter = make_adapter(tmp_path, tiny_model(), peft_type=PromptTuningConfig, num_virtual_tokens=2)
    done = run(adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert "virtual tokens before the prompt (PromptTuningConfig)" in done.stderr


def test_quantised_weights_without_bitsandbytes_are_one_line(tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path, tiny_model())
    _with_base(adapter, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    monkeypatch.setattr("orpo_trl.merge.find_spec", lambda name: None)
    done = run(adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert "needs bitsandbytes: pip install 'orpo-trl[quant]'" in done.stderr


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_revision_of_its_base(tmp_path):
    """In a cache of the Hub, `main` of the base is another model."""
    adapter = make_adapter(tmp_path, tiny_model())
    cache = tmp_path / "cache" / "models--me--base"
    (cache / "refs").mkdir(parents=True)
    for name, number in (("main", "0"), ("v2", "1")):
        (cache / "refs" / name).write_text(number * 40)
        shutil.copytree(tmp_path / "base", cache / "snapshots" / (number * 40))
    other = tiny_model()
    other.model.embed_tokens.weight.data *= 2
    other.save_pretrained(cache / "snapshots" / ("0" * 40))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "me/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    subprocess.run(
        [ORPO_TRL, "merge", str(adapter), "-o", str(tmp_path / "merged"), "--dtype", "float32"], check=True,
        env={**TRAIN_ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    expected = dict(by_hand(tmp_path).named_parameters())
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)
