"""Recipes: YAML files of settings that extend one another, are checked against the config classes, and come shipped.

`files` reads a file and its parents, `keys` knows every key and its type, `parse` turns both into the settings of a run,
`show` writes recipes and keys as text, `library` reads the headers of the shipped recipes.
"""
