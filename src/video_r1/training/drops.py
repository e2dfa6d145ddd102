"""What a contrast clip takes from a response that is there already: its log-probabilities behind both clips.

    Δ_i = mean over tokens t of [ log π(o_it | V) − log π(o_it | Ṽ) ],   V the clip in order, Ṽ its contrast

log π(o_it | V) has been sampled with. log π(o_it | Ṽ) takes one forward of the group in one row, without
gradient; nothing is sampled from the contrast clip (TaRO, arXiv 2606.09248).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.transformers import eval_mode


@torch.no_grad()
def logprob_drops(
    model: Any,
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    temperature: float,
    batch_size: int,
) -> list[Tensor | None]:
    """Δ [G] float32 in nats of each question's ordered completions; None where it has no contrast clip.

    model: whole, within the trainer's autocast. temperature: that was sampled with. batch_size: questions of
    one forward.
    """
    drops: list[Tensor | None] = [None] * len(questions)
    places = [place for place, question in enumerate(questions) if question.shuffled is not None]
    with eval_mode(model):
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            prompts = [prompt for place in chosen if (prompt := questions[place].shuffled) is not None]
            completions = [[rollout.token_ids for rollout in ordered[place]] for place in chosen]
            scored = group_logprobs(model, prompts, completions, temperature=temperature)
            behind = iter(scored.logprobs.float().cpu().split(scored.lengths.tolist()))
            for place in chosen:
                drops[place] = torch.stack(
                    [(rollout.logprobs - next(behind)).mean() for rollout in ordered[place]]
                )
    return drops
