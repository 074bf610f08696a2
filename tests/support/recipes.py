"""Reads a recipe as the entry point does."""

from orpo_trl.recipe.parse import Settings, build_settings, load_recipe


def parse_recipe(arguments: list[str]) -> Settings:
    """Settings from `RECIPE [--key value …]`."""
    return build_settings(load_recipe(arguments))
