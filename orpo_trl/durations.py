"""Lengths of time as people write them."""

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TEXT = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?")


def read_duration(value: str | float) -> float:
    """Seconds that `90s`, `45m`, `3h50m`, `1d2h`, or a number of seconds stand for.

    Raises:
        ValueError: for any other text, and for what is not above 0.
    """
    wrong = ValueError(f"expected a time such as 90s, 45m, 3h50m or 1d2h, or seconds as a number, received {value!r}")
    if isinstance(value, str):
        found = _TEXT.fullmatch(value.strip().lower())
        if found is None:
            raise wrong
        value = float(sum(int(count or 0) * unit for count, unit in zip(found.groups(), _UNITS.values(), strict=True)))
    if isinstance(value, bool) or not 0 < value < float("inf"):
        raise wrong
    return float(value)
