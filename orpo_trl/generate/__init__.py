"""Answers of a model to the prompts of a benchmark or of a file."""
