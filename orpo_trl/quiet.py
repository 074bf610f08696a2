"""Warnings of libraries that nobody can act on, and which are therefore not shown."""

import logging
import re
import warnings

# Warnings by the start of their message.
_WARNINGS = (
    # Every recipe uses the name that TRL's own configs use. transformers 5 knows both names.
    r"`gradient_checkpointing(_kwargs)?` is deprecated",
    # peft reads this property of the model.
    r"`is_gradient_checkpointing` is deprecated",
    # DeepSpeed calls these functions of torch by their old names.
    r"`torch\.distributed\.\w+` is deprecated",
)
# Log messages by their logger and the start of their text.
_LOG_MESSAGES = {
    # bitsandbytes logs at import that it has no kernel for 4 bits on a CPU. 4 bits are for GPUs here.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    # The user has chosen the CPU.
    "DeepSpeed": r"Setting accelerator to CPU",
    # Of a run that goes on. Its changes are checked and told by resume.py.
    "transformers.trainer_utils": r"Warning: The following arguments do not match the ones in the `trainer_state",
}


def hide_known_warnings() -> None:
    """Hide the warnings above in this process. All other warnings stay as they are.

    Call this before torch and transformers are imported: some of the warnings are of imports.
    """
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=FutureWarning)
    for name in _LOG_MESSAGES:
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not re.match(_LOG_MESSAGES[record.name], record.getMessage())
