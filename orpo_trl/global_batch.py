"""How the pairs of an optimiser step are shared by processes, micro-batches and accumulation steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Shares of one optimiser step.

    Attributes:
        micro_batch: pairs of a micro-batch of one process.
        accumulation: micro-batches of one process.
        note: what the user should know of it; empty where it is what the settings say.
    """

    micro_batch: int
    accumulation: int
    note: str = ""


def split_global_batch(
    pairs: int, micro_batch: int, accumulation: int | None, processes: int, is_micro_batch_fixed: bool = False
) -> Split:
    """The split of `global_batch_size`.

    Args:
        pairs: of an optimiser step, over all processes.
        micro_batch: the most pairs of a micro-batch (`per_device_train_batch_size`).
        accumulation: `gradient_accumulation_steps` where it is set; by default it follows.
        processes: that train.
        is_micro_batch_fixed: whether the loss depends on the pairs of a micro-batch (`nll_reduction:
            micro_batch_mean`), so that they may not be fewer.

    Returns:
        The largest micro-batch, not above `micro_batch`, that divides the pairs of a process.

    Raises:
        ValueError: if there is none, or if the settings contradict each other; says what would do.
    """
    if accumulation is not None and micro_batch * accumulation * processes != pairs:
        raise ValueError(
            f"`global_batch_size: {pairs}` contradicts `per_device_train_batch_size: {micro_batch}` times "
            f"`gradient_accumulation_steps: {accumulation}` times {_count(processes)}, which is "
            f"{micro_batch * accumulation * processes}; leave `gradient_accumulation_steps` out, and it follows"
        )
    own, rest = divmod(pairs, processes)
    unit = micro_batch if is_micro_batch_fixed else 1
    if rest or own % unit:
        fitting = [n for n in range(1, pairs // unit + 1) if not pairs % (n * unit)]
        each = f" with micro-batches of {unit}, on which `nll_reduction: micro_batch_mean` depends" if unit > 1 else ""
        raise ValueError(
            f"`global_batch_size: {pairs}` cannot be shared by {_count(processes)}{each}; it can be by "
            f"{', '.join(map(str, fitting)) or 'none'}"
        )
    fitting = max(size for size in range(1, min(micro_batch, own) + 1) if not own % size)
    if fitting == micro_batch:
        return Split(micro_batch, own // micro_batch)
    note = (
        f"`per_device_train_batch_size` is {fitting}, not {micro_batch}: `global_batch_size: {pairs}` leaves "
        f"{own} pairs of an optimiser step to each of {_count(processes)}"
    )
    return Split(fitting, own // fitting, note)


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes != 1 else ''}"
