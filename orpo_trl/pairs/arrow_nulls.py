"""Nulls that Arrow fills absent keys with, told apart from those that a row means."""

from collections.abc import Mapping
from typing import Any

from datasets import Json


def without_filling(value: Any, feature: Any = None) -> Any:
    """A nested value without the nulls that Arrow fills the absent keys of mappings with.

    Arrow gives all mappings at one place of a column the same keys. Where they differ, the mappings are not Arrow's
    (rows in Python, parsed JSON), and all of their nulls are meant. So are nulls inside lists, and those of the type
    `Json` of `datasets`, which reads JSON Lines whose mappings differ. A null in mappings of equal keys cannot be told
    from a filled one and goes.

    Args:
        value: as a row holds it.
        feature: its type, such as `Dataset.features` has it; None where it is not known.
    """
    return _at_one_place([value], feature)[0]


def _at_one_place(values: list[Any], feature: Any) -> list[Any]:
    """Values that stand at one place of a column."""
    mappings = [value for value in values if isinstance(value, Mapping)]
    lists = [value for value in values if isinstance(value, list)]
    is_exact = isinstance(feature, Json) or any(value.keys() != mappings[0].keys() for value in mappings)
    if is_exact or not (mappings or lists):
        return values
    features = feature if isinstance(feature, Mapping) else {}
    keys = mappings[0] if mappings else ()
    columns = {key: iter(_at_one_place([value[key] for value in mappings], features.get(key))) for key in keys}
    items = iter(_at_one_place([item for value in lists for item in value], getattr(feature, "feature", None)))

    def rebuilt(value: Any) -> Any:
        if isinstance(value, Mapping):
            filled = {key: next(column) for key, column in columns.items()}
            return {key: item for key, item in filled.items() if item is not None}
        return [next(items) for _ in value] if isinstance(value, list) else value

    return [rebuilt(value) for value in values]
