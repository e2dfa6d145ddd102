"""What a contrast clip takes from a response that is there already: its log-probabilities behind both clips.

    d_it = log π(o_it | V) − log π(o_it | Ṽ),   Δ_i = mean over tokens t of d_it,   V in order, Ṽ its contrast

Each takes one forward of the group in one row, without gradient; nothing is sampled from the contrast clip
(TaRO, arXiv 2606.09248; Video-KTR, arXiv 2601.19686). log π(o_it | V) has been sampled with, which saves its
forward in float32 (`samples_as_it_scores`). Decoding in bf16, or in another program, rounds a token's by some
0.01: a difference of two ways to compute would be there for a clip that does not move, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.models.group_forward import VisionFeatures, VisualFeatures, encode_vision, group_logprobs
from video_r1.rollout.transformers import eval_mode


class Comparison(NamedTuple):
    """drops: as `logprob_drops` gives them; vision: features of the ordered prompts. None: not asked for."""

    drops: list[list[Tensor] | None] | None = None
    vision: list[VisualFeatures | None] | None = None


def samples_as_it_scores(model: nn.Module) -> bool:
    """Whether the log-probs that this model samples with are those of its forward, within 1e-5: it computes
    in float32, on a CPU (on GPUs float32 may be TF32).
    """
    weights = list(model.parameters())
    autocast = torch.is_autocast_enabled("cpu")
    return not autocast and all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)


@torch.no_grad()
def compare(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
    shared_vision: bool,
    as_sampled: bool,
) -> Comparison:
    """The drops, and with shared_vision the features that they are taken with (see `logprob_drops`)."""
    vision = None
    if shared_vision:
        prompts = [question.ordered for question in questions]
        parts = [prompts[n : n + batch_size] for n in range(0, len(prompts), batch_size)]
        vision = [features for part in parts for features in encode_vision(model, part)]
    drops = logprob_drops(model, questions, ordered, temperature, batch_size, vision, as_sampled)
    return Comparison(drops, vision)


@torch.no_grad()
def logprob_drops(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
    vision: Sequence[VisualFeatures | None] | None = None,
    as_sampled: bool = True,
) -> list[list[Tensor] | None]:
    """d [L] float32 in nats of each of a question's G ordered completions; None where it has no contrast.

    model: whole, within the trainer's autocast. temperature: that was sampled with. batch_size: questions of
    one forward. vision: features of all ordered prompts; those of contrasts that permute temporal patches
    are permutations of these, and are not encoded. as_sampled: the completions' own log-probs are those
    behind the ordered prompts (`samples_as_it_scores`); else these are computed here.
    """
    drops: list[list[Tensor] | None] = [None] * len(questions)
    places = [place for place, question in enumerate(questions) if question.shuffled is not None]
    with eval_mode(model):
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            score = partial(_scored, model, [ordered[place] for place in chosen], temperature)
            contrasts = [prompt for place in chosen if (prompt := questions[place].shuffled) is not None]
            permute = vision is not None and all(prompt.patches is not None for prompt in contrasts)
            features = [_permuted(questions[n], vision[n]) for n in chosen] if vision and permute else None
            without = score(contrasts, features)
            if as_sampled:
                own = [[rollout.logprobs for rollout in ordered[place]] for place in chosen]
            else:
                own = score([questions[n].ordered for n in chosen], vision and [vision[n] for n in chosen])
            for place, before, after in zip(chosen, own, without, strict=True):
                drops[place] = [b - a for b, a in zip(before, after, strict=True)]
    return drops


def _scored(
    model: Any,
    rollouts: Sequence[Sequence[Rollout]],
    temperature: float,
    prompts: Sequence[Prompt],
    features: Sequence[VisualFeatures | None] | None,
) -> list[list[Tensor]]:
    """log π [L] float32 of each prompt's completions behind it."""
    completions = [[rollout.token_ids for rollout in group] for group in rollouts]
    found = group_logprobs(model, prompts, completions, temperature=temperature, vision_features=features)
    logprobs = iter(found.logprobs.float().cpu().split(found.lengths.tolist()))
    return [[next(logprobs) for _ in group] for group in rollouts]


def _permuted(question: Question, vision: VisualFeatures | None) -> VisionFeatures:
    """The features of the question's contrast clip from those of the clip in order."""
    assert isinstance(vision, VisionFeatures) and question.shuffled is not None
    patches = question.shuffled.patches
    assert patches is not None, "the contrast does not permute temporal patches"
    return vision.permuted(patches, question.ordered.features["video_grid_thw"].cpu())
