"""ORPO training on TRL: `from orpo_trl import ORPOConfig, ORPOTrainer`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo_trl.config import ORPOConfig as ORPOConfig
    from orpo_trl.pairs.prepare import prepare_pairs as prepare_pairs
    from orpo_trl.scoring.logps import score_pairs as score_pairs
    from orpo_trl.trainer import ORPOTrainer as ORPOTrainer

__version__ = version("orpo-trl")

# Imported on first use: torch and transformers take seconds to load, and `import orpo_trl` should not.
_EXPORTS = {
    "ORPOConfig": "orpo_trl.config",
    "ORPOTrainer": "orpo_trl.trainer",
    "prepare_pairs": "orpo_trl.pairs.prepare",
    "score_pairs": "orpo_trl.scoring.logps",
}
__all__ = ["ORPOConfig", "ORPOTrainer", "prepare_pairs", "score_pairs"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'orpo_trl' has no attribute {name!r}")
