"""`ORPOTrainer`: TRL's SFTTrainer on pairs, with the odds-ratio term."""

import logging
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

from orpo_trl.attention import choose_layout, reading_packed_row
from orpo_trl.batch import COUNTS, MODEL_INPUTS, PairCollator, TokenBudget, micro_batches, nll_sum, pair_logps
from orpo_trl.callbacks.findings import FindingWarnings
from orpo_trl.callbacks.record import RunRecord, installed_versions, settings_as_recipe
from orpo_trl.callbacks.samples import SampleCompletions
from orpo_trl.callbacks.terminal import TerminalProgress
from orpo_trl.callbacks.trackers import TensorBoardRun, WandbRun, run_pages
from orpo_trl.config import ORPOConfig
from orpo_trl.losses import log_odds_ratio, odds_ratio_delta, odds_ratio_loss
from orpo_trl.metric_sums import MetricSums, PairGroups
from orpo_trl.model import disable_dropout, shrink_head_tiles
from orpo_trl.model_card import write_card
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import PAIR_COLUMNS, column_names, longest_rows, prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.sampling import GlobalBatchSampler, StreamedBatches
from orpo_trl.throughput import Throughput
from orpo_trl.trainer_checks import check_arguments, check_parallelism, check_tokenizer, check_trackers

logger = logging.getLogger(__name__)

# Means over pairs, in the order of `_add_metrics`.
PAIR_METRICS = (
    "log_odds_ratio", "log_odds_chosen", "odds_ratio_delta", "logps/chosen", "logps/rejected", "rewards/accuracies",
)  # fmt: skip


class ORPOTrainer(SFTTrainer):
    """Trains a causal language model with ORPO (arXiv 2403.07691) on pairs of a chosen and a rejected response.

    Takes the place of `trl.experimental.orpo.ORPOTrainer`. What it adds to `trl.SFTTrainer`, whose model loading,
    PEFT, quantisation, fused LM head and engines it uses as they are: pairs instead of texts, the odds-ratio term,
    and metrics under TRL's names, each weighted by the tokens or pairs behind it.

    Args:
        model: a model, a PEFT model, or the Hub id or folder of one.
        args: settings; by default those of `ORPOConfig`, with an output folder named after the model.
        data_collator: makes a batch as `PairCollator` does; by default one according to `args`.
        train_dataset: rows of the shapes that README.md lists, or prepared pairs.
        eval_dataset: the same to evaluate on, or several by name.
        processing_class: tokenizer, or a processor that holds one; by default the model's.
        callbacks: added to the default ones.
        optimizers: optimizer and scheduler, made from `args` where None.
        optimizer_cls_and_kwargs: as in `transformers.Trainer`.
        quantization_config: for a model given by name; with `peft_config`, QLoRA.
        peft_config: adapter to train instead of the model's own weights.
        compute_metrics, preprocess_logits_for_metrics: refused, because logits are never built.

    Attributes:
        preparation_reports: what became of each dataset's rows, by dataset name.
        evaluated: metric prefix and pairs of the latest evaluation.
        layout: 'shared_prefix' or 'padded'.
        recipe: YAML that the output folder and the trackers keep; by default made of `args`.
    """

    _tag_names = ("trl", "orpo", "orpo-trl")
    _name = "ORPO"
    _paper = {  # noqa: RUF012 (TRL's class attribute)
        "title": "ORPO: Monolithic Preference Optimization without Reference Model",
        "id": "2403.07691",
        "citation": (
            "@inproceedings{hong-etal-2024-orpo,\n"
            "    title     = {{ORPO}: Monolithic Preference Optimization without Reference Model},\n"
            "    author    = {Jiwoo Hong and Noah Lee and James Thorne},\n"
            "    year      = 2024,\n"
            "    eprint    = {arXiv:2403.07691}\n"
            "}"
        ),
    }
    # `compute_loss` divides by the totals of the whole optimiser step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ORPOConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = ORPOConfig(f"{Path(model_id).name or 'model'}-ORPO")
        check_arguments(args, train_dataset, compute_metrics, preprocess_logits_for_metrics, peft_config)
        check_trackers(args)
        if isinstance(model, str):
            init_kwargs = dict(args.model_init_kwargs or {})
            if PartialState().num_processes > 1:
                # SFTTrainer says so for DDP and DeepSpeed, but not for FSDP.
                init_kwargs["device_map"] = None
            args.model_init_kwargs = init_kwargs
        if processing_class is None:
            # Loaded before the weights: a tokenizer that does not fit should be known before they are.
            init_kwargs = args.model_init_kwargs or {}
            processing_class = AutoProcessor.from_pretrained(
                model_id, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
            )
        check_tokenizer(processing_class, args)
        self.preparation_reports: dict[str, PreparationReport] = {}
        self.recipe = settings_as_recipe(args, model_id)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_parallelism(self.accelerator.parallelism_config)
        vocabulary = self.model.config.get_text_config().vocab_size
        if args.padding_value is not None and not 0 <= args.padding_value < vocabulary:
            raise ValueError(
                f"`padding_value` must be a token id from 0 to {vocabulary - 1}, got {args.padding_value}."
            )
        if len(self._tokenizer) > vocabulary:
            logger.warning(
                "The tokenizer has %d tokens and the model embeds %d: a row with one of the others will fail.",
                len(self._tokenizer), vocabulary,
            )  # fmt: skip
        wanted = args.pair_layout if data_collator is None else getattr(data_collator, "layout", "padded")
        self.layout, reason = choose_layout(self.model, wanted)
        if reason and self.is_world_process_zero():
            logger.warning(reason)
        if data_collator is None:
            # SFTTrainer has settled the pad token while making its own collator, which is for texts.
            padding = self._tokenizer.pad_token_id if args.padding_value is None else args.padding_value
            self.data_collator = PairCollator(
                padding, args.nll_scope, args.nll_reduction, args.max_length, args.pad_to_multiple_of, self.layout
            )
        elif args.max_tokens_per_micro_batch is not None and not hasattr(data_collator, "positions"):
            raise ValueError("`max_tokens_per_micro_batch` needs a `data_collator` that counts `positions`.")
        if args.disable_dropout:
            disable_dropout(self.model)
        if self.args.device.type == "cpu":
            shrink_head_tiles()
        self._add_callbacks()
        names = ("nll_loss", *PAIR_METRICS, *(("aux_loss",) if self.aux_loss_enabled else ()))
        self._sums = {"train": MetricSums(names), "eval": MetricSums(names)}
        self._groups = PairGroups(args.beta)
        has_adapter = is_peft_model(self.model)
        base = self.model.get_base_model() if has_adapter else self.model
        # SFTTrainer's own head computes entropy and accuracy of the tokens as well, 3 % of a step on a CPU.
        add_fused_lm_head(base)
        self._throughput = Throughput(self.args.device, base, has_adapter)
        self._train_sampler = None
        self._last_log_step = 0
        self._had_non_finite_loss = False
        self._seen_pairs = False

    def _add_callbacks(self) -> None:
        """Ours, in place of transformers' where there is one of the same purpose."""
        callbacks = self.callback_handler.callbacks
        for theirs, ours in (
            (WandbCallback, lambda: WandbRun(self)),
            (TensorBoardCallback, TensorBoardRun),
            (ProgressCallback, TerminalProgress),
            (PrinterCallback, TerminalProgress),
        ):
            callbacks[:] = [ours() if type(callback) is theirs else callback for callback in callbacks]
        # After the trackers, whose runs it records.
        self.add_callback(RunRecord(self))
        if self.args.generate_during_eval:
            self.add_callback(SampleCompletions(self))
        self.add_callback(FindingWarnings(self.args.beta))

    @property
    def _is_padded(self) -> bool:
        return self.layout == "padded"

    # ---- Data ----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Called by SFTTrainer for each dataset that it is given, at construction and by `evaluate`."""
        prepared, report = prepare_pairs(
            dataset, self._tokenizer, PairRules.of(args), dataset_name, args.on_malformed, args.dataset_num_proc
        )
        if report is not None:
            self.preparation_reports[dataset_name] = report
            if PartialState().is_main_process:
                logger.info("%s", report)
            if not report.pairs and args.beta and dataset_name == "train":
                raise ValueError(
                    "No row of the train dataset has a rejected response, so there is no odds-ratio term. Is its "
                    f"column named `rejected`? Columns: {', '.join(column_names(dataset))}. Set `beta: 0` to train "
                    "the NLL term alone."
                )
        return prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = list(PAIR_COLUMNS)

    def get_train_dataloader(self):
        collator, budget = self.data_collator, self.args.max_tokens_per_micro_batch
        if budget is not None:
            self.data_collator = TokenBudget(collator, budget)
        try:
            if isinstance(self.train_dataset, IterableDataset):
                return self._stream(self.train_dataset, self._train_batch_size, endless=True)
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, IterableDataset):
            return self._stream(dataset, self.args.eval_batch_size, endless=False)
        return super().get_eval_dataloader(eval_dataset)

    def _stream(self, dataset: IterableDataset, batch_size: int, endless: bool) -> DataLoader:
        # accelerate's loaders repeat rows, or give ranks different numbers of batches, where a stream ends.
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = StreamedBatches(dataset, batch_size, ranks, rank, endless)
        workers = self.args.dataloader_num_workers
        return DataLoader(batches, batch_size=None, collate_fn=self.data_collator, num_workers=workers)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = self._sampler(
            dataset,
            self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            strategy=self._sampling_strategy(),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        if not len(sampler):
            raise ValueError(
                f"The train dataset has {len(dataset):,} rows, fewer than the {sampler.effective_batch_size:,} of one "
                "optimiser step, and `dataloader_drop_last` leaves them out."
            )
        budget = self.args.max_tokens_per_micro_batch
        longest = max(sampler.lengths) * 2 if self._is_padded else max(sampler.lengths) + 1
        if budget is not None and longest > budget and self.is_world_process_zero():
            logger.warning(
                "The longest pair takes %d tokens, more than `max_tokens_per_micro_batch: %d`: such a pair makes a "
                "micro-batch of its own.",
                longest, budget,
            )  # fmt: skip
        self._train_sampler = sampler
        return sampler

    def _sampling_strategy(self) -> str:
        strategy = self.args.train_sampling_strategy
        if strategy != "auto":
            return strategy
        # Which rows share a micro-batch matters to these two alone.
        neutral = self.args.nll_reduction != "micro_batch_mean" and not self.aux_loss_enabled
        return "batch_rebalance" if neutral else "random"

    def _run_epoch(self, model, epoch, *args, **kwargs):
        # Where a run resumes in the middle of an epoch with several processes, accelerate wraps the sampler twice, and
        # the Trainer's own `set_epoch` does not reach it: the epoch would go on with the rows of epoch 0.
        if self._train_sampler is not None:
            self._train_sampler.set_epoch(epoch)
        if not self._throughput.is_running:
            logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            self._throughput.start(logged[-1] if logged else 0)
            self._last_log_step = self.state.global_step
        return super()._run_epoch(model, epoch, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset):
        return self._sampler(eval_dataset, self.args.eval_batch_size)

    def _sampler(self, dataset: Dataset, batch_size: int, **kwargs) -> GlobalBatchSampler:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        lengths = longest_rows(dataset) if self._is_padded else dataset["length"][:]
        return GlobalBatchSampler(lengths, batch_size, ranks, rank, is_padded=self._is_padded, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, totals = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.args.max_tokens_per_micro_batch is not None and self.accelerator.num_processes > 1:
            # Ranks must take part in each other's collectives, so all run as many parts as the one that has most.
            counts = torch.tensor([len(micro_batches(batch)) for batch in batches], device=device)
            most = self.accelerator.gather(counts).view(-1, len(batches)).amax(0).tolist()
            for batch, count in zip(batches, most, strict=True):
                batch["micro_batches"] += [self.data_collator([]) for _ in range(count - len(batch["micro_batches"]))]
        return batches, totals

    # ---- Loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        """Totals of the optimiser step, `[3]` in the order of `COUNTS`, over all micro-batches and ranks."""
        parts = [part for batch in batch_samples for part in micro_batches(batch)]
        totals = torch.tensor([sum(part[name] for part in parts) for name in COUNTS], device=device)
        for part in parts:
            self._throughput.add(part["work"])
        return self.accelerator.reduce(totals, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """ORPO's loss of a micro-batch (paper, eq. 6), as its share of the optimiser step's.

        Args:
            model: the wrapped model.
            inputs: a batch of `PairCollator`.
            return_outputs: must be False.
            num_items_in_batch: `[3]` totals of the optimiser step in the order of `COUNTS`; None in evaluation, where
                the batch stands for itself.

        Returns:
            Scalar. Its mean over ranks, summed over the accumulation steps, is the loss of the optimiser step.
        """
        if return_outputs:
            raise ValueError("ORPOTrainer builds no logits, so there are no outputs to return.")
        training = self.model.training
        kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        kwargs |= {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        with reading_packed_row() if "segments" in inputs else nullcontext():
            outputs = model(**kwargs, fused_lm_head=True, use_cache=False)
        token_logps = outputs.log_probs.float()
        nll = nll_sum(token_logps, inputs)
        chosen, rejected = pair_logps(token_logps, inputs)
        log_ratio = log_odds_ratio(chosen, rejected)
        odds_ratio = odds_ratio_loss(log_ratio).sum()

        if num_items_in_batch is None:
            units, pairs, parts = (max(inputs[name], 1) for name in ("num_nll_units", "num_pairs", "num_micro_batches"))
            scale = 1
        else:
            units, pairs, parts = num_items_in_batch.clamp(min=1)
            # DDP, FSDP and DeepSpeed average the gradients of the ranks, and the totals are over all of them.
            scale = self.accelerator.num_processes
        loss = nll / units + self.args.beta * odds_ratio / pairs
        if self.aux_loss_enabled:
            # A mean over micro-batches; one without rows routes a padding token, which is nothing to balance.
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * inputs["num_micro_batches"] / parts
        loss = loss * scale
        self._add_metrics("train" if training else "eval", inputs, outputs, nll, chosen, rejected, log_ratio)
        return loss

    @torch.no_grad()
    def _add_metrics(self, mode, inputs, outputs, nll, chosen, rejected, log_ratio):
        # TRL compares the rewards, which are all 0 at beta = 0.
        of_pairs = [
            -odds_ratio_loss(log_ratio), log_ratio, odds_ratio_delta(log_ratio), chosen, rejected,
            (chosen > rejected).float(),
        ]  # fmt: skip
        values = [nll.reshape(1), torch.stack(of_pairs).sum(dim=1)]
        weights = [inputs["num_nll_units"], *[inputs["num_pairs"]] * len(of_pairs)]
        if self.aux_loss_enabled:
            values.append(outputs.aux_loss.float().reshape(1) * inputs["num_micro_batches"])
            weights.append(inputs["num_micro_batches"])
        self._sums[mode].add(torch.cat(values), weights)
        if mode == "eval":
            self._groups.add(chosen, rejected, inputs["pair_sources"], inputs["pair_lengths"])

    def training_step(self, model, inputs, num_items_in_batch=None):
        *first, last = micro_batches(inputs)
        losses = []
        for part in first:
            with self._accumulating(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        # The Trainer sums these, and a NaN would stay in its sum for good; `log` tells of it.
        return torch.stack([torch.where(loss.isfinite(), loss, 0) for loss in losses]).sum()

    @contextmanager
    def _accumulating(self, model):
        """Before the last part: DDP and DeepSpeed wait with the exchange of gradients and the step.

        FSDP reduces each part into the sharded gradient, which takes less memory than to hold all of it until the last.
        """
        state = self.accelerator.gradient_state
        is_last_micro_batch = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            state._set_sync_gradients(is_last_micro_batch)

    def floating_point_ops(self, inputs):
        return sum(super(ORPOTrainer, self).floating_point_ops(part) for part in micro_batches(inputs))

    def _track_num_input_tokens(self, inputs):
        for part in micro_batches(inputs):
            super()._track_num_input_tokens(part)

    # ---- Logs ----------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sums, numbers = self._sums["train"], self._throughput.numbers()
            metrics, non_finite, numbers = sums.reduce(self.accelerator, numbers)
            if non_finite:
                logs["loss"] = float("nan")
                self._had_non_finite_loss = True
                window = f"between steps {self._last_log_step + 1} and {self.state.global_step}"
                self._warn_non_finite(window, non_finite)
            self._last_log_step = self.state.global_step
            logs.update(self._with_rewards(metrics), **self._throughput.metrics(numbers))
            self._warn_without_pairs("log_odds_ratio" in metrics)
        if "train_loss" in logs:
            self._throughput.stop()
            if self._had_non_finite_loss:
                logs["train_loss"] = float("nan")
        super().log(logs, start_time)

    def _with_rewards(self, metrics: dict[str, float]) -> dict[str, float]:
        """TRL's rewards are beta times the log-probabilities, so they need no sums of their own."""
        if "logps/chosen" not in metrics or "logps/rejected" not in metrics:
            return metrics
        chosen, rejected = (self.args.beta * metrics[f"logps/{side}"] for side in ("chosen", "rejected"))
        return {**metrics, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}

    def _warn_without_pairs(self, has_pairs: bool) -> None:
        """A stream does not know beforehand that its `rejected` column is missing or misspelt."""
        if not has_pairs and not self._seen_pairs and self.args.beta and self.is_world_process_zero():
            logger.warning("No row so far has a `rejected` response: the odds-ratio term has not been trained.")
        self._seen_pairs |= has_pairs

    def _warn_non_finite(self, where: str, non_finite: dict[str, int]) -> None:
        if self.is_world_process_zero():
            counts = ", ".join(f"{name} in {count} micro-batches" for name, count in non_finite.items())
            logger.warning("Non-finite values %s, left out of the means: %s", where, counts)

    # ---- Model card ----------------------------------------------------------------------------------------------

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write the model card to the output folder. The Trainer calls it for each checkpoint as well."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_card(
            folder,
            model_name=model_name or folder.name,
            source=self.hub_model_id or folder.name,
            base_model=self.model.config.name_or_path or "",
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            is_adapter=is_peft_model(self.model),
            is_chat=self._tokenizer.chat_template is not None,
            paper=self._paper,
            versions=installed_versions(),
            pages=run_pages(),
        )

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        with self._throughput.pausing():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self._throughput.pausing():
            super()._save_checkpoint(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        dataset = dataloader.dataset
        self.evaluated = (metric_key_prefix, dataset.rows if isinstance(dataset, StreamedBatches) else dataset)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics, non_finite, _ = self._sums["eval"].reduce(self.accelerator)
        if non_finite:
            self._warn_non_finite(f"in evaluation at step {self.state.global_step}", non_finite)
        # The Trainer's own eval loss is a mean over batches of any size, rows of the last one repeated.
        metrics["loss"] = (
            metrics.get("nll_loss", 0.0)
            - self.args.beta * metrics.get("log_odds_ratio", 0.0)
            + self.router_aux_loss_coef * metrics.get("aux_loss", 0.0)
        )
        metrics = {**self._with_rewards(metrics), **self._groups.reduce()}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output
