"""Each loss type against TRL's own function, on the same tensors."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_objective import random_case

from video_r1.training.objective import (
    OBJECTIVES,
    ClipRange,
    entropy_sum,
    high_entropy,
    loss_normaliser,
    surrogate_loss,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the vLLM version that TRL would like
    GRPOTrainer: Any = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

LONGEST = 9  # room for the tokens of a response
OTHERS = {"epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "level": "token", "quantile": 1.0,
          "entropy_coef": 0.0}  # fmt: skip


def padded(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N] -> [R, longest], as TRL has it."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths.tolist())), batch_first=True)


def trl_loss(
    case: tuple, entropy: torch.Tensor, finished: torch.Tensor, loss_type: str, **chosen: Any
) -> Any:
    """Compute TRL's loss of the tensors with a fake trainer that has the settings."""
    logprobs, old, ref, advantages, lengths, weights = case
    mask = padded(torch.ones(len(logprobs)), lengths) * finished[:, None]
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, **_: x,
        pad_across_processes=lambda x, **_: x,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            padded(logprobs, lengths), padded(entropy, lengths), None,
        ),
        top_entropy_quantile=chosen["quantile"], importance_sampling_level=chosen["level"], beta=0.04,
        loss_type=loss_type, epsilon_low=chosen["epsilon"], epsilon_high=chosen["epsilon_high"],
        args=SimpleNamespace(delta=chosen["delta"], sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
                             use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=True, vllm_importance_sampling_correction=True, off_policy_mask_threshold=None,
        aux_loss_enabled=False, max_completion_length=LONGEST, use_adaptive_entropy=False,
        _entropy_bonus_enabled=chosen["entropy_coef"] != 0, entropy_coef=chosen["entropy_coef"],
        current_gradient_accumulation_steps=1, accelerator=accelerator, model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer.get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": padded(old, lengths),
        "ref_per_token_logps": padded(ref, lengths), "importance_sampling_ratio": padded(weights, lengths),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"epsilon_high": 5.0, "level": "sequence"},
        {"delta": 1.3},
        {"quantile": 0.4},
        {"cut": True, "quantile": 0.4, "level": "sequence"},
    ],
)
def test_values_and_gradients_are_those_of_trl(loss_type: str, chosen: dict[str, Any]) -> None:
    case = random_case(5)
    logprobs, old, ref, advantages, lengths, weights = case
    chosen = OTHERS | chosen
    finished = torch.ones(len(lengths), dtype=torch.bool)
    if chosen.pop("cut", False):
        finished[[1, 4, 5]] = False
    entropy = torch.rand(len(logprobs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = trl_loss(case, entropy, finished, loss_type, **chosen)
    (expected,) = torch.autograd.grad(theirs, logprobs)

    by_token = torch.repeat_interleave(finished, lengths)
    if chosen["quantile"] < 1:  # of the tokens that count
        kept = high_entropy(entropy, entropy[by_token], chosen["quantile"])
        assert 0.3 < kept[by_token].double().mean() < 0.5
        weights = weights * kept
    ours = surrogate_loss(
        logprobs, old, advantages, lengths,
        normaliser=loss_normaliser(loss_type, len(lengths), int(lengths[finished].sum()), LONGEST),
        loss_type=loss_type, clip=ClipRange(chosen["epsilon"], chosen["epsilon_high"], chosen["delta"]),
        importance_sampling_level=chosen["level"], beta=0.04, ref_logprobs=ref, token_weights=weights,
        counted=finished,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(ours.loss, logprobs)
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("quantile", [1.0, 0.4])
@pytest.mark.parametrize("cut", [False, True])
def test_the_entropy_bonus_is_that_of_trl(loss_type: str, quantile: float, cut: bool) -> None:
    """The same mean entropy for each loss type, over the tokens that count and are kept."""
    case = random_case(5)
    lengths = case[4]
    finished = torch.ones(len(lengths), dtype=torch.bool)
    finished[[1, 4, 5]] = not cut
    draw = torch.Generator().manual_seed(0)
    entropy = torch.rand(len(case[0]), generator=draw, dtype=torch.float64).requires_grad_()
    chosen = OTHERS | {"quantile": quantile}
    with_bonus, without = (
        trl_loss(case, entropy, finished, loss_type, **chosen | {"entropy_coef": coef}) for coef in (0.3, 0.0)
    )
    (expected,) = torch.autograd.grad(with_bonus, entropy)

    counted = torch.repeat_interleave(finished, lengths)
    kept = high_entropy(entropy.detach(), entropy.detach()[counted], quantile)
    tokens = int((kept & counted).sum())
    ours = -0.3 * entropy_sum(entropy, lengths, finished, kept if quantile < 1 else None) / tokens
    (gradient,) = torch.autograd.grad(ours, entropy)
    assert ours.item() == pytest.approx((with_bonus - without).item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected)
