"""ORPO's loss written out from the paper: float64, full logits, one row at a time. It uses no code of the package."""

import math

import torch


def token_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """`[tokens - 1]` log-probabilities of all tokens but the first."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def pair_terms(model, pair: dict) -> dict:
    """NLL tokens of both scopes, and the mean log-probabilities, of one pair of token ids."""
    prompt = len(pair["prompt_ids"])
    chosen = token_logps(model, pair["prompt_ids"], pair["chosen_ids"])
    terms = {"sequence": -chosen, "completion": -chosen[prompt - 1 :], "chosen": chosen[prompt - 1 :].mean()}
    if pair["rejected_ids"] is not None:
        rejected = token_logps(model, pair["prompt_ids"], pair["rejected_ids"])
        terms["rejected"] = rejected[prompt - 1 :].mean()
        p, q = terms["chosen"].exp(), terms["rejected"].exp()
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        terms["log_odds"] = odds_ratio.log()
        terms["odds_ratio_loss"] = -(1 / (1 + 1 / odds_ratio)).log()
    return terms


def step_metrics(model, micro_batches: list[list[dict]], beta: float, scope: str, reduction: str, max_length: int):
    """Loss and metrics of one optimiser step whose rows come in these micro-batches."""
    terms = [[pair_terms(model, pair) for pair in batch] for batch in micro_batches]
    rows = [row for batch in terms for row in batch]
    pairs = [row for row in rows if "rejected" in row]
    nll = {
        "token_mean": lambda: torch.cat([row[scope] for row in rows]).mean(),
        "micro_batch_mean": lambda: torch.stack(
            [torch.cat([row[scope] for row in batch]).mean() for batch in terms]
        ).mean(),
        "sequence_mean": lambda: torch.stack([row[scope].mean() for row in rows]).mean(),
        "max_length": lambda: torch.stack([row[scope].sum() / (max_length - 1) for row in rows]).mean(),
    }[reduction]()

    def mean(name: str) -> torch.Tensor:
        return torch.stack([row[name] for row in pairs]).mean() if pairs else torch.tensor(0.0)

    metrics = {
        "nll_loss": nll,
        "loss": nll + beta * mean("odds_ratio_loss"),
        "log_odds_ratio": -mean("odds_ratio_loss"),
        "log_odds_chosen": mean("log_odds") if pairs else torch.tensor(math.nan),
        "logps/chosen": mean("chosen"),
        "logps/rejected": mean("rejected"),
        "rewards/chosen": beta * mean("chosen"),
        "rewards/rejected": beta * mean("rejected"),
        "rewards/margins": beta * (mean("chosen") - mean("rejected")),
    }
    if pairs:
        better = [float(row["chosen"] > row["rejected"]) for row in pairs]
        metrics["rewards/accuracies"] = torch.tensor(sum(better) / len(better))
    return metrics
