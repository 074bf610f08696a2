"""Tasks of lm-eval: the Open LLM Leaderboard, and any other by its name. `ifeval.py` is a task of it too.

lm-eval's own code makes prompts, runs the model and scores. What is decided here is what the leaderboard decided (shots
and metric), where the rows come from, and how a model is loaded. With `accelerate launch`, each GPU takes its share of
the items.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_trl.config import ModelArguments
from orpo_trl.devices import count_gpus, torch_device
from orpo_trl.evaluate.options import Options, Target
from orpo_trl.evaluate.tasks import KNOWN, load_tasks, task_manager
from orpo_trl.evaluations import Evaluation, Figure
from orpo_trl.model import naming
from orpo_trl.run_folder import now
from orpo_trl.scoring.models import adapter_config_file, base_of, load_scoring_tokenizer, require_model
from orpo_trl.versions import installed_versions
from orpo_trl.weights import refuse_pickled_adapter

PACKAGES = (
    "orpo-trl", "lm_eval", "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "nltk",
    "langdetect",
)  # fmt: skip
# Of lm-eval's command line. `options.seed` is the other ones.
_PYTHON_SEED = 0


def evaluate_task(target: Target, options: Options) -> Evaluation | None:
    """A task of lm-eval: those of the leaderboard with its shots, others as they are. No chat template.

    Returns:
        Its metrics under lm-eval's names, the leaderboard's first; `mmlu` as the leaderboard, the plain mean over
        subjects (`acc`), and over questions (`acc_by_question`).

    Raises:
        ValueError, OSError: for what the user can mend.
    """
    name = options.benchmark
    known = KNOWN.get(name)
    tasks, source = load_tasks(name, options)
    results = run_tasks(target, options, tasks, shots=known.shots if known else None, has_chat_template=False)
    if results is None:
        return None
    figures, groups = _mmlu(results) if name == "mmlu" else (_figures(name, results), {})
    first = known.metric if known else next(iter(figures), "")
    figures = {key: figures[key] for key in sorted(figures, key=lambda key: key != first)}
    shots = {results["n-shot"][task] for task in results["configs"]}
    return evaluation_of(
        target, options, results, figures,
        template=None, shots=shots.pop() if len(shots) == 1 else None, groups=groups, settings=source,
    )  # fmt: skip


# ---- The model -------------------------------------------------------------------------------------------------------


def run_tasks(
    target: Target, options: Options, tasks: list[Any], *, shots: int | None, has_chat_template: bool
) -> dict[str, Any] | None:
    """lm-eval's results; None on all processes but the first.

    Args:
        tasks: as `load_tasks` returns them.
        shots: examples before each question, of tasks that do not fix them; None: the tasks' own.

    Raises:
        ValueError: where the model cannot be loaded, or does not hold what is to be generated.
    """
    import lm_eval
    from lm_eval import evaluator

    # It asks git for the revision of the current folder, and git writes "fatal" where that is no repository.
    evaluator.get_git_commit_hash = lambda: None
    simple_evaluate: Any = lm_eval.simple_evaluate  # decorators hide its parameters from pyright
    model = _language_model(
        target.need_model(options.benchmark), options.dtype, options.device, options.batch_size,
        options.chat_template_path, options.trust_remote_code,
    )  # fmt: skip
    if has_chat_template and model.tokenizer.chat_template is None:
        raise ValueError(f"{target.name}: its tokenizer has no chat template. Name one: --chat_template_path")
    new_tokens = options.max_new_tokens
    try:
        found = simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=shots,
            batch_size=options.batch_size,
            limit=options.limit,
            apply_chat_template=has_chat_template,
            gen_kwargs=None if new_tokens is None else {"max_gen_toks": new_tokens},
            task_manager=task_manager(known.folder if (known := KNOWN.get(options.benchmark)) else None),
            random_seed=_PYTHON_SEED,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except AssertionError as error:
        if "max tokens to generate" not in str(error):
            raise
        raise ValueError(
            f"{options.benchmark}: expected fewer new tokens than the {model.max_length:,} that the model reads. Set "
            "--max_new_tokens"
        ) from error
    return None if found is None else dict(found)


@lru_cache(1)
def _language_model(
    name: str, dtype: str, device: str | None, batch_size: int, template: str | None, trust_remote_code: bool
) -> Any:
    """The model as lm-eval runs it, kept for the next benchmark; weights are read from safetensors alone."""
    from lm_eval.models import huggingface

    make: Any = huggingface.HFLM
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > max(count_gpus(), 1):
        raise ValueError(f"expected a GPU for each of {processes} processes, and this machine has {count_gpus()}")
    arguments = ModelArguments(model_name_or_path=name, dtype=dtype)
    require_model(arguments, trust_remote_code)
    tokenizer = load_scoring_tokenizer(arguments, template, trust_remote_code)
    base, adapter, revision = name, None, None
    file = adapter_config_file(arguments)
    if file is not None:
        refuse_pickled_adapter(name)
        (base, revision), adapter = base_of(Path(file)), name
        if revision is not None and not Path(name).is_dir():  # lm-eval asks the Hub for one revision of both
            raise ValueError(f"{name}: its base is revision {revision} of {base}. Download the adapter, or merge it.")
    with naming("weights", name):
        return make(
            pretrained=base,
            revision=revision or "main",
            peft=adapter,
            tokenizer=tokenizer,
            dtype=dtype,
            device=str(torch_device(device)),
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )


# ---- Results ---------------------------------------------------------------------------------------------------------


def evaluation_of(
    target: Target,
    options: Options,
    results: Mapping[str, Any],
    figures: dict[str, Figure],
    *,
    template: str | None,
    shots: int | None,
    settings: Mapping[str, Any],
    groups: dict[str, dict[str, dict[str, Figure]]] | None = None,
) -> Evaluation:
    """What lm-eval measured, with every setting."""
    config, configs = results["config"], results["configs"]
    samples = results["n-samples"].values()
    asked = sum(found["effective"] for found in samples)
    some = next(iter(configs.values()))
    recorded = {
        **settings,
        "dtype": str(config.get("model_dtype", options.dtype)).removeprefix("torch."),
        "device": torch_device(options.device).type,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "task_versions": {name: results["versions"].get(name) for name in configs},
        "output_type": some.get("output_type"),
        **_generation(some),
    }
    return Evaluation(
        benchmark=options.benchmark, model=target.name, figures=figures, asked=asked, answered=asked,
        template=template, shots=shots, judge=None, limit=options.limit, settings=recorded,
        versions=installed_versions(PACKAGES), date=now(), groups=groups or {},
    )  # fmt: skip


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("output_type") != "generate_until":
        return {}
    generation = config["generation_kwargs"]
    return {"generation": generation, "max_new_tokens": generation.get("max_gen_toks")}


def _figures(name: str, results: Mapping[str, Any]) -> dict[str, Figure]:
    """Metrics of a task, or of the whole of a group. The first filter has no name in the figure's name."""
    found = {**results["results"], **results.get("groups", {})}
    metrics = found.get(name) or next(iter(found.values()))
    n = sum(results["n-samples"][task]["effective"] for task in results["n-samples"])
    figures: dict[str, Figure] = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        shown = metric if metric not in figures else f"{metric}_{filtered}"
        figures[shown] = Figure(value=value, stderr=error if isinstance(error, float) else None, n=n)
    return figures


def _mmlu(results: Mapping[str, Any]) -> tuple[dict[str, Figure], dict[str, dict[str, dict[str, Figure]]]]:
    """The leaderboard's mean over subjects, lm-eval's over questions, and each subject."""
    subjects = {
        task.removeprefix("mmlu_"): Figure(
            value=results["results"][task]["acc,none"],
            stderr=_number(results["results"][task].get("acc_stderr,none")),
            n=count["effective"],
        )
        for task, count in results["n-samples"].items()
    }
    found = list(subjects.values())
    n = [figure.n or 0 for figure in found]
    by_subject = _mean(found, [1 / len(found)] * len(found), sum(n))
    by_question = _mean(found, [count / sum(n) for count in n], sum(n))
    groups = {"subject": {subject: {"acc": figure} for subject, figure in subjects.items()}}
    return {"acc": by_subject, "acc_by_question": by_question}, groups


def _mean(figures: list[Figure], weights: list[float], n: int) -> Figure:
    """Weighted mean of independent figures: its variance is the sum of the weighted ones."""
    value = sum(weight * figure.value for weight, figure in zip(weights, figures, strict=True))
    errors = [figure.stderr for figure in figures]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Figure(value=value, n=n)
    variance = sum((weight * error) ** 2 for weight, error in zip(weights, known, strict=True))
    return Figure(value=value, stderr=variance**0.5, n=n)


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None
