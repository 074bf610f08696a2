"""Recipes: YAML files of settings, composed by `extends`, checked against the config classes, and shipped as a library.

`files` reads a file and its parents, `keys` knows every key and its type, `parse` makes the settings of a run of both,
`foreign` reads other tools' configs, `library` the shipped recipes.
"""
