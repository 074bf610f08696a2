"""Counts of real batches, compared with a recount of their rows, and rates under a clock that the test moves."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small import tiny_model

from orpo_trl import ORPOConfig
from orpo_trl.batch import PairCollator
from orpo_trl.config import ModelArguments
from orpo_trl.flops import matrix_weights, planned_weights, train_flops
from orpo_trl.lengths import PairLengths
from orpo_trl.throughput import GIB, Throughput, peak_memory

PAIRS = [
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]},
    {"prompt_ids": [1] * 9, "chosen_ids": [5], "rejected_ids": [8] * 6},
    {"prompt_ids": [1, 2], "chosen_ids": [5, 6], "rejected_ids": None},
]


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def throughput() -> Throughput:
    return Throughput(torch.device("cpu"), tiny_model())


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_work_of_a_batch(layout):
    """7 + 6 + 10 + 15 + 4 tokens of responses with their prompts; the prompts of pairs once less; five rows of 15."""
    batch = PairCollator(0, layout=layout)(PAIRS)
    work = batch["work"]
    assert work["pairs"] == 2
    assert work["tokens"] == 7 + 6 + 10 + 15 + 4
    assert work["unique_tokens"] == 9 + 16 + 4
    assert work["padded_positions"] == 5 * 15
    assert work["positions"] == batch["input_ids"].numel() == (5 * 15 if layout == "padded" else 9 + 16 + 4 + 2)
    assert work["scored"] == 6 + 2 + 9 + 6 + 3
    seen = [7 * 8 // 2, 5 + 6, 10 * 11 // 2, sum(range(10, 16)), 4 * 5 // 2]
    assert work["attended"] == sum(seen)


def test_work_of_the_completion_scope_scores_no_prompt():
    assert PairCollator(0, "completion")(PAIRS)["work"]["scored"] == 3 + 2 + 1 + 6 + 2


def test_rates_are_over_the_window_of_all_ranks(clock):
    """Two ranks do the same work: 58 tokens and 4 pairs, first in 2 seconds, then in 4."""
    meter, batch = throughput(), PairCollator(0, layout="shared_prefix")(PAIRS)
    meter.start()
    for seconds in (2, 4):
        meter.add(batch["work"])
        clock.seconds += seconds
        metrics = meter.metrics([meter.numbers(), [*meter.numbers()[:-1], 3 * GIB]])
        assert metrics["throughput/unique_tokens_per_second"] == pytest.approx(2 * 29 / seconds)
        assert metrics["throughput/pairs_per_second"] == pytest.approx(2 * 2 / seconds)
        assert metrics["throughput/padding_avoided_percent"] == pytest.approx(100 * (1 - 31 / 75))
        assert metrics["memory/peak_gib"] == max(3, peak_memory(torch.device("cpu")) / GIB)
        assert "throughput/mfu_percent" not in metrics  # the peak of a CPU is not known
    assert metrics["num_tokens"] == 2 * 2 * 42


def test_pauses_take_no_time_and_may_be_nested(clock):
    meter = throughput()
    meter.start(num_tokens=1000)
    meter.add({"unique_tokens": 30, "tokens": 40})
    clock.seconds += 1
    with meter.pausing():
        clock.seconds += 50
        with meter.pausing():
            clock.seconds += 50
    clock.seconds += 2
    metrics = meter.metrics([meter.numbers()])
    assert metrics["throughput/unique_tokens_per_second"] == pytest.approx(10)
    assert metrics["num_tokens"] == 1040


def test_nothing_is_measured_outside_of_a_run():
    meter = throughput()
    assert not meter.is_running
    with meter.pausing():
        pass
    assert meter.metrics([meter.numbers()]) == {}


def test_mfu_is_the_plan_of_the_check_over_peak_and_time(clock, monkeypatch):
    """`train_flops` counts whole rows from their lengths, and the last prompt token of a pair twice."""
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr("orpo_trl.throughput.peak_memory", lambda device: 0)
    model = tiny_model()
    meter = Throughput(torch.device("cuda"), model)
    meter.start()
    pair = {"prompt_ids": [1] * 50, "chosen_ids": [5] * 200, "rejected_ids": [8] * 100}
    meter.add(PairCollator(0, layout="shared_prefix")([pair])["work"])
    clock.seconds += 4
    mfu = meter.metrics([meter.numbers()] * 2)["throughput/mfu_percent"]
    args = ORPOConfig("unused", bf16=False, gradient_checkpointing=False)
    planned = train_flops(model.config, ModelArguments(), args, PairLengths(*np.array([(50, 200, 100)]).T))
    assert mfu == pytest.approx(100 * 2 * planned / (4 * 2 * 989e12), rel=5e-3)


def test_weights_of_a_model_are_those_of_its_config_also_under_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    expected = planned_weights(model.config)
    assert matrix_weights(model) == expected
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert matrix_weights(adapted.get_base_model(), has_adapter=True) == expected


def test_unknown_device_has_no_mfu(monkeypatch):
    card = SimpleNamespace(name="Some GPU 9000", total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    meter = Throughput(torch.device("cuda"), tiny_model())
    assert meter.peak_flops is None
