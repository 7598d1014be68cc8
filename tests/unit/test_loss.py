"""The DPO loss: numbers by hand, its symmetries, and the group form against the pair form."""

import math

import pytest
import torch

from dp2osr.training.loss import STATS, dpo_loss, group_pairs, image_errors


def test_numbers_by_hand() -> None:
    """Two pairs, β = 2: z = -(0.1 - 0.3) = 0.2 and z = -(0.4 - 0) = -0.4; weights 1 and 3."""
    loss, stats = dpo_loss(
        torch.tensor([0.6, 0.9]),
        torch.tensor([0.5, 0.5]),
        torch.tensor([1.3, 1.0]),
        torch.tensor([1.0, 1.0]),
        beta=2.0,
        weights=torch.tensor([1.0, 3.0]),
    )
    wanted = (math.log1p(math.exp(-0.2)) + 3 * math.log1p(math.exp(0.4))) / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    means = {"loss": wanted, "implicit_accuracy": 0.5, "margin": -0.1, "abs_logit": 0.3}
    means |= {"error_chosen": 0.25, "error_rejected": 0.15}
    assert tuple(stats) == STATS
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(means, rel=1e-5)


def test_log_2_where_the_policy_is_the_reference() -> None:
    errors = torch.rand(5)
    loss, stats = dpo_loss(errors, errors, errors + 1, errors + 1, beta=5000.0, weights=torch.ones(5))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert stats["margin"] == 0 and stats["implicit_accuracy"] == 0


def test_swapping_winner_and_loser_flips_the_gradient() -> None:
    """At z = 0 the gradient of the winner's error is the negative of the loser's, and a swap exchanges them."""
    winner, loser = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    ones = torch.ones(4)
    loss, stats = dpo_loss(winner, winner.detach(), loser, loser.detach(), beta=3.0, weights=ones)
    up, down = torch.autograd.grad(loss, (winner, loser))
    torch.testing.assert_close(up, torch.full((4,), 3.0 / 4 / 4))  # β/2 · σ(0) / 4 pairs
    torch.testing.assert_close(down, -up)
    other = torch.rand(4)
    _, stats = dpo_loss(winner, other, loser, other, beta=3.0, weights=ones)
    _, swapped = dpo_loss(loser, other, winner, other, beta=3.0, weights=ones)
    assert stats["margin"].item() == pytest.approx(-swapped["margin"].item())


def test_order_of_pairs_does_not_matter() -> None:
    columns = torch.rand(5, 8)
    order = torch.randperm(8)
    loss, _ = dpo_loss(*columns[:4], beta=10.0, weights=columns[4])
    shuffled, _ = dpo_loss(*columns[:4, order], beta=10.0, weights=columns[4, order])
    torch.testing.assert_close(loss, shuffled)


def test_group_form_equals_pair_form() -> None:
    """3 × 3 pairs from 6 errors equal the loss of the 9 pairs written out."""
    errors, reference = torch.rand(6), torch.rand(6)
    pairs = [(winner, loser) for winner in range(3) for loser in range(3, 6)]
    chosen, rejected = torch.tensor(pairs).T
    weights = torch.rand(9)
    grouped, _ = group_pairs(errors, reference, chosen=chosen, rejected=rejected, beta=20.0, weights=weights)
    logits = [-10 * ((errors[w] - reference[w]) - (errors[l] - reference[l])) for w, l in pairs]  # noqa: E741
    wanted = sum(w * math.log1p(math.exp(-z)) for w, z in zip(weights.tolist(), logits, strict=True)) / 9
    assert grouped.item() == pytest.approx(wanted, rel=1e-5)


def test_errors_are_means_over_all_but_the_batch() -> None:
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), 0.5)])
    assert image_errors(target, prediction.half()).tolist() == [4.0, 0.25]
