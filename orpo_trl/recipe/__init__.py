"""Recipes: YAML files of settings that extend one another, are checked against the config classes, and come shipped.

`files` reads a file and its parents, `keys` has every key and its type, `parse` makes the settings of a run from both,
`show` writes recipes and keys as text, `library` reads the headers of the shipped recipes.
"""
