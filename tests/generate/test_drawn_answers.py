"""Drawing by a seed for each row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.generate.sampling import DrawBySeed, Sampling, processors, seed_of

CPU = torch.device("cpu")


def drawn(logits: torch.Tensor, settings: list[Sampling], step: int = 0) -> list[int]:
    """Token of each row of `[batch, vocabulary]`, after a prompt of 3 tokens."""
    ids = torch.zeros(len(logits), 3 + step, dtype=torch.long)
    return DrawBySeed(settings, 3, CPU)(ids, logits).argmax(-1).tolist()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    """Against the probabilities of a softmax by hand: 20,000 draws, with 4 standard errors of room."""
    count, temperature = 20_000, 0.7
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = (logits.double() / temperature).exp()
    expected /= expected.sum()
    settings = [Sampling(1, temperature, 1.0, seed_of(0, row, 0)) for row in range(count)]
    found = torch.tensor(drawn(logits.expand(count, 4), settings)).bincount(minlength=4) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4 * error).all(), (found, expected)


def test_top_p_leaves_out_the_tail():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    settings = [Sampling(1, 1.0, 0.75, seed_of(0, row, 0)) for row in range(2000)]
    assert set(drawn(logits, settings)) == {0, 1}


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.5]), min_size=1, max_size=6), st.integers(0, 2**31), st.integers(0, 4)
)
def test_a_row_is_drawn_alike_in_every_batch(temperatures, seed, step):
    logits = torch.randn(len(temperatures), 50, generator=torch.Generator().manual_seed(seed))
    settings = [Sampling(5, temperature, 0.9, seed_of(seed, row, 0)) for row, temperature in enumerate(temperatures)]
    alone = [drawn(logits[[row]], [settings[row]], step)[0] for row in range(len(settings))]
    assert drawn(logits, settings, step) == alone
    assert drawn(logits.flip(0), settings[::-1], step) == alone[::-1]
    for row, temperature in enumerate(temperatures):
        assert temperature or alone[row] == int(logits[row].argmax())


def test_each_step_and_each_answer_has_its_own_number():
    logits = torch.zeros(1, 10_000)
    settings = Sampling(50, 1.0, 1.0, seed_of(1, 0, 0))
    assert len({drawn(logits, [settings], step)[0] for step in range(50)}) > 45
    assert len({seed_of(seed, index, turn) for seed in range(9) for index in range(9) for turn in range(3)}) == 243


@pytest.mark.parametrize("value", [0.0, 1 - 1e-16])
def test_the_ends_of_the_range_draw_a_token_that_can_be(value):
    draw = DrawBySeed([Sampling(1, 1.0, 1.0, 0)], 3, CPU)
    draw.uniform[:] = value
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert draw(torch.zeros(1, 3, dtype=torch.long), scores).argmax().item() in (1, 2)


def test_greedy_batches_need_nothing():
    assert processors([Sampling(1, 0.0, 1.0, 0)], 3, CPU) is None
