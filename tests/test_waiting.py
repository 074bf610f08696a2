"""What makes the host wait for the device in a micro-batch, and what each layer would make anew."""

import pytest
import torch
from accelerate.utils import send_to_device
from support.small import make_dataset, settings, tiny_model

from orpo_trl import ORPOTrainer, attention


def trainer_and_batch(folder, tokenizer, **kwargs):
    model = tiny_model(attn_implementation=kwargs.pop("attention", "sdpa"))
    options = {"per_device_train_batch_size": 4, "pair_layout": "shared_prefix", **kwargs}
    trainer = ORPOTrainer(model, settings(folder, **options), train_dataset=make_dataset(8), processing_class=tokenizer)
    return trainer, trainer.data_collator([trainer.train_dataset[row] for row in range(4)])


def test_copies_of_a_batch_do_not_wait_unless_asked_to(tmp_path, monkeypatch):
    def copies(**kwargs):
        return settings(tmp_path, **kwargs).accelerator_config

    assert not copies().non_blocking  # to a CPU nothing is copied
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert copies(use_cpu=False).non_blocking
    assert not copies(use_cpu=False, accelerator_config={"non_blocking": False}).non_blocking
    assert not copies(use_cpu=False, dataloader_pin_memory=False).non_blocking
    kept = copies(use_cpu=False, accelerator_config={"even_batches": False})
    assert kept.non_blocking
    assert not kept.even_batches


def test_a_batch_is_ten_tensors(tmp_path, tokenizer):
    """Each is a copy to the device; all else that the trainer reads of a batch are plain numbers."""
    _, batch = trainer_and_batch(tmp_path, tokenizer)
    found = [value for part in (batch, batch["segments"]) for value in part.values() if isinstance(value, torch.Tensor)]
    assert len(found) == 10
    assert not any(value.is_floating_point() for value in found)


def test_masks_are_made_once_for_all_layers(tmp_path, tokenizer, monkeypatch):
    made = []
    make = attention._causal_mask
    monkeypatch.setattr(attention, "_causal_mask", lambda *args: made.append(args[:3]) or make(*args))
    trainer, batch = trainer_and_batch(tmp_path, tokenizer, attention="eager", gradient_checkpointing=True)
    assert trainer.model.config.num_hidden_layers > 1
    trainer.compute_loss(trainer.model, batch).backward()
    lengths = zip(batch["segments"]["query_lengths"], batch["segments"]["key_lengths"], strict=True)
    assert sorted(made) == sorted({(*pair, None) for pair in lengths})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the host waits for a GPU alone")
def test_a_micro_batch_never_waits_for_the_gpu(tmp_path, tokenizer):
    trainer, batch = trainer_and_batch(tmp_path, tokenizer, bf16=True)
    model = trainer.model.cuda()
    pinned = send_to_device(torch.utils.data._utils.pin_memory.pin_memory(batch), "cuda", non_blocking=True)
    trainer.compute_loss(model, pinned).backward()  # what the first pass loads and compiles may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = send_to_device(torch.utils.data._utils.pin_memory.pin_memory(batch), "cuda", non_blocking=True)
        totals = trainer.step_totals([sent], torch.device("cuda"))
        trainer.compute_loss(model, sent, num_items_in_batch=totals).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
