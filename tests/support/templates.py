"""The chat templates that TRL ships."""

from pathlib import Path

import trl

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
assert TEMPLATES  # else tests that go through them would test nothing
