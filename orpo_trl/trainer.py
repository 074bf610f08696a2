"""`ORPOTrainer`: TRL's SFTTrainer on pairs, with the odds-ratio term."""

import copy
import logging
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from orpo_trl import trainer_checks as checks
from orpo_trl import upstream
from orpo_trl.attention import choose_layout, reading_packed_row, without_adapter
from orpo_trl.batch import COUNTS, MODEL_INPUTS, PairCollator
from orpo_trl.budget import TokenBudgetMixin
from orpo_trl.callbacks.record import remote_code_of, settings_as_recipe
from orpo_trl.callbacks.standard import standard_callbacks
from orpo_trl.callbacks.stop import StopWhenAsked
from orpo_trl.callbacks.trackers import run_pages
from orpo_trl.config import ORPOConfig
from orpo_trl.guard import GuardMixin
from orpo_trl.hidden import hide
from orpo_trl.lengths import PairLengths
from orpo_trl.losses import log_odds_ratio, nll_sum, odds_ratio_loss, orpo_loss, pair_logps
from orpo_trl.memory import Sharding
from orpo_trl.model import disable_dropout, load_config, load_processor
from orpo_trl.model_card import write_card
from orpo_trl.pair_metrics import PairMetrics
from orpo_trl.pairs.preparation import PreparationReport
from orpo_trl.pairs.prepare import PAIR_COLUMNS, pair_lengths, prepare_pairs
from orpo_trl.pairs.tokenize import PairRules
from orpo_trl.recomputation import arguments_of, leave_out_checkpointing
from orpo_trl.resume import Start
from orpo_trl.sampling import GlobalBatchSampler, StreamedBatches
from orpo_trl.saving import SavingMixin
from orpo_trl.starting import StartMixin
from orpo_trl.throughput import Throughput
from orpo_trl.versions import installed_versions
from orpo_trl.weights import refuse_pickles

logger = logging.getLogger(__name__)


class ORPOTrainer(TokenBudgetMixin, StartMixin, GuardMixin, SavingMixin, upstream.HookedSFTTrainer):
    """Trains a causal language model with ORPO (arXiv 2403.07691) on pairs of a chosen and a rejected response.

    Takes the place of `trl.experimental.orpo.ORPOTrainer`. It adds to `trl.SFTTrainer` pairs instead of texts, the
    odds-ratio term, and metrics under TRL's names, each weighted by the tokens or pairs behind it. Model loading, PEFT,
    quantisation, the fused LM head and distributed strategies are SFTTrainer's own.

    The life of one optimiser step, in call order (Trainer's method: what happens here):

        _run_epoch                  `begin_epoch`: the sampler learns the epoch
        get_batch_samples           the collator makes the micro-batches of the step
          _get_num_items_in_batch   `step_totals`: NLL units, pairs and micro-batches of the whole step, of all ranks
        training_step               `TokenBudgetMixin`: once for each pass of a micro-batch
          compute_loss              one forward pass; the micro-batch's share of the step's loss; its metrics
        _get_grad_norm              `GuardMixin`: whether the step is taken
        optimizer.step              the Trainer's own
        _maybe_log_save_evaluate
          log                       the window's sums become metrics, in one reduction over ranks
          evaluate, evaluation_loop `compute_loss` without totals; the loss from the means of the whole evaluation set
          _save_checkpoint          SFTTrainer's own, into `SavingMixin`'s folder, and renamed when it is whole

    Args:
        model: a model, a PEFT model, or the Hub id or folder of one; None with `model_init`.
        args: settings, or those of another trainer as `ORPOConfig.of` takes them; by default those of `ORPOConfig`,
            with an output folder named after the model.
        data_collator: makes a batch as `PairCollator` does; by default one according to `args`.
        train_dataset: rows of the shapes that docs/data_formats.md lists, or prepared pairs.
        eval_dataset: the same to evaluate on, or several by name.
        processing_class: tokenizer, or a processor that holds one; by default the model's.
        model_init: makes the model, from nothing or from the trial of a search; `train` calls it anew each time.
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
        start: whether the run of `train` begins, or goes on with one that is in the output folder.
        interruption: why training has stopped with a checkpoint before its end: `stop_after`, or a signal, where the
            program handles them (`interruptions.py`); else None.

    Raises:
        SettingsError, ValueError, TypeError: naming the argument that is wrong, before weights are loaded where it can
            be known.
    """

    dataset_columns = PAIR_COLUMNS
    hub_tags = ("trl", "orpo", "orpo-trl")

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[dict]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        upstream.check_needs(upstream.HOOKS)
        checks.check_hooks(type(self), ORPOTrainer)
        self._hidden_base = ""
        checks.check_source(model, model_init, optimizers)
        name = model if isinstance(model, str) else "" if model is None else upstream.get_config_model_id(model.config)
        args = ORPOConfig(f"{Path(name).name or 'model'}-ORPO") if args is None else ORPOConfig.of(args)
        checks.check_arguments(
            args, train_dataset, eval_dataset, compute_metrics, preprocess_logits_for_metrics, peft_config
        )
        checks.check_trackers(args)
        made: Any = model if model_init is None else self._first_model(model_init, args)
        if model_init is not None or not isinstance(model, str):
            checks.check_model(made, peft_config)
            name = upstream.get_config_model_id(made.config)
        processing_class = self._before_weights(model, name, args, processing_class)
        if model_init is not None:
            self._given_to_models = copy.deepcopy((processing_class, peft_config))
        self._rows_to_train: Any = train_dataset
        super().__init__(
            model=made,
            args=args,
            data_collator=data_collator,
            # SFTTrainer goes by the names of columns: it would leave rows with an empty `image` unprepared.
            train_dataset=checks.without_media(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.model_init = model_init
        checks.check_parallelism(self.accelerator.parallelism_config)
        self._given_collator = data_collator
        self._set_up_batches()
        self._set_up_model(self.model)
        self._settle_checkpointing()
        self._set_up_metrics()
        self._stop = StopWhenAsked(self)
        self.callback_handler.callbacks[:] = [*standard_callbacks(self), self._stop]
        self._fixed = checks.fixed_settings(self.args)
        self.start = Start()

    def _first_model(self, model_init, args: ORPOConfig):
        set_seed(args.seed)  # as `train` does
        self.model_init = model_init
        return super().call_model_init()

    def _before_weights(self, model, model_id: str, args: ORPOConfig, processing_class):
        """Load and check the tokenizer before the weights are loaded; SFTTrainer checks it afterwards."""
        kwargs: Any = args.model_init_kwargs or {}  # a dict: `TrainingArguments` has parsed a string
        if isinstance(model, str):
            # SFTTrainer does this for DDP and DeepSpeed, but not for FSDP.
            args.model_init_kwargs = {"use_safetensors": True, **kwargs} | (
                {"device_map": None} if PartialState().num_processes > 1 else {}
            )
            refuse_pickles(model)
            checks.check_no_adapter(model)
        if processing_class is None:
            processing_class = load_processor(model_id, kwargs.get("revision"), args.trust_remote_code)
        checks.check_tokenizer(processing_class, args)
        if isinstance(model, str):
            checks.check_decoder(load_config(model, kwargs.get("revision"), args.trust_remote_code))
        self.preparation_reports: dict[str, PreparationReport] = {}
        self.recipe = settings_as_recipe(args, model_id)
        return processing_class

    def call_model_init(self, trial=None):
        """A new model by `model_init`, made ready as the first one was at construction. `train` calls it."""
        model: Any = super().call_model_init(trial)
        checks.check_model(model, self._given_to_models[1])
        model = self.set_up_model(model, *copy.deepcopy(self._given_to_models))
        self._set_up_model(model)
        return model

    def begin_run(self, is_trial):
        super().begin_run(is_trial)
        if self.model_init is None:
            return
        if is_trial:
            checks.check_searched(self._fixed, self.args)
            self.recipe = settings_as_recipe(self.args, upstream.get_config_model_id(self.model.config))
        # The model is another one, and in a search the accelerator and the settings as well.
        self._set_up_batches()
        self._set_up_metrics()

    def _set_up_batches(self) -> None:
        """Choose the layout that the model reads exactly, and the collator that makes it."""
        args, data_collator = self.args, self._given_collator
        checks.check_vocabulary(self.text_tokenizer, self.model.config, args)
        wanted = args.pair_layout if data_collator is None else getattr(data_collator, "layout", "padded")
        self.layout, reason = choose_layout(self.model, wanted, bool(args.neftune_noise_alpha))
        rate = checks.adapter_note(args.learning_rate) if is_peft_model(self.model) else ""
        notes = (reason, checks.check_global_batch(args, self.accelerator.num_processes), rate)
        for note in filter(None, notes if self.is_world_process_zero() else ()):
            logger.warning(note)
        if data_collator is None:
            # SFTTrainer has settled the pad token while making its own collator, which is for texts.
            padding = self.text_tokenizer.pad_token_id if args.padding_value is None else args.padding_value
            multiple: Any = args.pad_to_multiple_of
            self.data_collator = PairCollator(
                padding, args.nll_scope, args.nll_reduction, args.max_length, multiple, self.layout
            )
        else:
            checks.check_collator(data_collator, args)
        self._sampler_in_use: GlobalBatchSampler | None = None

    def _set_up_model(self, model) -> None:
        checks.check_trainable(model)
        name = model.config.name_or_path or ""
        if hide(name) != name:  # trackers are sent the config; the card looks for the license of the base model
            self._hidden_base, model.config.name_or_path = name, hide(name)
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            checks.check_positions(model, dataset, name, self.args)
        if self.args.disable_dropout:
            for adapter in getattr(model, "peft_config", {}).values():
                if getattr(adapter, "lora_dropout", 0):
                    logger.info("`disable_dropout: true`, the default, also turns off `lora_dropout`.")
            disable_dropout(model)
        if self.args.device.type == "cpu":
            upstream.use_cpu_head_tiles()
        # SFTTrainer's own head computes entropy and accuracy of the tokens as well, 3 % of a step on a CPU.
        upstream.add_fused_lm_head(without_adapter(model))
        upstream.settle_head_of_tokens(without_adapter(model))

    def _settle_checkpointing(self) -> None:
        """Where the run leaves it open. The Trainer turns checkpointing on when training begins."""
        base, processes = without_adapter(self.model), self.accelerator.num_processes
        is_known = isinstance(self.train_dataset, Dataset) and not upstream.is_remote_code(base)
        if is_known and self.args.is_checkpointing_open and not self.is_deepspeed_enabled:
            config, lengths = base.config, pair_lengths(self.train_dataset)
            several = "fsdp2" if self.is_fsdp_enabled else "ddp"
            sharding = Sharding(several if processes > 1 else "single", processes)
            is_padded = self.layout == "padded"
            note = leave_out_checkpointing(config, arguments_of(self.model), self.args, sharding, lengths, is_padded)
            if note and self.is_world_process_zero():
                logger.info(note)

    def _set_up_metrics(self) -> None:
        self._throughput = Throughput(self.args.device, without_adapter(self.model), bool(is_peft_model(self.model)))
        aux_loss_weight = self.router_aux_loss_coef if self.aux_loss_enabled else None
        self.pair_metrics = PairMetrics(self.args, self.accelerator, self._throughput, aux_loss_weight)

    @property
    def _ranks(self) -> tuple[int, int]:
        return self.accelerator.num_processes, self.accelerator.process_index

    # ---- Data ----------------------------------------------------------------------------------------------------

    def prepare_dataset(self, dataset, name, args):
        """Called by SFTTrainer for each dataset that it is given, at construction and by `evaluate`."""
        if self._rows_to_train is not None:  # the first that SFTTrainer prepares; their media are looked at here
            dataset, self._rows_to_train = self._rows_to_train, None
        checks.check_dataset(name, dataset)
        prepared, report = prepare_pairs(
            dataset,
            self.text_tokenizer,
            PairRules.of(args),
            name,
            args.on_malformed,
            args.on_unrendered,
            args.dataset_num_proc,
        )
        if report is not None:
            self.preparation_reports[name] = report
            if PartialState().is_main_process:
                logger.info("%s", report)
            if name == "train":
                checks.check_pairs(report, dataset, args)
        if self.model is not None:  # the rows given at construction are prepared before it is set
            checks.check_positions(self.model, prepared, name, args)
        return prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, IterableDataset):
            return self._stream(self.train_dataset, self.micro_batch_rows, self.train_collator, endless=True)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, IterableDataset):
            return self._stream(dataset, self.args.eval_batch_size, self.data_collator, endless=False)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        if isinstance(test_dataset, IterableDataset):
            return self.get_eval_dataloader(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _stream(self, dataset: IterableDataset, batch_size: int, collator, endless: bool):
        # accelerate's loaders repeat rows, or give ranks different numbers of batches, where a stream ends.
        batches = StreamedBatches(dataset, batch_size, *self._ranks, endless)
        return batches.loader(collator, self.args.dataloader_num_workers)

    def train_sampler(self, dataset):
        args, lengths = self.args, pair_lengths(dataset)
        strategy = args.train_sampling_strategy
        if strategy == "auto":
            # Which rows share a micro-batch matters to these two alone.
            is_neutral = args.nll_reduction != "micro_batch_mean" and not self.aux_loss_enabled
            strategy = "batch_rebalance" if is_neutral else "random"
        sampler = self._sampler(
            lengths,
            self.micro_batch_rows,
            accumulation=args.gradient_accumulation_steps,
            strategy=strategy,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        checks.check_sampler(sampler, len(dataset))
        if self.is_world_process_zero():
            self.warn_of_pairs_over_budget(lengths)
        self._sampler_in_use = sampler
        return sampler

    def begin_epoch(self, epoch):
        # Where a run resumes in the middle of an epoch with several processes, accelerate wraps the sampler twice, and
        # the Trainer's own `set_epoch` does not reach it: the epoch would go on with the rows of epoch 0.
        if self._sampler_in_use is not None:
            self._sampler_in_use.set_epoch(epoch)
        if not self._throughput.is_running:
            logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            self.pair_metrics.start(self.state.global_step, int(logged[-1]) if logged else 0)

    def eval_sampler(self, dataset):
        return self._sampler(pair_lengths(dataset), self.args.eval_batch_size)

    def _sampler(self, lengths: PairLengths, batch_size: int, **kwargs) -> GlobalBatchSampler:
        is_padded = self.layout == "padded"
        tokens = lengths.longest_row if is_padded else lengths.unique
        return GlobalBatchSampler(tokens.tolist(), batch_size, *self._ranks, is_padded=is_padded, **kwargs)

    # ---- Loss ----------------------------------------------------------------------------------------------------

    def step_totals(self, batches, device):
        """Totals of the optimiser step, `[3]` in the order of `COUNTS`, over all micro-batches and ranks."""
        parts = [part for batch in batches for part in self.passes(batch)]
        totals = [sum(part[name] for part in parts) for name in COUNTS]
        for part in parts:
            self._throughput.add(part["work"])
        # Whether a rank wants to stop travels with the totals: a collective of its own would cost time.
        # `device=` of `torch.tensor` would wait for the device.
        own = torch.tensor([*totals, self._stop.request()]).to(device, non_blocking=True)
        summed = self.accelerator.reduce(own, "sum")
        self._stop.hear(summed[-1])
        return summed[:-1]

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
        mode = "train" if self.model.training else "eval"
        token_logps, outputs = self.token_logps(model, inputs)
        nll = nll_sum(token_logps, inputs["nll_divisors"])
        chosen, rejected = pair_logps(
            token_logps, inputs["completion_index"], inputs["completion_lengths"], inputs["num_pairs"]
        )
        log_ratio = log_odds_ratio(chosen, rejected)
        odds_ratio = odds_ratio_loss(log_ratio).sum()

        if num_items_in_batch is None:
            units, pairs, parts = (max(inputs[name], 1) for name in COUNTS)
            scale = 1
        else:
            units, pairs, parts = num_items_in_batch.clamp(min=1)
            # DDP, FSDP and DeepSpeed average the gradients of the ranks, and the totals are over all of them.
            scale = self.accelerator.num_processes
        loss: Any = orpo_loss(nll, odds_ratio, self.args.beta, units, pairs)
        if self.aux_loss_enabled:
            # A mean over micro-batches. One without rows has only a padding token, so it does not count.
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * inputs["num_micro_batches"] / parts
        aux_loss = outputs.aux_loss if self.aux_loss_enabled else None
        self.pair_metrics.add(mode, inputs, nll, chosen, rejected, log_ratio, aux_loss)
        loss = loss * scale
        return self.guarded(loss, inputs, token_logps) if mode == "train" else loss

    def token_logps(self, model, inputs):
        of_model = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        of_model |= {"output_router_logits": True} if self.aux_loss_enabled else {}
        reading = reading_packed_row(self.model, self.args.torch_compile) if "segments" in inputs else nullcontext()
        with reading:
            token_logps, outputs = upstream.run_fused_head(model, of_model, _is_all_scored(inputs))
        return token_logps.float(), outputs

    # ---- Logs ----------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self.pair_metrics.of_training(self.state.global_step))
        if "train_loss" in logs:
            self._throughput.stop()
            if self.interruption is not None:  # the figures of a part of the run
                return
            logs["train_loss"] = self._mean_loss(logs["train_loss"])
        super().log(logs, start_time)

    def _mean_loss(self, of_this_start: float) -> float:
        """Mean of the loss over all optimiser steps of the run, also of those before it went on.

        Args:
            of_this_start: the Trainer's mean, for a run without logs.
        """
        if self.pair_metrics.had_non_finite_loss:
            return float("nan")
        total, last = 0.0, 0
        for log in self.state.log_history:
            if "loss" in log:
                total += log["loss"] * (log["step"] - last)
                last = log["step"]
        return total / last if last else of_this_start

    # ---- Model card ----------------------------------------------------------------------------------------------

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write the model card to the output folder. The Trainer calls it for each checkpoint as well."""
        if not self.is_world_process_zero():
            return
        folder = self.run_folder
        write_card(
            folder,
            model_name=model_name or folder.name,
            source=self.hub_model_id or folder.name,
            base_model=self._hidden_base or self.model.config.name_or_path or "",
            dataset_name=dataset_name,
            tags=[*self.hub_tags, *([tags] if isinstance(tags, str) else tags or [])],
            is_adapter=bool(is_peft_model(self.model)),
            is_chat=self.text_tokenizer.chat_template is not None,
            remote_code=remote_code_of(self),
            versions=installed_versions(),
            pages=run_pages(),
        )

    # ---- Search --------------------------------------------------------------------------------------------------

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """The Trainer's own search, which needs `model_init`; each trial leaves its files in `OUTPUT_DIR/run-NUMBER`.

        The objective is by default the loss on the evaluation set (`eval_loss`), where the Trainer adds up all metrics.
        That loss is no measure where `beta` is among the settings that are searched.
        """
        return super().hyperparameter_search(hp_space, compute_objective or checks.evaluation_loss, *args, **kwargs)

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        with self._throughput.pausing():
            return super().evaluate(*args, **kwargs)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Metrics of a dataset of any shape that `evaluate` takes. There are no predictions, for want of logits."""
        prepared = self.prepare_dataset(test_dataset, metric_key_prefix, self.args)
        with self._throughput.pausing():
            return super().predict(prepared, ignore_keys, metric_key_prefix)

    @contextmanager
    def saving_checkpoint(self):
        with self._throughput.pausing():
            self.before_saving()
            with super().saving_checkpoint() as folder:
                yield folder

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        dataset = dataloader.dataset
        self.evaluated = (metric_key_prefix, dataset.rows if isinstance(dataset, StreamedBatches) else dataset)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        metrics = self.pair_metrics.of_evaluation(self.state.global_step)
        of_set = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **of_set})


def _is_all_scored(inputs) -> bool:
    """Whether so few positions have no label that computing them costs less than waiting for their number."""
    return inputs["work"]["scored"] > 0.95 * inputs["work"]["positions"]
