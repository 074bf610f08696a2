"""Text from rows, names and files of others, on its way to a terminal."""

import re

# A terminal obeys control characters: they move its cursor, change its title, or hide what was printed. Those for the
# direction of writing show a text in another order than it has. Half a surrogate pair has no bytes in UTF-8.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_UNSAFE}]")
# Left where we colour text ourselves: colours and nothing else.
_CONTROL_BUT_COLORS = re.compile(rf"\x1b\[[0-9;]*m|([{_UNSAFE}])")


def printable(text: str, has_colors: bool = False) -> str:
    """Text with control characters as escapes such as `\\x1b`; line ends and tabs stay.

    Args:
        text: of any origin.
        has_colors: whether colours of ANSI terminals stay as well.
    """
    if has_colors:
        return _CONTROL_BUT_COLORS.sub(lambda match: _escape(match[0]) if match[1] else match[0], text)
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
