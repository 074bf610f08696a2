"""What the trainer's import loads: each process of a run pays for it."""

import subprocess
import sys

HEAVY = ("matplotlib", "jinja2", "wandb", "deepspeed", "tensorboard", "torch.utils.tensorboard")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def test_trainer_loads_nothing_heavy_that_its_libraries_do_not_load():
    """transformers itself loads jinja2, and TRL's base trainer wandb where it is installed."""
    libraries = loaded_by("from trl import SFTTrainer")
    assert libraries <= {"jinja2", "wandb"}
    assert loaded_by("import orpo_trl.trainer") <= libraries
