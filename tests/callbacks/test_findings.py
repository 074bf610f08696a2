"""What a real run warns of while it trains, and what its page says of it afterwards."""

from datasets import Dataset
from support.run_folders import Page
from support.small import WORDS, settings, tiny_model

from orpo_trl import ORPOTrainer
from orpo_trl.report.page import render
from orpo_trl.report.run import read_run


def pairs(count: int, swapped: bool = False) -> Dataset:
    """Rows of one length, whose chosen responses say `year`."""
    texts = [f"{WORDS[row % len(WORDS)]} {WORDS[row // len(WORDS)]}:" for row in range(count)]
    sides = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    return Dataset.from_list([{"prompt": text, sides[0]: " year year", sides[1]: " day day"} for text in texts])


def test_evaluation_set_with_inverted_columns_is_named_in_warning_and_page(tokenizer, tmp_path, caplog):
    args = settings(tmp_path, max_steps=12, eval_strategy="steps", eval_steps=6, eval_on_start=True, beta=0.5)
    trainer = ORPOTrainer(
        tiny_model(), args, train_dataset=pairs(40), processing_class=tokenizer,
        eval_dataset={"right": pairs(30), "inverted": pairs(30, swapped=True)},
    )  # fmt: skip
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "below 0.5" in record.getMessage()]
    assert len(warnings) == 1
    assert "0.000 at step 6 (`inverted`, 30 pairs, " in warnings[0]
    assert "before training)" in warnings[0]
    assert "so look at the held-out pairs first" in warnings[0]
    page = Page(render([read_run(tmp_path)]))
    (finding,) = [text for text in page.of("li") if "below 0.5" in text]
    assert "0.000 at step 12 (`inverted`, 30 pairs, " in finding
    assert "`right`" not in finding
    assert page.of("column") == ["before", "after"]
