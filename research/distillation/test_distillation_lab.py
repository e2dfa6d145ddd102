"""Token weights of the lab of distillation by hand, and its table."""

import torch

from research.distillation.experiment import table, token_weights


def test_token_weights_by_hand() -> None:
    """A response that loses 2 nats at one of three tokens, and one that loses nothing."""
    weights = token_weights([torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-1.0, -2.0])])
    torch.testing.assert_close(weights, torch.tensor([3.0, 0.0, 0.0, 1.0, 1.0]))


def test_gains_are_over_the_student_of_the_same_seed() -> None:
    found = {("student", 0): 0.4, ("student", 1): 0.6, ("distil", 0): 0.5, ("distil", 1): 0.9}
    rows = [{"arm": arm, "seed": seed, "accuracy": value, "gap": 0.1} for (arm, seed), value in found.items()]
    assert "| distil | 0.500 0.900 | 0.100 0.100 | +0.200 |" in table(rows)
