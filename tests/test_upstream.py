"""The contract with other libraries: what they do not promise, and the package needs, is there and does what it must.

Raising a version bound: run this file with the new version. A failure names what is missing, and what it is for.
"""

import ast
import copy
import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.small import REPOSITORY, TOKENIZER, make_dataset, settings, tiny_model
from transformers import MistralConfig

import orpo_trl
from orpo_trl import ORPOTrainer, upstream
from orpo_trl.upstream import NEEDS, UpstreamError

PACKAGE = Path(orpo_trl.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "shipped" not in path.parts)
FILES += sorted((REPOSITORY / "scripts").glob("*.py"))
# Public names of these modules are documented. All other modules of the libraries may change without notice.
PUBLIC_MODULES = {
    "trl", "transformers", "transformers.integrations", "transformers.utils.logging", "accelerate", "accelerate.utils",
    "datasets", "datasets.exceptions", "peft", "wandb", "wandb.errors", "deepspeed", "bitsandbytes", "torch",
    "torch.nn", "torch.nn.functional", "torch.nn.attention.varlen", "torch.nn.parallel", "torch.utils.data",
    "torch.distributed", "transformers.training_args.OptimizerNames",  # which the page of TrainingArguments names
}  # fmt: skip
# Attributes that a parent or a metaclass writes into each subclass.
WRITTEN_BY_PARENTS = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
LIBRARIES = {name.partition(".")[0] for name in PUBLIC_MODULES}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    folder = tmp_path_factory.mktemp("trainer")
    return ORPOTrainer(tiny_model(), settings(folder), train_dataset=make_dataset(8), processing_class=tokenizer)


@pytest.fixture
def instances(trainer):
    """An object of each class whose attributes exist on instances alone."""
    from transformers.integrations import TensorBoardCallback, WandbCallback

    rows = Dataset.from_list([{"a": 1}])
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5])
    return {
        "Trainer": trainer,
        "SFTTrainer": trainer,
        "Dataset": rows,
        "WandbCallback": WandbCallback(),
        "TensorBoardCallback": TensorBoardCallback(),
        "BatchRebalanceSampler": trainer.train_sampler(trainer.train_dataset),
        "GradientState": trainer.accelerator.gradient_state,
        "AcceleratedOptimizer": trainer.accelerator.prepare(torch.optim.SGD(trainer.model.parameters())),
        "TrainableTokensWrapper": get_peft_model(tiny_model(), tokens).get_input_embeddings(),
    }


def find(need, instances) -> object:
    return need.find(instances[need.path.split(".")[-2]] if need.is_of_instances else None)


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.path)
def test_each_name_is_there_and_takes_its_parameters(need, instances):
    find(need, instances)


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.path)
def test_a_name_that_is_gone_is_named_with_its_need_and_the_supported_versions(need, instances, monkeypatch):
    owner_path, _, name = need.path.rpartition(".")
    if need.is_of_instances:
        of = owner_path.split(".")[-1]
        instances[of] = copy.copy(instances[of])
        owner = instances[of]
    else:
        owner = upstream._resolve(owner_path)
        if isinstance(owner, type):  # of every class that has it
            for parent in owner.__mro__:
                if name in vars(parent) and parent is not owner:
                    monkeypatch.delattr(parent, name)
            if name not in vars(owner):
                owner = None
        elif "__getattr__" in vars(owner) or type(owner) is not types.ModuleType:  # a lazy module would import it anew
            getattr(owner, name)
            lazy = types.ModuleType(owner_path)
            vars(lazy).update({key: value for key, value in vars(owner).items() if key != "__getattr__"})
            monkeypatch.setattr(upstream, "_resolve", lambda path: lazy)
            owner = lazy
    if owner is not None:
        monkeypatch.delattr(owner, name)
    with pytest.raises(UpstreamError) as raised:
        find(need, instances)
    for part in (need.path, need.why, upstream.supported_versions(need.package), "does not exist"):
        assert part in str(raised.value)


@pytest.mark.parametrize("need", [need for need in NEEDS if need.parameters], ids=lambda need: need.path)
def test_a_changed_signature_is_named(need, monkeypatch):
    owner_path, _, name = need.path.rpartition(".")
    monkeypatch.setattr(upstream._resolve(owner_path), name, lambda other: None)
    with pytest.raises(UpstreamError, match="does not take") as raised:
        need.find()
    assert all(part in str(raised.value) for part in (need.path, need.why, *need.parameters))


def test_supported_versions_are_those_of_the_package():
    assert upstream.supported_versions("trl") == "trl<1.17,>=1.16"
    assert upstream.supported_versions("transformers") == "transformers<6,>=5.17"


def test_all_missing_names_are_listed_at_once(monkeypatch):
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.delattr(chunked_logprob, "TOKEN_CHUNK_SIZE")
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(UpstreamError) as raised:
        upstream.check_needs()
    assert "TOKEN_CHUNK_SIZE" in str(raised.value)
    assert "add_fused_lm_head" in str(raised.value)


# ---- What the names must do ------------------------------------------------------------------------------------------


def test_fused_head_gives_the_log_probabilities_of_the_labels():
    model = tiny_model(vocabulary=50)
    ids = torch.arange(1, 13)[None]
    labels = torch.cat([ids[0, 1:], torch.tensor([-100])])[None]
    expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    upstream.add_fused_lm_head(model)
    logps, outputs = upstream.run_fused_head(model, {"input_ids": ids, "shift_labels": labels})
    torch.testing.assert_close(logps[0, :-1], expected)
    assert logps[0, -1] == 0
    assert getattr(outputs, "logits", None) is None


@pytest.mark.parametrize("is_all_scored", [False, True])
def test_where_all_positions_are_scored_the_head_does_not_pick_them(monkeypatch, is_all_scored):
    """On a GPU each pick by a mask waits for the device. TRL's head picks where `_use_triton` finds one."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from trl.trainer import utils

    picks = []

    class Picks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
                picks.append(func)
            return func(*args, **(kwargs or {}))

    model = tiny_model(vocabulary=50)
    upstream.add_fused_lm_head(model)
    ids = torch.arange(1, 33)[None]
    inputs = {"input_ids": ids, "shift_labels": torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)}
    expected, _ = upstream.run_fused_head(model, inputs)
    for module in (upstream, utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
    with Picks():
        logps, _ = upstream.run_fused_head(model, inputs, is_all_scored)
    assert len(picks) == (0 if is_all_scored else 2)  # hidden states and labels
    torch.testing.assert_close(logps, expected)
    assert utils._use_triton(torch.device("cpu"))  # as before the call


def test_the_head_computes_the_tiles_that_a_cpu_is_given(monkeypatch):
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 4096)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)
    monkeypatch.setitem(upstream.HEAD_TILES, "cpu", (8, 16))
    upstream.use_cpu_head_tiles()
    model = tiny_model(vocabulary=50)
    upstream.add_fused_lm_head(model)
    sizes = []
    upstream_watch = lambda tensor: sizes.append(tuple(tensor.shape))  # noqa: E731
    ids = torch.arange(1, 33)[None]
    with upstream.watching_tensors(upstream_watch), torch.no_grad():
        upstream.run_fused_head(model, {"input_ids": ids, "shift_labels": ids})
    assert (8, 16) in sizes
    assert not any(len(size) == 2 and size[-1] == 50 and size[0] > 8 for size in sizes)


def test_selective_checkpointing_keeps_the_attention_of_packed_rows():
    from torch.utils.checkpoint import CheckpointPolicy
    from trl.models import selective_activation_checkpointing as selective

    policy = selective._build_policy_fn(selective._aten_attention_ops())
    kept = [torch.ops.torch_attn._varlen_attn.default, torch.ops.aten._scaled_dot_product_flash_attention.default]
    assert {policy(None, op) for op in kept} == {CheckpointPolicy.MUST_SAVE}
    assert policy(None, torch.ops.aten.mm.default) == CheckpointPolicy.PREFER_RECOMPUTE


def test_the_name_of_an_attention_is_read_and_set():
    config = MistralConfig()
    upstream.set_attention_name(config, "sdpa")
    assert upstream.attention_name(config) == "sdpa"
    assert not upstream.is_flash_attention_requested(config)
    assert callable(upstream.eager_attention(tiny_model()))


def test_a_fingerprint_depends_on_the_rows_and_on_each_part():
    rows = Dataset.from_list([{"a": 1}])
    other = rows.map(lambda row: {"a": 2})
    prints = {upstream.fingerprint(rows, "x"), upstream.fingerprint(rows, "y"), upstream.fingerprint(other, "x")}
    assert len(prints) == 3
    assert upstream.fingerprint(rows, "x") in prints


def test_the_trainer_leaves_a_rank_aware_sampler_to_its_rank(trainer):
    loader = trainer.get_train_dataloader()
    assert isinstance(trainer.train_sampler(trainer.train_dataset), upstream.RankAwareSampler)
    rows = sum(len(batch["completion_lengths"]) - batch["num_pairs"] for batch in loader)
    assert rows == len(trainer.train_dataset)


def test_a_pass_before_the_last_does_not_synchronise_gradients(trainer):
    state = trainer.accelerator.gradient_state
    before = state.sync_gradients
    with trainer.accumulating(trainer.model):
        assert not state.sync_gradients
    assert state.sync_gradients == before


def test_every_hook_of_the_trainer_is_called_in_a_run(tmp_path, tokenizer):
    """A hook that the libraries no longer call would leave a run with another loss, other rows, or no card."""
    called = []

    class Spying(ORPOTrainer):
        pass

    def spy(name):
        own = getattr(ORPOTrainer, name)

        def method(self, *args, **kwargs):
            called.append(name)
            return own(self, *args, **kwargs)

        setattr(Spying, name, method)

    hooks = ("prepare_dataset", "train_sampler", "eval_sampler", "begin_epoch", "step_totals", "saving_checkpoint",
             "create_model_card", "passes", "may_step", "before_events", "after_events", "before_saving")  # fmt: skip
    for hook in hooks:
        spy(hook)
    args = settings(
        tmp_path, save_strategy="steps", save_steps=1, max_steps=1, include_num_input_tokens_seen="all",
        gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    rows = make_dataset(8)
    trainer = Spying(tiny_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.evaluate()
    assert set(called) == set(hooks)
    assert trainer.state.num_input_tokens_seen > 0


def test_the_trainer_does_not_divide_the_loss_again(tokenizer, tmp_path):
    """Also for a model that takes no loss arguments."""
    norms = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = tiny_model()
        model.accepts_loss_kwargs = False
        args = settings(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        trainer = ORPOTrainer(model, args, train_dataset=make_dataset(4), processing_class=tokenizer)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_step_whose_pairs_are_not_counted_is_refused(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(UpstreamError, match="has not counted the pairs of the optimiser step"):
        trainer.training_step(trainer.model, batch, None)


def test_a_name_that_is_gone_stops_the_trainer_before_anything_is_loaded(tmp_path, monkeypatch):
    from transformers.trainer import Trainer

    monkeypatch.delattr(Trainer, "_get_num_items_in_batch")
    with pytest.raises(UpstreamError, match="_get_num_items_in_batch"):
        ORPOTrainer("absent", settings(tmp_path), train_dataset=make_dataset(2))


def test_small_helpers_do_what_they_are_needed_for(tmp_path):
    assert upstream.pad([torch.tensor([1]), torch.tensor([2, 3])], padding_value=0, padding_side="left").tolist() == [
        [0, 1],
        [2, 3],
    ]
    model = tiny_model(attention_dropout=0.5)
    model.add_module("dropout", torch.nn.Dropout(0.5))
    upstream.disable_dropout_in_model(model)
    assert model.dropout.p == 0
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    assert upstream.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert upstream.find_adapter_config_file(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert upstream.find_adapter_config_file(str(tmp_path)) == str(tmp_path / "adapter_config.json")
    model.config.name_or_path = "org/model"
    assert upstream.get_config_model_id(model.config) == "org/model"


def test_balanced_micro_batches_hold_each_row_of_the_step_once():
    lengths = [9, 1, 5, 5, 2, 8, 3, 7]
    samplers = [
        upstream.RankAwareSampler(lengths, effective_batch_size=8, dp_size=2, grad_accum=2, rank=rank)
        for rank in range(2)
    ]
    rows = [row for sampler in samplers for part in sampler.balanced(list(range(8))) for row in part]
    assert sorted(rows) == list(range(8))


def test_fake_tensors_take_no_memory():
    with upstream.fake_tensors():
        made = torch.empty(2**40)
    assert made.shape == (2**40,)


# ---- No private name elsewhere ---------------------------------------------------------------------------------------


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def is_private(name: str) -> bool:
    of_python = ("_replace", "_exit")  # of named tuples and of os
    return name.startswith("_") and not name.startswith("__") and name not in of_python


def defined_names(trees) -> set[str]:
    """Every name that the package itself gives to something."""
    found = set()
    for path, tree in trees.items():
        if path.name == "upstream.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_other_libraries_are_used_in_upstream_alone():
    parsed = trees()
    ours = defined_names(parsed)
    used = [
        f"{path.name}:{node.lineno}: {node.attr}"
        for path, tree in parsed.items()
        if path.name != "upstream.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in ours
    ]
    used += [
        f"{path.name}:{node.lineno}: {argument.value}"
        for path, tree in parsed.items()
        if path.name != "upstream.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr")
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and is_private(argument.value)
    ]
    assert used == []


def test_modules_that_libraries_do_not_document_are_imported_in_upstream_alone():
    used = []
    for path, tree in trees().items():
        if path.name == "upstream.py":
            continue
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                whole = {module, *(f"{module}.{name}" for name in names)}
                is_public = module in PUBLIC_MODULES or bool(whole & PUBLIC_MODULES)
                if module.partition(".")[0] in LIBRARIES and (not is_public or any(map(is_private, names))):
                    used.append(f"{path.name}:{node.lineno}: {module}")
    assert used == []


def test_private_methods_of_other_libraries_are_overridden_in_upstream_alone():
    overridden = []
    for module in pkgutil.walk_packages(orpo_trl.__path__, "orpo_trl."):
        if module.name.startswith("orpo_trl.shipped"):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != module.name or module.name == "orpo_trl.upstream":
                continue
            parents = [parent for parent in cls.__mro__[1:] if not parent.__module__.startswith("orpo_trl.")]
            overridden += [
                f"{cls.__name__}.{name}"
                for name in vars(cls)
                if is_private(name)
                and name not in WRITTEN_BY_PARENTS
                and any(name in vars(parent) for parent in parents)
            ]
    assert overridden == []
