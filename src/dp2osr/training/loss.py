"""The DPO loss for diffusion and flow models, as functions of tensors alone (method.md, DPO)."""

import torch
from torch.nn import functional

Stats = dict[str, torch.Tensor]

STATS = ("loss", "implicit_accuracy", "margin", "abs_logit", "error_chosen", "error_rejected")


def image_errors(target: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Return e = mean squared error of each image: (B, ...) and (B, ...) to (B,) float64.

    The loss sees β/2 times the difference of nearly equal errors: rounded to float32, z would be off by 1e-4.
    """
    return (target.float() - prediction.float()).square().flatten(1).mean(1, dtype=torch.float64)


def dpo_loss(
    error_w: torch.Tensor,
    error_w_ref: torch.Tensor,
    error_l: torch.Tensor,
    error_l_ref: torch.Tensor,
    *,
    beta: float,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, Stats]:
    """Return L = Σ w·ℓ / (number of pairs) and its statistics, all of (P,) errors and weights.

    ℓ = -log sigmoid(z), z = -β/2 · [(e_w - e_w_ref) - (e_l - e_l_ref)]. The division by the number of pairs, not by
    the sum of weights, keeps the weights' scale: HPO weights have mean 1 over the data set, not over a batch.
    Statistics are scalar means over the pairs, detached: one for each name in STATS.
    """
    gain_w, gain_l = error_w - error_w_ref, error_l - error_l_ref
    logit = -beta / 2 * (gain_w - gain_l)
    loss = (weights * -functional.logsigmoid(logit)).mean()
    means = (loss, (logit > 0).float().mean(), (gain_l - gain_w).mean(), logit.abs().mean(), gain_w.mean())
    values = (value.detach() for value in (*means, gain_l.mean()))
    return loss, dict(zip(STATS, values, strict=True))


def group_pairs(
    errors: torch.Tensor,
    errors_ref: torch.Tensor,
    *,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    beta: float,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, Stats]:
    """Return the loss of P pairs from the errors of I images, each computed once.

    errors, errors_ref: (I,) of policy and reference; chosen, rejected: (P,) int64 positions of winner and loser.
    """
    return dpo_loss(
        errors[chosen], errors_ref[chosen], errors[rejected], errors_ref[rejected], beta=beta, weights=weights
    )
