"""What a contrast clip takes from a response that is there already: its log-probabilities behind both clips.

    d_it = log π(o_it | V) − log π(o_it | Ṽ),   Δ_i = mean over tokens t of d_it,   V in order, Ṽ its contrast

log π(o_it | V) has been sampled with. log π(o_it | Ṽ) takes one forward of the group in one row, without
gradient; nothing is sampled from the contrast clip (TaRO, arXiv 2606.09248; Video-KTR, arXiv 2601.19686).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.models.group_forward import VisionFeatures, VisualFeatures, encode_vision, group_logprobs
from video_r1.rollout.transformers import eval_mode


class Comparison(NamedTuple):
    """drops: as `logprob_drops` gives them; vision: features of the ordered prompts. None: not asked for."""

    drops: list[list[Tensor] | None] | None = None
    vision: list[VisualFeatures | None] | None = None


@torch.no_grad()
def compare(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
    shared_vision: bool,
) -> Comparison:
    """The drops, and with shared_vision the features that they are taken with (see `logprob_drops`)."""
    vision = None
    if shared_vision:
        prompts = [question.ordered for question in questions]
        parts = [prompts[n : n + batch_size] for n in range(0, len(prompts), batch_size)]
        vision = [features for part in parts for features in encode_vision(model, part)]
    drops = logprob_drops(model, questions, ordered, temperature, batch_size, vision)
    return Comparison(drops, vision)


@torch.no_grad()
def logprob_drops(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
    vision: Sequence[VisualFeatures | None] | None = None,
) -> list[list[Tensor] | None]:
    """d [L] float32 in nats of each of a question's G ordered completions; None where it has no contrast.

    model: whole, within the trainer's autocast. temperature: that was sampled with. batch_size: questions of
    one forward. vision: features of all ordered prompts, where contrasts permute temporal patches: theirs are
    permutations of these, and nothing is encoded.
    """
    drops: list[list[Tensor] | None] = [None] * len(questions)
    places = [place for place, question in enumerate(questions) if question.shuffled is not None]
    with eval_mode(model):
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            prompts = [prompt for place in chosen if (prompt := questions[place].shuffled) is not None]
            completions = [[rollout.token_ids for rollout in ordered[place]] for place in chosen]
            features = vision and [_permuted(questions[place], vision[place]) for place in chosen]
            scored = group_logprobs(
                model, prompts, completions, temperature=temperature, vision_features=features
            )
            behind = iter(scored.logprobs.float().cpu().split(scored.lengths.tolist()))
            for place in chosen:
                drops[place] = [rollout.logprobs - next(behind) for rollout in ordered[place]]
    return drops


def _permuted(question: Question, vision: VisualFeatures | None) -> VisionFeatures:
    """The features of the question's contrast clip from those of the clip in order."""
    assert isinstance(vision, VisionFeatures) and question.shuffled is not None
    patches = question.shuffled.patches
    assert patches is not None, "the contrast does not permute temporal patches"
    return vision.permuted(patches, question.ordered.features["video_grid_thw"].cpu())
