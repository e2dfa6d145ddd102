"""Token contrasts: how much log-prob the tokens of a completion lose behind the contrast clip.

    d_it = log π(o_it | V) − log π(o_it | Ṽ),   V the clip in order, Ṽ its contrast

Each term takes one forward of the group in one row; nothing is sampled from the contrast clip (TaRO, arXiv
2606.09248; Video-KTR, arXiv 2601.19686). In float32 the sampling log-probs serve as log π(o_it | V). Decoding
in bf16, or in vLLM, rounds a log-prob by about 0.01: even a clip without motion would then show a contrast.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollouts
from video_r1.models.group_forward import VisionFeatures, VisualFeatures, encode_groups, group_logprobs
from video_r1.rollout.engine import eval_mode


def samples_as_it_scores(model: nn.Module) -> bool:
    """Whether sampling log-probs equal those of a forward within 1e-5: in float32 on a CPU (on GPUs float32
    may be TF32).
    """
    weights = list(model.parameters())
    autocast = torch.is_autocast_enabled("cpu")
    return not autocast and all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)


@torch.no_grad()
def with_vision(model: nn.Module, rollouts: Sequence[Rollouts], batch_size: int) -> list[Rollouts]:
    """Add the features of the ordered clips and of tool turns. batch_size: questions per forward."""
    features: list[list[VisualFeatures | None]] = []
    for start in range(0, len(rollouts), batch_size):
        batch = rollouts[start : start + batch_size]
        pieces = [[rollout.pieces() for rollout in one.ordered] for one in batch]
        features += encode_groups(model, [one.question.ordered for one in batch], pieces)
    return [replace(one, vision=own) for one, own in zip(rollouts, features, strict=True)]


@torch.no_grad()
def token_contrasts(
    model: Any, rollouts: Sequence[Rollouts], temperature: float, batch_size: int, as_sampled: bool = True
) -> list[list[Tensor] | None]:
    """Compute d [L] float32 in nats of each of a question's G ordered completions; None without a contrast.

    batch_size: questions per forward. as_sampled: use the sampling log-probs as log π(o | V). Features that
    the rollouts have (`vision`) serve both clips where the contrast permutes temporal patches.
    """
    contrasts: list[list[Tensor] | None] = [None] * len(rollouts)
    places = [place for place, one in enumerate(rollouts) if one.question.contrast is not None]
    with eval_mode(model):
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            batch = [rollouts[place] for place in chosen]
            permute = all(one.vision is not None and len(one.vision) == 1 and _patches(one) for one in batch)
            changed = [_permuted(one) for one in batch] if permute else None
            without = _scored(model, batch, temperature, changed, contrast=True)
            if as_sampled:
                own = [[rollout.logprobs for rollout in one.ordered] for one in batch]
            else:
                whole = all(one.vision is not None for one in batch)
                known = [part for one in batch for part in one.vision or ()] if whole else None
                own = _scored(model, batch, temperature, known)
            for place, before, after in zip(chosen, own, without, strict=True):
                contrasts[place] = [b - a for b, a in zip(before, after, strict=True)]
    return contrasts


def _scored(
    model: Any,
    rollouts: Sequence[Rollouts],
    temperature: float,
    features: Sequence[VisualFeatures | None] | None,
    contrast: bool = False,
) -> list[list[Tensor]]:
    """Compute log π [L] float32 of each ordered completion behind its clip, or behind the contrast clip."""
    prompts = [cast(Prompt, one.question.contrast if contrast else one.question.ordered) for one in rollouts]
    completions = [[rollout.token_ids for rollout in one.ordered] for one in rollouts]
    pieces = [[rollout.pieces(contrast) for rollout in one.ordered] for one in rollouts]
    scored = group_logprobs(model, prompts, completions, temperature, vision_features=features, pieces=pieces)
    logprobs = iter(scored.logprobs.float().cpu().split(scored.lengths.tolist()))
    return [[next(logprobs) for _ in one.ordered] for one in rollouts]


def _patches(rollouts: Rollouts) -> Any:
    return rollouts.question.contrast is not None and rollouts.question.contrast.patches is not None


def _permuted(rollouts: Rollouts) -> VisionFeatures:
    """Permute the features of a question's ordered clip into those of its contrast clip."""
    question, (features,) = rollouts.question, cast(Sequence[VisionFeatures], rollouts.vision)
    patches = cast(Prompt, question.contrast).patches
    assert patches is not None
    return features.permuted(patches, question.ordered.features["video_grid_thw"].cpu())
