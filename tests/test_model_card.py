"""The model card of a run, and what `push_to_hub` carries."""

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from support.evaluations import evaluation
from support.small import make_dataset, settings, tiny_model

from orpo_trl import ORPOTrainer, model_card
from orpo_trl.evaluations import write_evaluation
from orpo_trl.metrics import METRICS
from orpo_trl.run_folder import append_log


@pytest.fixture
def trainer(tokenizer, tmp_path, request):
    args = settings(
        tmp_path / "farm", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, beta=0.25,
        generate_during_eval=getattr(request, "param", False),
    )  # fmt: skip
    trainer = ORPOTrainer(
        tiny_model(), args, train_dataset=make_dataset(8), eval_dataset=make_dataset(3, seed=1),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.recipe = "beta: 0.25  # ``` a fence\n"
    return trainer


def test_card_has_citation_recipe_data_figures_and_curve(trainer, tmp_path):
    trainer.train()
    trainer.create_model_card(model_name="farm", dataset_name="org/farm")
    card = ModelCard.load(tmp_path / "farm" / "README.md")
    assert card.data.to_dict() == {
        "datasets": ["org/farm"], "library_name": "transformers", "model_name": "farm",
        "tags": ["trl", "orpo", "orpo-trl"],
    }  # fmt: skip
    text = card.text
    assert "None" not in text
    assert 'model="farm"' in text
    for part in ("title     = {{ORPO}: Monolithic", "2403.07691", "8 rows read", "````yaml\nbeta: 0.25"):
        assert part in text
    metrics = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    for name in ("log_odds_chosen", "rewards/accuracies"):
        assert f"| eval | {METRICS[name].heading} | {metrics[f'eval_{name}']:.4f} |" in text
    assert "](logps.png)" in text
    with Image.open(tmp_path / "farm" / "logps.png") as picture:
        assert picture.width >= 500
    assert (text.count("### Framework versions"), text.count("### Recipe")) == (1, 1)


def test_base_model_of_the_hub_is_linked_to(trainer, tmp_path):
    trainer.model.config._name_or_path = "org/base"
    trainer.train()
    trainer.create_model_card(model_name="farm")
    assert "[org/base](https://huggingface.co/org/base)" in (tmp_path / "farm" / "README.md").read_text()


def test_card_without_a_run_has_no_recipe(trainer, tmp_path):
    trainer.create_model_card(model_name="farm")
    text = (tmp_path / "farm" / "README.md").read_text()
    assert "None" not in text
    assert "### Recipe" not in text


@pytest.mark.parametrize("trainer", [True], indirect=True, ids=["with samples"])
def test_push_to_hub_carries_what_the_run_left(trainer, tmp_path, monkeypatch):
    """There is no Hub here: what stands in its place notes which files would go."""
    sent = {}

    def upload_folder(self, *, folder_path, ignore_patterns, repo_id, **kwargs):
        files = [path.relative_to(folder_path).as_posix() for path in tmp_path.glob("farm/**/*") if path.is_file()]
        sent[repo_id] = set(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer.train()
    trainer.hub_model_id = "me/farm"
    trainer.push_to_hub()
    assert {
        "README.md", "logps.png", "recipe.yaml", "run.json", "preparation.json", "metrics.jsonl", "samples.jsonl",
        "model.safetensors",
    } <= sent["me/farm"]  # fmt: skip
    assert 'model="me/farm"' in (tmp_path / "farm" / "README.md").read_text()


def test_card_that_cannot_be_completed_does_not_stop_a_run(trainer, tmp_path, caplog):
    trainer.train()
    (tmp_path / "farm" / "README.md").unlink()
    (tmp_path / "farm" / "metrics.jsonl").write_text("edited\nby hand\n")
    trainer.create_model_card(model_name="farm")
    assert "metrics.jsonl:1: expected a JSON object, received 'edited'" in caplog.text
    text = (tmp_path / "farm" / "README.md").read_text()
    assert "## Quick start" in text
    assert "### Recipe" not in text


FACTS = {
    "model_name": "farm", "source": "farm", "base_model": "", "dataset_name": None, "tags": ("trl",),
    "is_adapter": False, "is_chat": True, "versions": {}, "pages": {},
}  # fmt: skip


def front_matter(folder, **facts) -> dict:
    model_card.write_card(folder, **{**FACTS, **facts})
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_adapter_belongs_to_peft_and_names_its_base(tmp_path):
    data = front_matter(tmp_path, is_adapter=True, base_model="org/base")
    assert (data["library_name"], data["base_model"]) == ("peft", "org/base")
    assert "An adapter for [org/base](https://huggingface.co/org/base), trained" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("base", ["", "org/base", "a/path/of/three", "/an/absolute/path"])
def test_license_that_is_not_known_is_not_stated_and_a_path_is_no_base_model(tmp_path, base):
    data = front_matter(tmp_path, base_model=base)
    assert not [key for key in data if key.startswith("licen")]
    assert data.get("base_model") == ("org/base" if base == "org/base" else None)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# x", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("no front matter", {}),
        ("---\nlicense: [\n---\n", {}),
    ],
)
def test_license_is_the_one_in_the_card_of_the_base_model(tmp_path, card, expected):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    data = front_matter(tmp_path, base_model=str(base))
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    assert "base_model" not in data


def test_recipe_names_the_datasets_and_random_weights_have_no_base(tmp_path):
    append_log(tmp_path, {"step": 1, "loss": 1.0})
    sources = "[{path: org/one}, {path: json, data_files: a.json}, {path: ./local}]"
    (tmp_path / "recipe.yaml").write_text(f"datasets: {sources}\nfrom_scratch: true\n")
    data = front_matter(tmp_path, base_model="org/config")
    assert data["datasets"] == ["org/one"]
    assert "base_model" not in data
    assert "datasets/org/one)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("is_chat", [True, False])
def test_quick_start_of_the_card_runs(tokenizer, tmp_path, monkeypatch, capsys, is_chat):
    tiny_model().save_pretrained(tmp_path / "farm")
    tokenizer.save_pretrained(tmp_path / "farm")
    front_matter(tmp_path / "farm", is_chat=is_chat)
    text = (tmp_path / "farm" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip()


def test_several_datasets_are_all_named(tmp_path):
    assert front_matter(tmp_path, dataset_name=["org/one", "org/two"])["datasets"] == ["org/one", "org/two"]


# ---- Evaluations -----------------------------------------------------------------------------------------------------


def test_evaluations_of_a_run_are_in_its_card(tmp_path):
    write_evaluation(tmp_path, evaluation("ifeval", {"prompt_strict": {"value": 0.5287, "stderr": 0.02}}))
    (result,) = ModelCard.load(write_farm_card(tmp_path)).data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("google/IFEval", "prompt_strict", 0.5287)
    assert "| IFEval | prompts, strict | 0.5287 ± 0.0200 | 541 |" in (tmp_path / "README.md").read_text()


def write_farm_card(folder):
    model_card.write_card(folder, **FACTS)
    return folder / "README.md"


def test_card_is_refreshed_in_its_block_alone(tmp_path):
    path = write_farm_card(tmp_path)
    path.write_text(path.read_text().replace("# farm", "# My farm\n\nWritten by me."))
    before = path.read_text()
    write_evaluation(tmp_path, evaluation("alpaca_eval_2", {"win_rate": 12.0}))
    assert model_card.refresh_card(tmp_path)
    write_evaluation(tmp_path, evaluation("alpaca_eval_2", {"win_rate": 13.0}))
    assert model_card.refresh_card(tmp_path)
    card = ModelCard.load(path)
    assert [result.metric_value for result in card.data.eval_results] == [13.0]
    assert "| AlpacaEval 2 | win rate (%) | 13.00 | 805 | weighted_alpaca_eval_gpt4_turbo |" in card.text
    assert card.text.count("## Evaluation") == 1
    (tmp_path / "evaluations" / "alpaca_eval_2-weighted_alpaca_eval_gpt4_turbo.json").unlink()
    assert model_card.refresh_card(tmp_path)
    assert path.read_text().replace("model_name: farm\n", "") == before.replace("model_name: farm\n", "")


def test_results_of_others_in_the_card_stay(tmp_path):
    path = write_farm_card(tmp_path)
    theirs = """\
model-index:
- name: farm
  results:
  - task: {type: text-generation}
    dataset: {type: theirs, name: Theirs}
    metrics: [{type: acc, value: 0.25}]
"""
    path.write_text(path.read_text().replace("---\n", f"---\n{theirs}", 1))
    write_evaluation(tmp_path, evaluation("ifeval", {"prompt_strict": 0.5}))
    for _ in range(2):
        assert model_card.refresh_card(tmp_path)
    found = [(result.dataset_type, result.metric_value) for result in ModelCard.load(path).data.eval_results]
    assert found == [("theirs", 0.25), ("google/IFEval", 0.5)]


def test_part_of_a_benchmark_is_told_in_the_text_and_not_to_the_hub(tmp_path):
    write_evaluation(tmp_path, evaluation("ifeval", {"prompt_strict": 0.5}, answered=60, asked=60, limit=60))
    card = ModelCard.load(write_farm_card(tmp_path))
    assert card.data.eval_results is None
    assert "60, the first 60 alone" in card.text


@pytest.mark.parametrize("text", ["# mine\n", "", "---\nlicense: mit\n---\n<!-- evaluation: end -->"])
def test_card_without_the_block_is_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    write_evaluation(tmp_path, evaluation("ifeval", {"prompt_strict": 0.5}))
    assert not model_card.refresh_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_front_matter_that_cannot_be_read_is_left_as_it_is(tmp_path, caplog):
    path = write_farm_card(tmp_path)
    path.write_text(path.read_text().replace("---\n", "---\nmodel-index: 3\n", 1))
    write_evaluation(tmp_path, evaluation("ifeval", {"prompt_strict": 0.5}))
    assert model_card.refresh_card(tmp_path)
    assert path.read_text().startswith("---\nmodel-index: 3\n")
    assert "| IFEval |" in path.read_text()
    assert "front matter is left as it is" in caplog.text


def test_text_of_judges_and_tasks_is_no_markup_of_the_card(tmp_path):
    marks = "<!-- evaluation: begin, made by orpo-trl --> <!-- evaluation: end -->"
    evil = f"x | <script>a()</script> {marks} [a](https://e.vil) \x1b[31m\n---\n# title"
    plain = write_farm_card(tmp_path).read_text()
    write_evaluation(tmp_path, evaluation(evil, {evil: 0.5}, judge=evil, template=evil, notes=[evil]))
    for _ in range(2):
        assert model_card.refresh_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body
    assert "\x1b" not in text
    assert "[a](https" not in body.replace("\\[", "")
    assert body.count("<!-- evaluation: end -->") == 1
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        *[line for line in plain.split("\n---\n", 1)[1].splitlines() if line.startswith("# ") or "Quick" in line],
        "## Evaluation",
        *[line for line in plain.splitlines() if line.startswith("#") and ("Framework" in line or "Citations" in line)],
    ]
