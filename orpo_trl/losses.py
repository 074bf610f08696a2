"""The odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691), as pure functions of tensors.

With p = P(y|x)^(1/|y|), the geometric mean of a response's token probabilities, and log p its mean token
log-probability:

    odds(y)   = p / (1 - p)                                                      (paper, eq. 4)
    log odds  = log p - log(1 - p)
    L_OR      = -log sigmoid( log odds(y_w) - log odds(y_l) )                     (paper, eqs. 5 and 7)
    L_ORPO    = L_NLL(y_w) + lambda * L_OR                                        (paper, eq. 6)

Symbols: x prompt, y_w chosen response, y_l rejected response, lambda the weight that TRL calls `beta`.
"""

import torch
import torch.nn.functional as F

# The slope of the log odds is 1 / (1 - p), without bound as p -> 1. Above this mean log-probability the log odds go on
# along their tangent, so the slope never exceeds 1 / (1 - exp(-1e-4)), about 1e4, and stays positive: a response that
# the model is certain of is still pushed, by a bounded amount.
MAX_EXACT_LOGP = -1e-4
MAX_SLOPE = 10_000.5

# log p = -inf (or a sum that overflowed) is read as this: far below any real value, yet sums of it stay finite in fp32.
MIN_LOGP = -1e30

_LOG_HALF = -0.6931471805599453


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, accurate and with a finite gradient on the whole range.

    Args:
        x: any shape, floating point, strictly negative.

    Returns:
        Same shape and dtype.

    The two branches are those of Mächler (2012), "Accurately computing log(1 - exp(-|a|))". Each branch is given
    only the part of the range where it is finite: `torch.where` alone picks the right value but multiplies the
    other branch's infinite derivative by zero, which is NaN (the fault of TRL's `log1mexp`).
    """
    low = torch.log1p(-torch.exp(x.clamp(max=_LOG_HALF)))
    high = torch.log(-torch.expm1(x.clamp(min=_LOG_HALF)))
    return torch.where(x < _LOG_HALF, low, high)


def log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log odds of a response, log p - log(1 - p), from its mean token log-probability.

    Args:
        logp: any shape, floating point, mean token log-probabilities <= 0. The values 0 and -inf are allowed.

    Returns:
        Same shape and dtype, always finite. Exact for `MIN_LOGP <= logp <= MAX_EXACT_LOGP`; above, the tangent at
        `MAX_EXACT_LOGP`; below, constant.
    """
    logp = logp.clamp(min=MIN_LOGP)
    # Two clamps would both pass the gradient where they meet, and double the slope there.
    inside = logp < MAX_EXACT_LOGP
    exact = torch.where(inside, logp, MAX_EXACT_LOGP)
    beyond = torch.where(inside, 0, logp - MAX_EXACT_LOGP)
    return exact - log1mexp(exact) + MAX_SLOPE * beyond


def log_odds_ratio(chosen_logp: torch.Tensor, rejected_logp: torch.Tensor) -> torch.Tensor:
    """log OR = log odds(y_w) - log odds(y_l) of each pair.

    Args:
        chosen_logp: `[pairs]`, mean token log-probabilities of the chosen responses.
        rejected_logp: `[pairs]`, the same for the rejected responses.

    Returns:
        `[pairs]`; positive where the model prefers the chosen response.
    """
    return log_odds(chosen_logp) - log_odds(rejected_logp)


def odds_ratio_loss(log_ratio: torch.Tensor) -> torch.Tensor:
    """L_OR = -log sigmoid(log OR) of each pair (paper, eq. 7).

    Args:
        log_ratio: `[pairs]`, from `log_odds_ratio`.

    Returns:
        `[pairs]`, >= 0; log 2 where the model has no preference.
    """
    return -F.logsigmoid(log_ratio)


def odds_ratio_delta(log_ratio: torch.Tensor) -> torch.Tensor:
    """delta(d) of each pair: how strongly the odds-ratio term still pulls on it (paper, section 4.3).

    The gradient of L_OR is delta(d) * h(d) with

        delta(d) = 1 / (1 + odds(y_w) / odds(y_l)) = sigmoid(-log OR)

    Args:
        log_ratio: `[pairs]`, from `log_odds_ratio`.

    Returns:
        `[pairs]`, from 0 to 1: near 1 where the model prefers the rejected response by far, 1/2 where it has no
        preference, near 0 where it prefers the chosen one by far.
    """
    return torch.sigmoid(-log_ratio)
