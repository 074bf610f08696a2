"""Values as people read them."""

from typing import Any

NOTHING = "–"


def show(value: Any, digits: int = 4, is_measured: bool = False) -> str:
    """A number with so many significant digits and thousands separated; other values as text, None as a dash.

    Args:
        value: of any type.
        digits: shown of a float.
        is_measured: whether zeros at the end are shown, as digits that were measured.
    """
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if abs(value) >= 1000:
        text = f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3e}"
    else:
        text = f"{value:#.{digits}g}" if is_measured else f"{value:.{digits}g}"
    mantissa, _, exponent = text.replace("-", "−", text[0] == "-").partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa.rstrip(".")


def duration(seconds: float | None) -> str:
    """`2 h 31 min`, `4 min 05 s`, `12 s`."""
    if seconds is None or seconds < 0:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def shorten(text: str, most: int = 30) -> str:
    """One printable line of at most so many characters, cut in the middle because names differ at their ends."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
