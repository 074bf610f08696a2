"""The odds-ratio term against closed forms in float64, and at the ends of its range.

Expected values are worked by hand from p, the geometric mean of the token probabilities. With p_w = 0.8 and
p_l = 0.5: odds 0.8 / 0.2 = 4 and 0.5 / 0.5 = 1, odds ratio 4, log OR = ln 4, L_OR = -ln(4 / (1 + 4)) = ln 1.25.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_trl.losses import (
    MAX_EXACT_LOGP,
    MAX_SLOPE,
    log1mexp,
    log_odds,
    log_odds_ratio,
    nll_divisors,
    nll_sum,
    nll_tokens,
    nll_units,
    odds_ratio_delta,
    odds_ratio_loss,
    orpo_loss,
    pair_logps,
)

LOGPS = st.one_of(
    st.floats(max_value=0.0, allow_nan=False, allow_subnormal=False),
    st.floats(min_value=-1e-3, max_value=0.0, allow_subnormal=False),
    st.floats(min_value=-20, max_value=0.0, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, -1e-38, -2e-8, -1e-7, -1e-4, -math.log(2), -100.0, -1e30, -3e38, -math.inf]),
)


def loss_of(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return odds_ratio_loss(log_odds_ratio(chosen, rejected))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_hand_worked_odds():
    assert log_odds(logs(0.8, 0.5, 0.2)).tolist() == pytest.approx([math.log(4), 0.0, -math.log(4)], abs=1e-14)


def test_hand_worked_losses():
    chosen, rejected = logs(0.8, 0.5, 0.5), logs(0.5, 0.8, 0.5)
    # Odds ratios 4, 1/4 and 1: sigmoid(ln r) = r / (1 + r).
    expected = [math.log(1.25), math.log(5), math.log(2)]
    assert loss_of(chosen, rejected).tolist() == pytest.approx(expected, abs=1e-14)


@given(st.floats(1e-12, 1 - 1.01e-4), st.floats(1e-12, 1 - 1.01e-4))
def test_equals_the_definition_in_float64(chosen, rejected):
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    assert loss_of(logs(chosen), logs(rejected)).item() == pytest.approx(math.log1p(1 / ratio), rel=1e-9)


@given(st.floats(-50, -1.01e-4), st.floats(-50, -1.01e-4))
def test_gradient_equals_the_paper(chosen, rejected):
    """d L_OR / d log p_w = -delta / (1 - p_w), with delta = 1 / (1 + odds ratio) (paper, eqs. 8 to 10)."""
    logp = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    loss_of(logp[:1], logp[1:]).sum().backward()
    p_chosen, p_rejected = math.exp(chosen), math.exp(rejected)
    log_ratio = chosen - math.log1p(-p_chosen) - rejected + math.log1p(-p_rejected)
    delta = 1 / (1 + math.exp(log_ratio))
    assert logp.grad.tolist() == pytest.approx([-delta / (1 - p_chosen), delta / (1 - p_rejected)], rel=1e-7)


def test_gradcheck():
    logp = torch.tensor([-1e-5, -1e-3, -0.3, -math.log(2) - 1e-3, -0.9, -7.0, -30.0], dtype=torch.float64)
    chosen, rejected = logp.clone().requires_grad_(), logp.flip(0).clone().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, (chosen, rejected), eps=1e-7, atol=1e-4)


@given(LOGPS, LOGPS, st.sampled_from([torch.float32, torch.float64]))
def test_loss_and_gradient_are_finite_for_every_logp(chosen, rejected, dtype):
    """TRL's loss is NaN at log p = 0 and its gradient NaN at -2e-8 (known failure 3)."""
    chosen = torch.tensor([chosen], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([rejected], dtype=dtype, requires_grad=True)
    loss = loss_of(chosen, rejected)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    assert chosen.grad.abs().max() <= MAX_SLOPE * 1.01
    assert rejected.grad.abs().max() <= MAX_SLOPE * 1.01


@pytest.mark.parametrize("logp", [-1e-7, -2e-8, 0.0])
def test_certain_rejected_response_is_pushed_by_a_bounded_gradient(logp):
    """TRL's gradient at log p = -1e-7 is 1e7, and 0 where a clamp would stop it (known failure 4)."""
    rejected = torch.tensor([logp], requires_grad=True)
    loss_of(torch.tensor([-1.0]), rejected).sum().backward()
    assert 0 < rejected.grad.item() <= 1.01 * MAX_SLOPE


@given(st.lists(LOGPS, min_size=2, max_size=2))
def test_log_odds_never_decrease(logps):
    low, high = sorted(logps)
    odds = log_odds(torch.tensor([low, high], dtype=torch.float64))
    assert odds[0] <= odds[1] + 1e-9


def test_tangent_joins_without_a_step():
    below, above = MAX_EXACT_LOGP * (1 + 1e-9), MAX_EXACT_LOGP * (1 - 1e-9)
    x = torch.tensor([below, above], dtype=torch.float64, requires_grad=True)
    odds = log_odds(x)
    odds.sum().backward()
    assert odds[1].item() - odds[0].item() == pytest.approx(MAX_SLOPE * (above - below), rel=1e-3)
    assert x.grad[0].item() == pytest.approx(x.grad[1].item(), rel=1e-6)


@given(st.floats(-60, -1e-12))
def test_log1mexp_keeps_its_digits(x):
    expected = math.log(-math.expm1(x)) if x > -0.69 else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_mean_of_many_hopeless_pairs_stays_finite():
    hopeless = torch.full((4096,), -math.inf)
    assert loss_of(hopeless, torch.full((4096,), -1.0)).sum().isfinite()


def test_delta_is_the_share_of_the_gradient_that_is_left():
    """delta(d) = 1 / (1 + odds(y_w) / odds(y_l)), and minus the derivative of L_OR with respect to log OR."""
    chosen, rejected = torch.tensor([-0.1, -2.0, -1.0, -9.0]).double(), torch.tensor([-3.0, -0.5, -1.0, -0.01]).double()
    odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
    ratio = log_odds_ratio(chosen, rejected).requires_grad_()
    odds_ratio_loss(ratio).sum().backward()
    delta = odds_ratio_delta(ratio.detach())
    torch.testing.assert_close(delta, 1 / (1 + odds[0] / odds[1]))
    torch.testing.assert_close(delta, -ratio.grad)
    assert delta[2] == 0.5


# ---- NLL term and equation 6 -----------------------------------------------------------------------------------------

# Two rows: a prompt of 3 with a response of 2, and a prompt of 2 with a response of 1. `sequence` covers 4 and 2
# tokens, `completion` 2 and 1. With -log p of 1 for each token of the first row and 4 for each of the second, over
# `sequence`: token mean (4 + 8) / 6 = 2; mean of the row means (1 + 4) / 2 = 2.5; sums / (11 - 1), mean over rows
# (0.4 + 0.8) / 2.
ROWS = ((3, 2), (2, 1))
EXPECTED = {"token_mean": 2.0, "micro_batch_mean": 2.0, "sequence_mean": 2.5, "max_length": 0.6}


@pytest.mark.parametrize(("scope", "tokens"), [("sequence", [4, 2]), ("completion", [2, 1])])
def test_scope_decides_the_tokens_of_the_nll(scope, tokens):
    assert [nll_tokens(prompt, response, scope) for prompt, response in ROWS] == tokens


@pytest.mark.parametrize(("reduction", "expected"), EXPECTED.items())
def test_reductions_of_the_nll_by_hand(reduction, expected):
    tokens = [nll_tokens(prompt, response, "sequence") for prompt, response in ROWS]
    divisors = torch.zeros(2, 4, dtype=torch.int64)
    logps = torch.zeros(2, 4, dtype=torch.float64)
    for row, (size, divisor) in enumerate(zip(tokens, nll_divisors(tokens, reduction, max_length=11), strict=True)):
        divisors[row, :size] = divisor
        logps[row, :size] = -(1, 4)[row]
    logps[1, 2:] = -100.0  # of no part in the NLL term
    assert nll_sum(logps, divisors).item() / nll_units(tokens, reduction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "max_length"])
def test_nll_of_a_step_is_that_of_its_micro_batches(reduction):
    """Sums over both rows at once, or one by one: the same term, but for `micro_batch_mean`."""
    tokens = [nll_tokens(prompt, response, "sequence") for prompt, response in ROWS]
    total = units = 0.0
    for size, value in zip(tokens, (1, 4), strict=True):
        divisors = torch.tensor([nll_divisors([size], reduction, 11) * size])
        total += nll_sum(torch.full((1, size), -float(value), dtype=torch.float64), divisors).item()
        units += nll_units([size], reduction)
    assert total / units == pytest.approx(EXPECTED[reduction], abs=1e-12)


def test_response_means_leave_out_what_belongs_to_no_response():
    """Chosen of a pair, chosen without a rejected one, rejected of the pair; index 3 belongs to none."""
    logps = torch.tensor([[-9.0, -1.0, -2.0, -4.0], [-3.0, -9.0, -0.5, -1.5]])
    index = torch.tensor([[3, 0, 0, 1], [1, 3, 2, 2]])
    chosen, rejected = pair_logps(logps, index, torch.tensor([2, 2, 2]), pairs=1)
    assert (chosen.tolist(), rejected.tolist()) == ([-1.5], [-1.0])


def test_equation_6_by_hand():
    """NLL sum 12 over 6 tokens; L_OR of p = 0.8 against 0.5, ln 1.25, in two of four pairs, else 0."""
    loss = orpo_loss(12.0, 2 * math.log(1.25), beta=0.1, units=6, pairs=4)
    assert loss == pytest.approx(2 + 0.1 * math.log(1.25) / 2, abs=1e-12)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 10), st.integers(1, 99), st.integers(1, 99))
def test_equation_6_of_sums_is_that_of_means(nll, odds_ratio, beta, units, pairs):
    of_means = orpo_loss(nll / units, odds_ratio / pairs, beta)
    assert orpo_loss(nll, odds_ratio, beta, units, pairs) == pytest.approx(of_means, rel=1e-12, abs=1e-300)
