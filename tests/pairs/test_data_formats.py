"""Every row of docs/data_formats.md, through the preparation of training."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from datasets import Dataset

from orpo_trl.pairs.columns import ROW_COLUMNS
from orpo_trl.pairs.prepare import prepare_pairs
from orpo_trl.pairs.tokenize import DROP_REASONS, MALFORMED, UNRENDERED, PairRules

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
_PARTS = ("prompt", "chosen", "rejected")


class Example(NamedTuple):
    section: str
    row: dict
    rules: dict
    expected: dict[str, str]


def examples() -> list[Example]:
    """A ```json block is a row; each ```text block behind it has settings, and what becomes of the row with them."""
    found, section, row = [], "", {}
    blocks = re.finditer(r"^#+ ([^\n]+)$|^```json\n(.*?)^```$|^```text\n(?!\{)(.*?)^```$", DOCUMENT, re.M | re.S)
    for heading, text, result in (block.groups() for block in blocks):
        section, row = heading or section, json.loads(text) if text else row
        if result:
            lines = [re.fullmatch(r"(\w+)(:?) +(.*)", line) for line in result.splitlines()]
            assert all(lines), result
            cells = [line.groups() for line in lines if line]
            rules = {name: yaml.safe_load(value) for name, colon, value in cells if colon}
            found.append(Example(section, row, rules, {name: value for name, colon, value in cells if not colon}))
    return found


def refusals() -> list[tuple[str, str]]:
    """Rows and the words of their errors: each row is a line of JSON with an indented line behind it."""
    blocks = re.findall(r"^```text\n(\{.*?)^```$", DOCUMENT, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [(row, words.strip()) for row, words in zip(lines[::2], lines[1::2], strict=True)]


@pytest.fixture
def templated(tokenizer):
    (tokenizer.chat_template,) = re.findall(r"^```jinja\n(.*?)^```$", DOCUMENT, re.M | re.S)
    return tokenizer


def visible(text: str) -> str:
    return re.sub(r"^ | $", "·", text.replace("\n", "↵"))


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"{example.section}-{example.rules}")
def test_row_becomes_what_the_document_says(templated, example):
    rows = Dataset.from_list([example.row])
    if reason := example.expected.get("dropped"):
        with pytest.raises(ValueError, match=re.escape(f"dropped, {reason}: 1 (row 0)")):
            prepare_pairs(rows, templated, PairRules(**example.rules))
        return
    pairs, report = prepare_pairs(rows, templated, PairRules(**example.rules))
    ids = {part: pairs[0][f"{part}_ids"] for part in _PARTS}
    becomes = {part: visible(templated.decode(ids[part])) for part in _PARTS if ids[part] is not None}
    remarks = "; ".join(report.sources["train"].remarks)
    assert becomes | ({"warning": remarks} if remarks else {}) == example.expected
    assert report.sources["train"].unread == []


@pytest.mark.parametrize(("row", "words"), refusals())
def test_row_is_refused_with_the_words_of_the_document(templated, row, words):
    is_of_row = words.startswith("column")
    with pytest.raises(ValueError, match=re.escape(("train, row 0: " if is_of_row else "") + words)):
        prepare_pairs(Dataset.from_list([json.loads(row)]), templated, PairRules())


def test_document_names_every_column_and_every_reason_to_drop_a_row():
    used = {name for example in examples() for name in example.row}
    used |= {name for row, _ in refusals() for name in json.loads(row)}
    media = {"image", "audio", "audios", "video", "videos"}  # as `images`
    assert set(ROW_COLUMNS) - media <= used
    shown = {example.expected.get("dropped") for example in examples()}
    assert set(DROP_REASONS) - {MALFORMED, UNRENDERED} <= shown


def test_every_link_leads_to_a_section():
    headings = re.findall(r"^#+ (.+)$", DOCUMENT, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#(.+?)\)", DOCUMENT)
    assert links
    assert set(links) <= anchors
