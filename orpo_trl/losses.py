"""The objective of ORPO (Hong et al. 2024, arXiv 2403.07691), as pure functions of tensors. All of it is in this file.

The model learns to write the chosen response (the NLL term), and to prefer it to the rejected one (the odds-ratio
term). With log p(y) the mean token log-probability of a response, and p its exponential:

    odds(y)   = p / (1 - p)                                                      (paper, eq. 4)
    log odds  = log p - log(1 - p)
    L_OR      = -log sigmoid( log odds(y_w) - log odds(y_l) )                     (paper, eqs. 5 and 7)
    L_ORPO    = L_NLL(y_w) + lambda * L_OR                                        (paper, eq. 6)

Symbols: x prompt, y_w chosen response, y_l rejected response, lambda the weight that TRL calls `beta`.

What the loss is made of:

    orpo_loss                       eq. 6
      nll_sum                       the NLL term; `nll_tokens`, `nll_divisors` and `nll_units` are its reductions
      odds_ratio_loss               eq. 7, of each pair; the loss has their mean
        log_odds_ratio              eq. 5
          log_odds                  eq. 4
            pair_logps              log p of each response
              response_sums

Each sum covers a micro-batch; the counts that it is divided by cover the whole optimiser step, over all ranks and
accumulation steps. So the loss does not depend on how a global batch is split.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# The slope of the log odds is 1 / (1 - p), without bound as p -> 1. Above this mean log-probability the curve is
# replaced by its tangent. So the slope never exceeds 1 / (1 - exp(-1e-4)), about 1e4, and stays positive: a response
# that the model is certain of still gets a gradient, of bounded size.
MAX_EXACT_LOGP = -1e-4
MAX_SLOPE = 10_000.5

# log p = -inf (or a sum that overflowed) is read as this: far below any real value, yet sums of it stay finite in fp32.
MIN_LOGP = -1e30

_LOG_HALF = -0.6931471805599453


# ---- Odds-ratio term -------------------------------------------------------------------------------------------------


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


# ---- NLL term --------------------------------------------------------------------------------------------------------

# The NLL term of an optimiser step is
#
#     sum over its tokens t of -log p(t) / divisor(t)  /  units of the step
#
# | reduction        | divisor of a token        | units         |
# | ---------------- | ------------------------- | ------------- |
# | token_mean       | 1                         | tokens        |
# | micro_batch_mean | tokens of its micro-batch | micro-batches |
# | sequence_mean    | tokens of its row         | rows          |
# | max_length       | max_length - 1            | rows          |


def nll_tokens(prompt: Any, response: Any, scope: str) -> Any:
    """Tokens of a chosen row that the NLL term covers. Nothing predicts the first token of a row.

    Args:
        prompt, response: their lengths in tokens, as ints or as arrays of them.
        scope: 'sequence' (prompt and response) or 'completion' (the response alone).
    """
    return response if scope == "completion" else prompt + response - 1


def nll_divisors(tokens: Sequence[int], reduction: str, max_length: int | None = None) -> list[int]:
    """For each row of a micro-batch, the divisor of its tokens' negative log-likelihood.

    Args:
        tokens: `nll_tokens` of each row.
        reduction: 'token_mean', 'micro_batch_mean', 'sequence_mean' or 'max_length'.
        max_length: of a row in tokens; the reduction 'max_length' alone needs it.
    """
    return {
        "token_mean": [1] * len(tokens),
        "micro_batch_mean": [sum(tokens)] * len(tokens),
        "sequence_mean": list(tokens),
        "max_length": [(max_length or 0) - 1] * len(tokens),
    }[reduction]


def nll_units(tokens: Sequence[int], reduction: str) -> int:
    """Units of a micro-batch: tokens, micro-batches or rows. The NLL term is the mean over the units of the step.

    Args:
        tokens, reduction: as in `nll_divisors`.
    """
    return {"token_mean": sum(tokens), "micro_batch_mean": int(bool(tokens))}.get(reduction, len(tokens))


def nll_sum(token_logps: torch.Tensor, divisors: torch.Tensor) -> torch.Tensor:
    """Sum over a micro-batch of each token's negative log-likelihood / its divisor.

    Args:
        token_logps: `[rows, seq]`, fp32, log-probability of each scored token.
        divisors: `[rows, seq]`, int64, from `nll_divisors`; 0 where a token is not part of the NLL term.

    Returns:
        Scalar, fp32; to be divided by the `nll_units` of the optimiser step.
    """
    weights = torch.where(divisors > 0, 1 / divisors.clamp(min=1).to(token_logps.dtype), 0)
    return -(token_logps * weights).sum()


# ---- Log-probabilities of responses ----------------------------------------------------------------------------------


def response_sums(token_logps: torch.Tensor, completion_index: torch.Tensor, completions: int) -> torch.Tensor:
    """log P(y|x): sum of the token log-probabilities of each response.

    Args:
        token_logps: `[rows, seq]`, log-probability of each scored token.
        completion_index: `[rows, seq]`, int64, the response that the token belongs to; `completions` for none.
        completions: number of responses.

    Returns:
        `[completions]`, of the dtype of `token_logps`.
    """
    # One slot more than there are responses takes the tokens that belong to none.
    sums = token_logps.new_zeros(completions + 1)
    return sums.index_add(0, completion_index.flatten(), token_logps.flatten())[:-1]


def pair_logps(
    token_logps: torch.Tensor, completion_index: torch.Tensor, completion_lengths: torch.Tensor, pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of both responses of each pair: the mean of their token log-probabilities.

    Args:
        token_logps, completion_index: as in `response_sums`. Of the responses, the chosen ones of the pairs come first
            and the rejected ones last, in the order of the pairs.
        completion_lengths: `[completions]`, int64, scored tokens of each response.
        pairs: number of pairs.

    Returns:
        `[pairs]` chosen and `[pairs]` rejected, of the dtype of `token_logps`.
    """
    means = response_sums(token_logps, completion_index, len(completion_lengths)) / completion_lengths
    return means[:pairs], means[len(means) - pairs :]


# ---- Equation 6 ------------------------------------------------------------------------------------------------------


def orpo_loss(
    nll: torch.Tensor | float,
    odds_ratio: torch.Tensor | float,
    beta: float,
    units: torch.Tensor | int = 1,
    pairs: torch.Tensor | int = 1,
) -> torch.Tensor | float:
    """L_ORPO = L_NLL + lambda * L_OR (paper, eq. 6), from sums and the counts that make them means.

    Args:
        nll: scalar, from `nll_sum`, or the NLL term itself with `units` of 1.
        odds_ratio: scalar, sum of `odds_ratio_loss` over pairs, or their mean with `pairs` of 1.
        beta: lambda.
        units: `nll_units` of the optimiser step.
        pairs: pairs of the optimiser step.

    Returns:
        Scalar: the part of the micro-batch in the loss of the optimiser step.
    """
    return nll / units + beta * odds_ratio / pairs
