"""Rows of any accepted shape to token ids of prompt, chosen and rejected.

`load` names to datasets, `rows` one row to one pair, `tokenize` pairs to ids, `prepare` all of it with a report.
"""
