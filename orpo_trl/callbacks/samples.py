"""Answers to held-out prompts while a model trains."""

from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerCallback

from orpo_trl import run_folder
from orpo_trl.callbacks.trackers import log_table
from orpo_trl.generation import generate_batch, stop_token_ids
from orpo_trl.hidden import hide
from orpo_trl.pairs.last_turn import TurnMarks, special_texts
from orpo_trl.upstream import unwrap_model_for_generation

# Held-out prompts that each evaluation answers, and the longest answer in tokens.
NUM_SAMPLES = 8
MAX_NEW_TOKENS = 256


class SampleCompletions(TrainerCallback):
    """At each evaluation, answers the first held-out prompts greedily (`ORPOConfig.generate_during_eval`).

    Writes the answers to the run's folder (`run_folder.SAMPLES`) and, where wandb has a run, to a table of that run.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.done: set[tuple[Path, int, str]] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        # A run that begins anew has no samples of its later steps, whatever an earlier one has written.
        self.done = {key for key in self.done if key[1] <= state.global_step}

    def on_evaluate(self, args, state, control, **kwargs):
        trainer = self.trainer
        name, dataset = trainer.evaluated
        folder = trainer.run_folder
        if (folder, state.global_step, name) in self.done:  # the last step is evaluated again at the end of a run
            return
        self.done.add((folder, state.global_step, name))
        examples = list(islice(dataset, NUM_SAMPLES))
        completions = self._generate([example["prompt_ids"] for example in examples])
        if not state.is_world_process_zero:
            return
        tokenizer = trainer.text_tokenizer
        texts = [
            {
                "step": state.global_step,
                "dataset": name,
                "prompt": hide(tokenizer.decode(example["prompt_ids"])),
                "completion": tokenizer.decode(completion, skip_special_tokens=True),
                "chosen": tokenizer.decode(example["chosen_ids"], skip_special_tokens=True),
                "rejected": tokenizer.decode(example["rejected_ids"] or [], skip_special_tokens=True),
            }
            for example, completion in zip(examples, completions, strict=True)
        ]
        marks = TurnMarks.of(tokenizer)
        # Places in the text as it is written, with the contents of environment variables hidden.
        places = [
            {
                "last_turn": marks.find(text["prompt"]) if marks else None,
                "special_tokens": special_texts(example["prompt_ids"], tokenizer),
            }
            for example, text in zip(examples, texts, strict=True)
        ]
        run_folder.append_samples(folder, [{**text, **place} for text, place in zip(texts, places, strict=True)])
        if "wandb" in (args.report_to or ()):
            log_table(f"samples/{name}", texts, state.global_step)

    def _generate(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """Answers to all prompts, `[tokens]` each. Every rank generates all of them, as ZeRO-3's collectives need."""
        trainer = self.trainer
        tokenizer = trainer.text_tokenizer
        stop_ids = stop_token_ids(tokenizer)
        was_training = trainer.model.training
        trainer.model.eval()
        answers: list[torch.Tensor] = []
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            for start in range(0, len(prompts), trainer.args.eval_batch_size):
                answers += generate_batch(
                    model,
                    prompts[start : start + trainer.args.eval_batch_size],
                    max_new_tokens=MAX_NEW_TOKENS,
                    stop_ids=stop_ids,
                    pad_id=tokenizer.pad_token_id,
                    device=trainer.args.device,
                )
        trainer.model.train(was_training)
        return answers
