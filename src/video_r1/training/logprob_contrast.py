"""Log-prob drops: how much log-prob the tokens of a completion lose when the contrast clip replaces its clip.

    d_it = log π(o_it | V) − log π(o_it | Ṽ),   Δ_i = mean over tokens t of d_it,   V in order, Ṽ its contrast

Each term takes one forward of the group in one row; nothing is sampled from the contrast clip (TaRO, arXiv
2606.09248; Video-KTR, arXiv 2601.19686). In float32 the sampling log-probs serve as log π(o_it | V). Decoding
in bf16, or in vLLM, rounds a log-prob by about 0.01: even a clip without motion would then show a drop.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.models.group_forward import VisionFeatures, VisualFeatures, group_logprobs
from video_r1.rollout.engine import eval_mode


def samples_as_it_scores(model: nn.Module) -> bool:
    """Whether sampling log-probs equal those of a forward within 1e-5: in float32 on a CPU (on GPUs float32
    may be TF32).
    """
    weights = list(model.parameters())
    autocast = torch.is_autocast_enabled("cpu")
    return not autocast and all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)


@torch.no_grad()
def logprob_drops(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
    vision: Sequence[list[VisualFeatures | None]] | None = None,
    as_sampled: bool = True,
) -> list[list[Tensor] | None]:
    """Compute d [L] float32 in nats of each of a question's G ordered completions; None without a contrast.

    batch_size: questions per forward. vision: features of ordered prompts and tool turns (`encode_groups`),
    of which those of contrasts that permute temporal patches are made. as_sampled: use the sampling log-probs
    as log π(o | V).
    """
    drops: list[list[Tensor] | None] = [None] * len(questions)
    places = [place for place, question in enumerate(questions) if question.shuffled is not None]
    with eval_mode(model):
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            score = partial(_scored, model, [ordered[place] for place in chosen], temperature)
            contrasts = [prompt for place in chosen if (prompt := questions[place].shuffled) is not None]
            permute = vision is not None and all(
                prompt.patches is not None and len(vision[n]) == 1
                for n, prompt in zip(chosen, contrasts, strict=True)
            )
            features = [_permuted(questions[n], vision[n][0]) for n in chosen] if vision and permute else None
            without = score(contrasts, features, contrast=True)
            if as_sampled:
                own = [[rollout.logprobs for rollout in ordered[place]] for place in chosen]
            else:
                known = None if vision is None else [part for n in chosen for part in vision[n]]
                own = score([questions[n].ordered for n in chosen], known)
            for place, before, after in zip(chosen, own, without, strict=True):
                drops[place] = [b - a for b, a in zip(before, after, strict=True)]
    return drops


def _scored(
    model: Any,
    rollouts: Sequence[Sequence[Rollout]],
    temperature: float,
    prompts: Sequence[Prompt],
    features: Sequence[VisualFeatures | None] | None,
    contrast: bool = False,
) -> list[list[Tensor]]:
    """Compute log π [L] float32 of each completion behind its prompt."""
    completions = [[rollout.token_ids for rollout in group] for group in rollouts]
    pieces = [[rollout.pieces(contrast) for rollout in group] for group in rollouts]
    found = group_logprobs(model, prompts, completions, temperature, vision_features=features, pieces=pieces)
    logprobs = iter(found.logprobs.float().cpu().split(found.lengths.tolist()))
    return [[next(logprobs) for _ in group] for group in rollouts]


def _permuted(question: Question, vision: VisualFeatures | None) -> VisionFeatures:
    """Permute the features of a question's ordered clip into those of its contrast clip."""
    assert isinstance(vision, VisionFeatures) and question.shuffled is not None
    patches = question.shuffled.patches
    assert patches is not None
    return vision.permuted(patches, question.ordered.features["video_grid_thw"].cpu())
