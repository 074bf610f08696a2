"""The kinds of remarks on a row: what a chat template left out of it, and what else is worth a warning.

Names alone, so that reports are read without the libraries that make them.
"""

# What a template left out on purpose: it belongs to no answer that is trained. All other kinds are faults.
EARLIER_THOUGHTS = "thoughts of earlier turns left out"

LOST_TURN = {
    "system": "system text lost",
    "developer": "system text lost",
    "user": "user text lost",
    "assistant": "earlier answer lost",
    "tool": "tool result lost",
}
ANSWER = "answer shortened"
REASONING = "reasoning lost"
TOOL_CALL = "tool call lost"
TOOLS = "tools not rendered"
DOCUMENTS = "documents not rendered"
CHANGED = "rendered otherwise once a response follows"
LOST_OTHER = "text of another role lost"
_LOSSES = {*LOST_TURN.values(), LOST_OTHER, ANSWER, REASONING, TOOL_CALL, TOOLS, DOCUMENTS}


def is_fault(kind: str) -> bool:
    """Whether a remark of this kind is worth a warning."""
    return kind != EARLIER_THOUGHTS


def is_loss(kind: str) -> bool:
    """Whether a remark of this kind says that a template left out words that it should have rendered."""
    return kind in _LOSSES or kind.endswith(CHANGED)
