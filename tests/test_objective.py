"""The policy objective: figures worked out by hand, a plain reference, and accumulation."""

import math

import pytest
import torch

from video_r1.errors import ConfigError
from video_r1.training.objective import ClipRange, k3_kl, loss_normaliser, surrogate_loss

LN2 = math.log(2.0)
# Two responses of 2 and 1 tokens with the ratios 1.5, 1 | 0.5 and the advantages 1 | −1. With ε = 0.2 the
# token losses are −min(1.5, 1.2) = −1.2, −1 | −min(−0.5, −0.8) = 0.8.
OLD = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
RATIO = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)
LENGTHS = torch.tensor([2, 1])


def worked(loss_type, **settings):
    normaliser = loss_normaliser(loss_type, responses=2, tokens=3, max_completion_length=4)
    return surrogate_loss(
        OLD + RATIO.log(), OLD, ADVANTAGES, LENGTHS, normaliser=normaliser, loss_type=loss_type, **settings
    )


@pytest.mark.parametrize(
    ("loss_type", "settings", "loss"),
    [
        ("grpo", {}, ((-1.2 - 1.0) / 2 + 0.8) / 2),  # −0.15
        ("dapo", {}, (-1.2 - 1.0 + 0.8) / 3),  # −0.4667
        ("dr_grpo", {}, (-1.2 - 1.0 + 0.8) / (2 * 4)),  # −0.175
        ("grpo", {"clip": ClipRange(high=0.28)}, ((-1.28 - 1.0) / 2 + 0.8) / 2),
        ("grpo", {"clip": ClipRange(0.6, 0.6)}, ((-1.5 - 1.0) / 2 + 0.5) / 2),  # nothing is clipped
        # tokens in their micro-batch: the sum ÷ 3, by two of two responses
        ("bnpo", {}, (-1.2 - 1.0 + 0.8) / 3),
        # min(ρ, 1.2) A log π with log π = −1 + ln 1.5, −2 | −0.5 − ln 2
        ("cispo", {"clip": ClipRange(high=1.2)}, -(1.2 * (-1 + math.log(1.5)) - 2 - 0.5 * (-0.5 - LN2)) / 3),
        # 4 sigmoid(ρ − 1) for A = 1; 4/1.05 sigmoid(1.05 (ρ − 1)) for A = −1
        ("sapo", {}, (-(4 / (1 + math.exp(-0.5)) + 2) / 2 + 4 / 1.05 / (1 + math.exp(0.525))) / 2),
        # ρ of the first response: √1.5, clipped at 1.2
        ("grpo", {"importance_sampling_level": "sequence"}, (-1.2 + 0.8) / 2),
        # a negative advantage keeps ρ = 0.5 above 0.3, and min(−0.3, −0.8) is −0.8 all the same
        ("grpo", {"clip": ClipRange(0.2, 0.2, 0.3)}, ((-0.3 - 0.3) / 2 + 0.8) / 2),
        ("grpo", {"counted": torch.tensor([True, False])}, ((-1.2 - 1.0) / 2) / 2),
    ],
)
def test_worked_figures(loss_type, settings, loss: float) -> None:
    result = worked(loss_type, **settings)
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("off_policy", [0.0, 0.3])
def test_interaction_of_a_teacher_and_the_ratio_of_a_sequence(off_policy: float) -> None:
    """Credits +5, −5, 0, 0 and A = 0: −ρ·c_t ÷ 4, ρ of the whole response; not 0, their mean."""
    old = torch.tensor([-1.0, -2.0, -1.0, -1.0], dtype=torch.float64)
    policy = (old + off_policy * torch.tensor([1.0, -1.0, 1.0, 0.0])).requires_grad_()
    credits = torch.tensor([5.0, -5.0, 0.0, 0.0], dtype=torch.float64)
    surrogate_loss(
        policy, old, torch.zeros(1, dtype=torch.float64), torch.tensor([4]), normaliser=1.0,
        importance_sampling_level="sequence", token_credits=credits,
    ).loss.backward()  # fmt: skip
    ratio = math.exp(off_policy / 4)
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, -ratio * credits / 4)


def test_worked_statistics() -> None:
    result = worked("grpo")
    assert result.clip_ratio.item() == pytest.approx(2 / 3)
    assert result.kl.item() == 0.0


def test_worked_kl() -> None:
    # d = ln 2, 0, −ln 2: k3 = 2 − ln 2 − 1, 0, ½ + ln 2 − 1
    policy = OLD + RATIO.log()
    reference = policy + torch.tensor([LN2, 0.0, -LN2], dtype=torch.float64)
    expected = [1 - LN2, 0.0, LN2 - 0.5]
    assert k3_kl(policy, reference).tolist() == pytest.approx(expected, abs=1e-12)
    result = worked("grpo", beta=0.04, ref_logprobs=reference)
    assert result.loss.item() == pytest.approx(-0.15 + 0.04 * ((1 - LN2) / 2 + (LN2 - 0.5)) / 2, abs=1e-12)
    assert result.kl.item() == pytest.approx(0.5 / 3)
    assert worked("grpo", beta=0.0, ref_logprobs=reference).loss.item() == pytest.approx(-0.15)


def test_kl_is_clamped_where_the_exponential_would_overflow() -> None:
    # The values and the gradient of the paper's code: d is clamped to ±10 before exp(d) − d − 1.
    policy = torch.tensor([-95.0, -11.0, -9.5, -9.0, -2.0, -0.5, -1.0], requires_grad=True)
    reference = torch.tensor([-1.0, -0.5, -0.0, -0.0, -2.0, -9.5, -60.0])
    kl = k3_kl(policy, reference)
    kl.sum().backward()
    d = [10.0, 10.0, 9.5, 9.0, 0.0, -9.0, -10.0]
    assert kl.tolist() == pytest.approx([math.exp(x) - x - 1 for x in d], rel=1e-5)
    slopes = [0.0, 0.0, *(1 - math.exp(x) for x in d[2:6]), 0.0]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx(slopes, rel=1e-5)


def random_case(seed: int, responses: int = 12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (responses,), generator=generator)
    tokens = int(lengths.sum())

    def noise(count: int, size: float) -> torch.Tensor:
        return size * torch.randn(count, generator=generator, dtype=torch.float64)

    old = -noise(tokens, 1.0).abs()
    logprobs = (old + noise(tokens, 0.3)).requires_grad_()
    ref = old + noise(tokens, 0.5)
    weights = noise(tokens, 0.2).exp().clamp(max=1.2)
    return logprobs, old, ref, noise(responses, 1.0), lengths, weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "4 tokens but 3"),
        ({"advantages": torch.zeros(3)}, "3 advantages but 2"),
        ({"beta": 0.1}, "reference"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message: str) -> None:
    settings = {"logprobs": OLD, "old_logprobs": OLD, "advantages": ADVANTAGES, "lengths": LENGTHS}
    with pytest.raises(ValueError, match=message):
        surrogate_loss(**(settings | arguments), normaliser=1.0)


def test_normalisers() -> None:
    assert [loss_normaliser(kind, 8, 100, 64) for kind in ("grpo", "dapo", "dr_grpo")] == [8, 100, 512]
    assert loss_normaliser("dapo", 0, 0, 64) == 1
    with pytest.raises(ConfigError, match="loss_type: ppo cannot be imported"):
        loss_normaliser("ppo", 1, 1, 1)


def test_an_own_objective_is_named_by_its_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_losses.py").write_text(
        "from video_r1.training.objective import Objective\n"
        "def plain(ratio, logprobs, advantages, clip):\n    return ratio * advantages\n"
        "by_token = Objective(plain, 'tokens')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert worked("my_losses:plain").loss.item() == pytest.approx((-(1.5 + 1.0) / 2 + 0.5) / 2)
    assert worked("my_losses:by_token").loss.item() == pytest.approx((-1.5 - 1.0 + 0.5) / 3)
    with pytest.raises(ConfigError, match="my_losses:missing"):
        worked("my_losses:missing")
