"""A hostile recipe, model, dataset, template, checkpoint or folder costs one message and a status, and runs no code."""

import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from support.hostile import DATA, Answer, copy_of_model, edit_json, orpo_trl, payload, run_orpo
from support.run_folders import write_run

from orpo_trl import weights
from orpo_trl.weights import UnsafeWeights, refuse_unsafe_checkpoint

DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture
def canary(tmp_path):
    """A file that an attack makes when its code runs."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the attack has run"


@pytest.fixture
def model(tmp_path):
    return copy_of_model(tmp_path / "model")


@pytest.fixture
def recipe(tmp_path, model):
    """One step of the quickstart, of a model in the test's folder."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"extends: quickstart.yaml\nmodel_name_or_path: {model}\noutput_dir: {tmp_path}/out\nmax_steps: 1\n"
        "eval_strategy: 'no'\n"
    )
    return path


def refused(answer: Answer, words: str) -> None:
    assert answer.error is None, answer.error
    assert answer.status == 2, answer.text
    assert "Traceback" not in answer.text
    assert words in answer.text


# ---- Recipes ---------------------------------------------------------------------------------------------------------


def bomb() -> str:
    return "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run_name: !!python/object/apply:os.system ['touch CANARY']\n", "the tag tag:yaml.org,2002:python/object"),
        (bomb(), "aliases (`*name`) are not read"),
        ("extends: recipe.yaml\n", "`extends` goes in a circle"),
        ("extends: /dev/zero\n", "`extends`: there is no file /dev/zero"),
        ("extends: pipe.yaml\n", "`extends`: there is no file pipe.yaml"),
        ("extends: ../../../../../../etc/passwd\n", "a recipe is a mapping of keys to values"),
        ("a: " + "[" * 100_000, "nested too deep"),
        ("extends: quickstart.yaml\nlearning_rate: " + "9" * 10_000 + "\n", "expected a finite number"),
        ("extends: quickstart.yaml\nseed: 0x" + "f" * 5_000 + "\n", "expected a whole number"),
        ("extends: quickstart.yaml\nlearning_rate: .nan\n", "expected a finite number, received nan"),
        ("extends: quickstart.yaml\ndeepspeed: /dev/zero\n", "expected zero2, zero3 or an existing JSON file"),
        ("extends: quickstart.yaml\noptim: os.system\n", "`optim`: expected one of"),
        ("extends: quickstart.yaml\nmodel_init_kwargs: {trust_remote_code: true}\n", "set `trust_remote_code: true`"),
        ("extends: quickstart.yaml\nmodel_init_kwargs: {use_safetensors: false}\n", "from safetensors alone"),
        ("extends: quickstart.yaml\nmodel_init_kwargs: {weights_only: false}\n", "from safetensors alone"),
        ("extends: quickstart.yaml\nmodel_init_kwargs: {allow_all_kernels: true}\n", "code from anywhere on the Hub"),
    ],
    ids=[
        "tag", "bomb", "circle", "device", "pipe", "outside", "deep", "digits", "hexadecimal", "nan", "deepspeed",
        "optim", "remote_code", "safetensors", "weights_only", "kernels",
    ],
)  # fmt: skip
def test_recipe_is_refused(text, words, tmp_path, canary):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "recipe.yaml").write_text(text.replace("CANARY", str(canary)))
    refused(orpo_trl("train", "--dry_run", tmp_path / "recipe.yaml"), words)


def test_recipe_of_100_megabytes_a_pipe_and_a_device_are_not_read(tmp_path):
    big, pipe = tmp_path / "big.yaml", tmp_path / "pipe.yaml"
    with open(big, "wb") as file:
        file.truncate(100_000_000)
    os.mkfifo(pipe)
    for path, words in ((big, "at most 1,048,576 bytes"), (pipe, "a pipe or a device"), ("/dev/zero", "a device")):
        refused(orpo_trl("train", "--dry_run", path), words)
        refused(orpo_trl("recipes", "import", path), words)


# ---- Models ----------------------------------------------------------------------------------------------------------


def make_pickle(model: Path, canary: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(payload(canary))


def make_benign_pickle(model: Path, canary: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def make_index_of_pickles(model: Path, canary: Path) -> None:
    make_pickle(model, canary)
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def make_index_outside(model: Path, canary: Path) -> None:
    index = {"weight_map": {"a": "../../a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def make_named_pickle(model: Path, canary: Path) -> None:
    edit_json(model / "config.json", transformers_weights="adapter_model.bin")
    (model / "adapter_model.bin").write_bytes(payload(canary))


def make_pickled_adapter_beside(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model), "peft_type": "LORA"}))
    (model / "adapter_model.bin").write_bytes(payload(canary))


def make_code(model: Path, canary: Path) -> None:
    edit_json(
        model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")


def make_deep_config(model: Path, canary: Path) -> None:
    (model / "config.json").write_text(DEEP)


def make_deep_tokenizer(model: Path, canary: Path) -> None:
    (model / "tokenizer_config.json").write_text(DEEP)


def make_damaged_tokenizer(model: Path, canary: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')


def make_pipe_for_config(model: Path, canary: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")


def make_endless_tokenizer(model: Path, canary: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("/dev/zero")


def make_long_header(model: Path, canary: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**62))


def make_lying_offsets(model: Path, canary: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [2**60, 2**60 + 8]}}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def make_pipe_for_weights(model: Path, canary: Path) -> None:
    os.mkfifo(model / "model.safetensors")


MODELS = {
    make_pickle: "has weights as pickles (pytorch_model.bin) and not as safetensors",
    make_benign_pickle: "save it with `save_pretrained`, which writes safetensors",
    make_index_of_pickles: "expected names of safetensors beside it, received 'pytorch_model.bin'",
    make_index_outside: "expected names of safetensors beside it, received '../../a.safetensors'",
    make_named_pickle: "`transformers_weights`: expected safetensors, received 'adapter_model.bin'",
    make_pickled_adapter_beside: "has weights as pickles (adapter_model.bin)",
    make_code: "comes with code of its own, which is not run",
    make_deep_config: "maximum recursion depth",
    make_deep_tokenizer: "The tokenizer of",
    make_damaged_tokenizer: "The tokenizer of",
    make_pipe_for_config: "config.json",
    make_endless_tokenizer: "tokenizer",
    make_long_header: "header too large",
    make_lying_offsets: "invalid offset",
    make_pipe_for_weights: "no file named model.safetensors",
}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_model_is_refused(make, recipe, model, canary):
    make(model, canary)
    refused(run_orpo(recipe, "--from_scratch", "false"), MODELS[make])
    refused(orpo_trl("logps", model, DATA, "--split", "test"), MODELS[make])
    if make in (make_pickle, make_index_of_pickles, make_code, make_deep_config, make_deep_tokenizer):
        answer = orpo_trl("check", recipe, "--from_scratch", "false")
        assert answer.error is None
        assert answer.status == 1
        assert MODELS[make] in answer.text


def test_adapter_is_read_from_safetensors_alone(tmp_path, model, canary):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(model), "peft_type": "LORA"})
    )
    (adapter / "adapter_model.bin").write_bytes(payload(canary))
    refused(orpo_trl("logps", adapter, DATA, "--tokenizer", model), "has weights as pickles (adapter_model.bin)")


def test_code_of_the_tokenizer_of_a_template_is_not_run_and_nobody_is_asked(recipe, model, canary, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    edit_json(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="EvilTokenizer"
    )
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    answer = run_orpo(recipe, "--chat_template_path", model)
    assert answer.error is None


# ---- Datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pkl", "pt", "bin", "py", "npy"])
def test_dataset_of_a_kind_that_can_run_code_is_refused(ending, recipe, tmp_path, canary):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(payload(canary))
    refused(run_orpo(recipe, "--dataset_name", path), "expected a file ending in .json, .jsonl, .parquet, .csv")


def test_loading_script_is_refused(recipe, tmp_path, canary):
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(canary)!r}, 'w')\n")
    refused(run_orpo(recipe, "--dataset_name", folder), "Dataset scripts are no longer supported")


def test_dataset_that_is_a_pipe_or_names_files_outside_is_refused(recipe, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ../../../../etc/passwd\n---\n")
    for name, words in (("pipe.jsonl", "pipe.jsonl"), ("zero.jsonl", "zero.jsonl"), ("outside", "no data that could")):
        refused(run_orpo(recipe, "--dataset_name", tmp_path / name), words)


def test_names_and_rows_send_no_control_characters_to_the_terminal(recipe, tmp_path):
    path = tmp_path / "a\x1b[31mb.jsonl"
    path.write_text(json.dumps({"prompt": "\x1b]0;title\x07", "chosen": {"\x1b[2J": 1}}) + "\n")
    answer = run_orpo(recipe, "--dataset_name", path)
    refused(answer, r"a\x1b[31mb.jsonl, row 0")
    assert not set(answer.text) & {"\x1b", "\x07"}
    answer = orpo_trl("report", tmp_path / "c\x1b[31m")
    refused(answer, r"c\x1b[31m")
    assert "\x1b" not in answer.text


# ---- Templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10**10 }}", "asks for more than 1 GiB of memory"),
        ("{{ 'x'.ljust(10**10) }}", "asks for more than 1 GiB of memory"),
        ("{{ 'x'|center(10**10) }}", "asks for more than 1 GiB of memory"),
        ("{{ '%10000000000d'|format(1) }}", "asks for more than 1 GiB of memory"),
        ("{{ ([1] * 10**10)|length }}", "asks for more than 1 GiB of memory"),
        ("{{ 'a' * 20000000 }}", "renders 20,000,000 characters for a pair"),
        ("{% for i in range(10**9) %}x{% endfor %}", "asks for too large a number: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "asks for what Jinja's sandbox refuses"),
        ("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "asks for what Jinja's sandbox refuses"),
        ("{{ messages.append(1) }}", "asks for what Jinja's sandbox refuses"),
        ("{% include '/etc/passwd' %}", "expected turns that the chat template accepts"),
    ],
    ids=[
        "product", "ljust", "center", "format", "list", "length", "range", "recursion", "class", "globals", "append",
        "include",
    ],
)  # fmt: skip
def test_template_is_stopped(template, words, recipe, tmp_path, canary):
    path = tmp_path / "template.jinja"
    path.write_text(template.replace("CANARY", str(canary)))
    refused(run_orpo(recipe, "--chat_template_path", path), words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% set a = j %}{% endfor %}{% endfor %}",
            "within 10 s",
        ),
        # Jinja computes it while it reads the template, and swallows the first error there.
        ("{{ 10**(10**8) }}", "within 10 seconds"),
        # Which limit it meets first, time or memory, is a matter of the machine.
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99 }}{% endfor %}{% endfor %}",
            "of memory|within 10 s",
        ),
    ],
    ids=["loop", "power", "output"],
)
def test_template_without_end_is_stopped(template, words, recipe, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    answer = run_orpo(recipe, "--chat_template_path", path)
    refused(answer, "")
    assert re.search(words, answer.text)


def test_template_file_of_another_kind_is_not_read(recipe, tmp_path):
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "zero.jinja").symlink_to("/dev/zero")
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "big.jinja").write_bytes(b"x" * (1 << 21))
    (tmp_path / "latin.jinja").write_bytes(b"\xff\xfe")
    for name, words in (
        ("pipe", "a pipe or a device"),
        ("zero", "a pipe or a device"),
        ("folder", "received a folder"),
        ("big", "at most 1,048,576 bytes"),
        ("latin", "expected UTF-8 text"),
    ):
        refused(run_orpo(recipe, "--chat_template_path", tmp_path / f"{name}.jinja"), words)


# ---- Output folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["README.md", "metrics.jsonl", "run.json", "model.safetensors", "config.json", "checkpoint-1", "runs", "logps.png"],
)
def test_nothing_is_written_through_a_link_in_the_output_folder(name, recipe, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    refused(run_orpo(recipe), f"it holds links to other folders, pipes or devices: '{name}'")
    assert victim.read_text() == "precious"


def test_output_folder_of_another_kind_is_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "root").symlink_to("/")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "metrics.jsonl")
    for name, words in (
        ("file", "received a file"),
        ("file/below", "is a file"),
        ("root", "received the root of the file system"),
        ("dangling", "which does not exist"),
        ("piped", "'metrics.jsonl'"),
        ("x" * 300, "too long"),
    ):
        refused(run_orpo(recipe, "--output_dir", tmp_path / name), words)


def test_a_link_inside_of_the_output_folder_and_a_linked_folder_are_fine(recipe, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "best").symlink_to("checkpoint-1")
    answer = run_orpo(recipe)
    assert (answer.status, answer.error) == (0, None), answer.text
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_output_of_a_command_is_not_written_through_a_link(tmp_path, model):
    for name in ("o.yaml", "o.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "new")
    (tmp_path / "axolotl.yaml").write_text("rl: orpo\nbase_model: x\n")
    refused(orpo_trl("recipes", "import", tmp_path / "axolotl.yaml", "-o", tmp_path / "o.yaml"), "exists already")
    refused(orpo_trl("logps", model, DATA, "-o", tmp_path / "o.jsonl"), "exists already")
    assert not (tmp_path / "new").exists()


# ---- Folders of runs -------------------------------------------------------------------------------------------------


def test_report_replaces_a_link_in_its_place(tmp_path):
    folder, victim = write_run(tmp_path / "run"), tmp_path / "victim.html"
    victim.write_text("precious")
    (folder / "report.html").symlink_to(victim)
    assert orpo_trl("report", folder).status == 0
    assert victim.read_text() == "precious"
    assert not (folder / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "samples.jsonl", "recipe.yaml", "preparation.json"])
def test_file_of_a_run_that_is_no_plain_file_is_not_read(name, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"step": 1}')
    made = {
        "linked": (lambda path: path.symlink_to(secret), "outside of the run's folder"),
        "piped": (os.mkfifo, "expected a"),
        "sparse": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), "expected a file of at"),
    }
    for kind, (make, words) in made.items():
        folder = write_run(tmp_path / kind)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        refused(orpo_trl("report", folder), words)
        assert not (folder / "report.html").exists()


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"step": ' + "9" * 10_000 + "}\n{}"], ids=["deep", "digits"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "samples.jsonl", "preparation.json"])
def test_json_of_a_run_that_cannot_be_read_is_named(name, text, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    refused(orpo_trl("report", folder), f"{name}")


def test_recipe_of_a_run_reads_no_other_file_and_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_MARKER", "marker-of-the-environment")
    (tmp_path / "private.yaml").write_text("hub_model_id: marker-of-the-file\n")
    recipe = "extends: ../private.yaml\nrun_name: ${ORPO_MARKER}\nbeta: 0.1\n"
    folders = [
        write_run(tmp_path / name, recipe=recipe.replace("0.1", beta)) for name, beta in zip("ab", "12", strict=True)
    ]
    assert orpo_trl("report", *folders, "-o", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    assert "marker-of" not in page
    assert "${ORPO_MARKER}" in page


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(content)
    return folder


def zipped(content: bytes, path: Path) -> bytes:
    """As `torch.save` writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path.read_bytes()


def test_checkpoint_whose_pickles_would_run_code_is_refused(tmp_path, recipe, canary):
    code = payload(canary)
    modern = pickle.dumps(os.system, protocol=4)
    files = {
        "pytorch_model.bin": code,
        "adapter_model.bin": code,
        "global_step1/mp_rank_00_model_states.pt": zipped(code, tmp_path / "a.zip"),
        "global_step1/zero_pp_rank_0.pt": code,
        "pytorch_model_fsdp_0/.metadata": code,
        "optimizer_0/.metadata": modern,
    }
    for number, (name, content) in enumerate(files.items()):
        folder = checkpoint(tmp_path / f"checkpoint-{number}", name, content)
        with pytest.raises(UnsafeWeights, match=r"is not loaded: it would call (posix|nt)\.system|it is not read"):
            refuse_unsafe_checkpoint(folder)
    refused(run_orpo(recipe, "--resume_from_checkpoint", tmp_path / "checkpoint-2"), "it would call")


def test_sharded_checkpoint_of_torch_is_accepted(tmp_path):
    state = {"w": torch.ones(2, 2), "half": torch.ones(2, dtype=torch.bfloat16), "lr": 1e-3, "betas": (0.9, 0.99)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "checkpoint-1" / "optimizer_0", no_dist=True)
    assert (tmp_path / "checkpoint-1" / "optimizer_0" / ".metadata").is_file()
    refuse_unsafe_checkpoint(tmp_path / "checkpoint-1")


class Attribute:
    """Pickles as `getattr(owner, name)`, as Python 3.11.0 to 3.11.3 do with members of enumerations."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_only_members_of_enumerations_are_taken_by_getattr(tmp_path):
    from torch.distributed.checkpoint import metadata

    def checkpoint_with(owner, name, protocol=2):
        code = pickle.dumps(Attribute(owner, name), protocol)
        return checkpoint(tmp_path / f"{owner.__name__}-{name}-{protocol}", "global_step1/a.pt", code)

    encodings = metadata._MEM_FORMAT_ENCODING
    for protocol in (2, 4):
        refuse_unsafe_checkpoint(checkpoint_with(encodings, "TORCH_CHANNELS_LAST", protocol))
    for owner, name in ((encodings, "mro"), (encodings, "__class__"), (metadata.Metadata, "__init__")):
        with pytest.raises(UnsafeWeights, match=r"it would call builtins\.getattr"):
            refuse_unsafe_checkpoint(checkpoint_with(owner, name))


def test_pickle_that_hides_a_name_behind_another_is_refused(tmp_path, canary):
    """Instructions that put one name on the stack, and take it off again, would deceive a reader of instructions."""
    text = lambda word: b"\x8c" + bytes([len(word)]) + word.encode()  # noqa: E731
    hidden = text("os") + text("system") + text("collections") + text("OrderedDict") + b"00" + b"\x93"
    code = b"\x80\x04" + hidden + text(f"touch {canary}") + b"\x85R."
    with pytest.raises(UnsafeWeights, match=r"it would call os\.system"):
        refuse_unsafe_checkpoint(checkpoint(tmp_path / "checkpoint-1", "global_step1/a.pt", code))


@pytest.mark.parametrize(
    ("module", "name", "is_known"),
    [
        ("torch.optim.adam", "Adam", True),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", True),
        ("torch", "load", False),  # a function
        ("torch.hub", "load", False),
        ("torch._utils", "os.system", False),  # by way of what it has imported
        ("torch.serialization", "Any", False),
        ("torch.absent", "Adam", False),
        ("subprocess", "Popen", False),
        ("builtins", "eval", False),
    ],
)
def test_classes_of_engines_and_optimizers_may_be_in_a_checkpoint_and_functions_may_not(module, name, is_known):
    assert weights._is_known(module, name) == is_known
