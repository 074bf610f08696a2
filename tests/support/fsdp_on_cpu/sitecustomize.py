"""Python runs this at its start where this folder is on its path: FSDP2 of scripts/run_orpo.py on a CPU."""

import os
import sys

if "RANK" in os.environ and any(word.endswith("run_orpo.py") for word in sys.orig_argv):
    from support.run_job import allow_fsdp_on_cpu

    allow_fsdp_on_cpu()
    sys.argv += ["--accelerator_config.use_configured_state", "true"]
