"""Arguments of the chat template that a row brings."""

import json

import pytest

from orpo_trl.pairs.row_errors import RowError
from orpo_trl.pairs.template_options import template_options

WITH_NULLS = [{"name": "f", "parameters": {"unit": {"enum": ["m", None], "default": None}}}]


def test_json_text_is_kept_with_its_nulls():
    row = {"tools": json.dumps(WITH_NULLS), "documents": '[{"title": null}]', "chat_template_kwargs": '{"x": null}'}
    assert template_options(row) == {"tools": WITH_NULLS, "documents": [{"title": None}], "x": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, "column `tools`: expected JSON"),
        ({"tools": ["f"]}, "column `tools`: expected a list of mappings with a `name`"),
        (
            {"tools": '[{"name": "f", "description": "\\ud83d"}]'},
            "column `tools`: expected text without lone surrogates",
        ),
        ({"chat_template_kwargs": [1]}, "column `chat_template_kwargs`: expected a mapping"),
        ({"chat_template_kwargs": f'{{"x": {"9" * 5000}}}'}, "column `chat_template_kwargs`: expected JSON"),
        ({"documents": "[" * 150 + "]" * 150}, "column `documents`: expected values nested at most 100 deep"),
        ({"documents": "[" * 9999}, "column `documents`: expected JSON"),
    ],
)
def test_wrong_values_are_named_by_column(row, message):
    with pytest.raises(RowError) as error:
        template_options(row)
    assert message in str(error.value)


def test_numbers_above_64_bits_are_passed_on():
    assert template_options({"chat_template_kwargs": f'{{"x": {10**30}}}'}) == {"x": 10**30}


@pytest.mark.parametrize("documents", [3.5, [1], {"title": "a"}, "[1]"])
def test_documents_of_a_wrong_shape_are_refused_by_name(documents):
    with pytest.raises(RowError, match="column `documents`: expected a list of mappings or texts"):
        template_options({"documents": documents})


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_template_arguments_of_the_same_names_are_looked_at_too(name):
    with pytest.raises(RowError, match=f"column `{name}`: expected a list"):
        template_options({"chat_template_kwargs": {name: 1}})
