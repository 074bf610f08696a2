"""The model card of a run, and what `push_to_hub` carries."""

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from support.small import make_dataset, settings, tiny_model

from orpo_trl import ORPOTrainer


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
    assert {"trl", "orpo", "orpo-trl"} <= set(card.data.tags)
    assert card.data.datasets == "org/farm"
    text = card.text
    assert "None" not in text
    assert 'model="farm"' in text
    for part in ("title     = {{ORPO}: Monolithic", "2403.07691", "8 rows read", "````yaml\nbeta: 0.25"):
        assert part in text
    metrics = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert f"| eval | log odds ratio | {metrics['eval_log_odds_chosen']:.4f} |" in text
    assert f"| eval | accuracy: chosen more likely than rejected | {metrics['eval_rewards/accuracies']:.4f} |" in text
    assert "](logps.png)" in text
    with Image.open(tmp_path / "farm" / "logps.png") as picture:
        assert picture.width >= 500
    assert (text.count("### Framework versions"), text.count("### Recipe")) == (1, 1)


def test_base_model_of_the_hub_is_linked_to(trainer, tmp_path):
    trainer.model.config._name_or_path = "org/base"
    trainer.train()
    trainer.create_model_card(model_name="farm")
    assert "[org/base](https://huggingface.co/org/base)" in (tmp_path / "farm" / "README.md").read_text()


def test_card_without_a_run_is_trls(trainer, tmp_path):
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
    (tmp_path / "farm" / "metrics.jsonl").write_text("edited\nby hand\n")
    trainer.create_model_card(model_name="farm")
    assert "metrics.jsonl:1: expected a JSON object, received 'edited'" in caplog.text
    assert (tmp_path / "farm" / "README.md").is_file()
