"""From a model and prompts to a file of answers."""

import hashlib
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from orpo_trl.callbacks.record import installed_versions
from orpo_trl.commands import Unfinished
from orpo_trl.devices import this_process, torch_device
from orpo_trl.endpoint import Endpoint
from orpo_trl.generate.benchmarks import BENCHMARKS, Answered, Benchmark, conversations_of, settings_file
from orpo_trl.generate.engines import Engine, LocalModel, Prompt, RemoteModel
from orpo_trl.generate.journal import Answer, Journal, differences, now, remove_journals
from orpo_trl.generate.prompts import Conversation
from orpo_trl.generate.sampling import Sampling, seed_of
from orpo_trl.plain_files import read_text, write_text
from orpo_trl.printable import printable

# A process that is done waits for the slowest one.
_LONGEST_WAIT = timedelta(days=30)


def generate_answers(
    model: str,
    prompts: str,
    output: Path,
    *,
    data: Path | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 42,
    endpoint: str | None = None,
    workers: int = 8,
    timeout: float = 600.0,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 16,
    chat_template_path: str | None = None,
    trust_remote_code: bool = False,
    default_template: str | None = None,
) -> Path:
    """Write a model's answers to a benchmark, or to the prompts of a file, in the benchmark's own format.

    Answers are kept as they are made, in `output`.partial: after a kill, the same call completes the file. Beside it,
    `output`.settings.json holds all that decided the answers. Each answer has a seed of its own, and batches do not
    depend on restarts or on the number of processes. Other batches (`batch_size`, `limit`) round otherwise: in float32
    the answers stay the same but for exact ties, in bfloat16 some do not.

    Args:
        model: Hub id or folder, of a model or of a PEFT adapter; with `endpoint`, the name that the server knows.
        prompts: 'alpaca_eval', 'mt_bench', 'ifeval', or a file that `read_prompts` takes.
        output: file to write; it is replaced in one step.
        data: the benchmark's prompts; None: from the Hub.
        limit: the first prompts alone.
        max_new_tokens, temperature: of an answer; None: the benchmark's. Temperature 0 is greedy.
        top_p: share of the probability that is kept.
        seed: with the place of a prompt, decides its answer.
        endpoint: address of an OpenAI-compatible server that answers instead; `workers` requests at a time, and
            `timeout` seconds for each.
        device, dtype, batch_size, chat_template_path, trust_remote_code, default_template: as in `LocalModel`.

    Returns:
        `output`.

    Raises:
        Unfinished: where a server has not answered all.
        ValueError, OSError: for what the user can fix.
    """
    _check_folder(output)
    benchmark, conversations = conversations_of(prompts, data)
    conversations = conversations[:limit]
    if endpoint is not None:
        _refuse_for_endpoint(
            device=device, dtype=dtype, chat_template_path=chat_template_path, trust_remote_code=trust_remote_code
        )
    state = _processes(endpoint)
    if not sys.stderr.isatty() or state.process_index:
        transformers_logging.disable_progress_bar()
    if endpoint is not None:
        engine: Engine = RemoteModel(Endpoint(endpoint, model, workers, timeout))
    else:
        engine = LocalModel(
            model,
            cast(torch.device, state.device) if device is None and state.num_processes > 1 else torch_device(device),
            dtype=dtype,
            batch_size=batch_size,
            chat_template_path=chat_template_path,
            trust_remote_code=trust_remote_code,
            rank=state.process_index,
            ranks=state.num_processes,
            default_template=default_template,
        )

    def sampling_of(conversation: Conversation, index: int, turn: int) -> Sampling:
        own = benchmark.temperature if conversation.temperature is None else conversation.temperature
        chosen = own if temperature is None else temperature
        return Sampling(max_new_tokens or benchmark.max_new_tokens, chosen, top_p, seed_of(seed, index, turn))

    identity = {
        "model": model,
        "prompts": prompts if prompts in BENCHMARKS else "of a file",
        "number_of_prompts": len(conversations),
        "prompts_sha256": _digest([[one.messages, one.follow_ups, dict(one.fields)] for one in conversations]),
        "max_new_tokens": max_new_tokens or benchmark.max_new_tokens,
        "temperature": _temperature(benchmark, temperature),
        "top_p": top_p,
        "seed": seed,
        **engine.identity,
    }
    if _is_done(output, identity):
        if state.is_main_process:
            remove_journals(output)  # of a process that was killed behind its last answer
            print(printable(f"{output} is complete already."), file=sys.stderr)
        return output
    journal = Journal(output, identity, state.process_index)
    try:
        _answer_all(engine, conversations, sampling_of, journal, state)
        if state.is_main_process:
            settings = {"identity": identity, **engine.settings, "versions": installed_versions()}
            answered = _answered(conversations, journal, identity)
            write_text(settings_file(output), json.dumps(settings, indent=2) + "\n")
            write_text(output, benchmark.render(answered, Path(model.rstrip("/")).name or model))
            remove_journals(output)
        state.wait_for_everyone()
    finally:
        journal.close()
    return output


def _answer_all(
    engine: Engine,
    conversations: list[Conversation],
    sampling_of: Callable[[Conversation, int, int], Sampling],
    journal: Journal,
    state: PartialState,
) -> None:
    """Turn by turn: the second is asked with the first answer before it."""
    total = sum(conversation.turns for conversation in conversations)
    state.wait_for_everyone()
    journal.read_all()
    with tqdm(
        total=total, initial=len(journal.answers), desc="Answers", unit="answer", disable=not state.is_main_process
    ) as bar:
        for turn in range(max(conversation.turns for conversation in conversations)):
            prompts, errors = [], {}
            for index, conversation in enumerate(conversations):
                earlier = [journal.answers.get((index, number)) for number in range(turn)]
                if turn < conversation.turns and None not in earlier:
                    turns = conversation.before([answer.text for answer in earlier if answer is not None])
                    prompts.append(Prompt(index, turns, sampling_of(conversation, index, turn)))

            def keep(found: list[tuple[int, str, int | None]], turn: int = turn) -> None:
                new = [Answer(index, turn, text, tokens, now()) for index, text, tokens in found]
                new = [answer for answer in new if (answer.index, turn) not in journal.answers]
                journal.add(new)
                bar.update(len(new))

            errors = engine.answer(prompts, {index for index, done in journal.answers if done == turn}, keep)
            _report(errors, len(conversations))
            state.wait_for_everyone()
            journal.read_all()
            bar.update(len(journal.answers) - bar.n)  # those of the other processes


def _report(errors: dict[int, str], asked: int) -> None:
    if errors:
        first = min(errors)
        raise Unfinished(
            f"{len(errors)} of {asked} prompts have no answer; the same command asks for them again. Prompt "
            f"{first + 1}: {errors[first]}"
        )


def _answered(conversations: list[Conversation], journal: Journal, identity: dict[str, Any]) -> list[Answered]:
    found = []
    for index, conversation in enumerate(conversations):
        answers = [journal.answers[index, turn] for turn in range(conversation.turns)]
        found.append(
            Answered(conversation, [one.text for one in answers], answers[-1].seconds, _digest([identity, index]))
        )
    return found


def _processes(endpoint: str | None) -> PartialState:
    state = this_process(timeout=_LONGEST_WAIT)
    if endpoint is not None and state.num_processes > 1:
        raise ValueError("--endpoint: start one process; it sends many requests at a time")
    return state


def _refuse_for_endpoint(**of_model: str | bool | None) -> None:
    given = [f"--{name}" for name, value in of_model.items() if value not in (None, "auto", False)]
    if given:
        raise ValueError(f"{', '.join(given)}: the server of --endpoint decides this")


def _is_done(output: Path, identity: dict[str, Any]) -> bool:
    """Whether the file is there with these settings.

    Raises:
        ValueError: where it was made otherwise, or nobody knows how.
    """
    if not output.exists():
        return False
    try:
        made = json.loads(read_text(settings_file(output))).get("identity")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"--output: {output} exists already") from None
    changed = differences(made, identity)
    if changed:
        raise ValueError(f"--output: {output} exists already, made otherwise: {changed}")
    return True


def _temperature(benchmark: Benchmark, temperature: float | None) -> float | str:
    if temperature is not None:
        return temperature
    return "by category" if benchmark is BENCHMARKS["mt_bench"] else benchmark.temperature


def _check_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise ValueError(f"--output: the folder {output.parent} does not exist")
    if output.is_dir():
        raise ValueError(f"--output: expected a file, {output} is a folder")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
