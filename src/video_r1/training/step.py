"""The optimizer step of T-GRPO (arXiv 2503.21776), in the paper's order: functions of frozen records.

    rollouts = sample(engine, questions, settings)            # o_i with the clip in order, õ_j without
    rollouts = compare(policy, rollouts, settings)            # d_it, for rules that score the contrast
    rewards  = score(rollouts, terms, settings, question_text)    # R_i
    groups   = advantages(rollouts, rewards, settings)        # A_i
    step     = micro_batches(groups, sizes, settings)         # and the loss's normaliser
    result   = policy_loss(logprobs, batch, references, step, settings)    # of one micro-batch

A plain loop over these lines trains (examples/plain_loop.py). TGRPOTrainer (tgrpo.py) calls them from hooks
of `transformers.Trainer`.

Each of Q questions has G completions with its frames in order, and H of its contrast clip. A micro-batch has
R responses with N tokens in all, packed one after another. Every rank calls each function with its own
questions.

Deviations from the paper and its code:
 1. The default temporal reward is the paper's first formula, α·(p − p̃) (`margin`); its v4 has α wherever
    p ≥ μ·p̃ (`threshold`). Both cancel in groups whose rewards have two values (docs/t-grpo.md). The rule
    `likelihood_gate` is not the paper's: it multiplies what is paid for right answers by 1 − α·exp(−Δ).
 2. p and p̃ belong to one question. The reference code computes them over the batch (one prompt a device).
 3. Both kinds of completions are sampled alike, without top-p: the sampled distribution is scored.
 4. The shuffled order is never the identity, and the sampling rate of the frames reaches the model.
 5. The loss is normalised over the optimizer step: a question counts the same in any micro-batch and rank.
 6. The update skips groups of equal rewards, unless another term of the loss needs them (`trains_all`).
 7. Another question replaces one whose media cannot be used; a question is never shown other media.
 8. With vLLM, a token's policy loss is weighted by π_old ÷ π_vLLM (capped), which differ by rounding, and
    with async_rollouts by one update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Group, Rewards, Rollout, Rollouts
from video_r1.files import warn_once
from video_r1.models.group_forward import (
    GroupLogprobs,
    Pieces,
    group_logprobs,
    in_one_row,
    vision_language_model,
)
from video_r1.processes import gather, gather_lists, process_count
from video_r1.rewards.judge import JudgeScores
from video_r1.rewards.scoring import RewardTerms, score_terms
from video_r1.rewards.temporal import GATED, gate_deviation, rule_of, total_reward
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.training import TGRPOSettings
from video_r1.training.advantages import TaskMoments, group_advantages
from video_r1.training.logprob_contrast import token_contrasts, with_vision
from video_r1.training.objective import (
    ClipRange,
    SurrogateLoss,
    entropy_sum,
    high_entropy,
    loss_normaliser,
    surrogate_loss,
    trains_all,
)

# ---- Rollouts


def sample(engine: RolloutEngine, questions: Sequence[Question], settings: TGRPOSettings) -> list[Rollouts]:
    """Sample G completions o_i ~ π(· | V, q) and H completions õ_j ~ π(· | Ṽ, q) of each question.

    One call of the engine samples both, in the same way. H is 0 for a question without a contrast clip Ṽ, and
    for rules that sample none. A question's seed fixes its completions.
    """
    count = settings.contrast_generations
    contrasts = [q for q in questions if q.contrast is not None] if count else []
    sampling = SamplingSettings(
        temperature=settings.temperature,
        max_tokens=settings.max_completion_length,
        seed=(*(q.seed for q in questions), *(q.seed + 1 for q in contrasts)),
    )
    prompts = [q.ordered for q in questions] + [q.contrast for q in contrasts if q.contrast is not None]
    counts = [settings.num_generations] * len(questions) + [count] * len(contrasts)
    completions = iter(engine.sample(prompts, sampling, counts))
    ordered = [next(completions) for _ in questions]
    others = [next(completions) if count and q.contrast is not None else [] for q in questions]
    return [Rollouts(*own) for own in zip(questions, ordered, others, strict=True)]


def compare(
    policy: Any,
    rollouts: Sequence[Rollouts],
    settings: TGRPOSettings,
    batch_size: int = 1,
    as_sampled: bool = False,
    frozen_vision: bool = False,
) -> list[Rollouts]:
    """Add d_it = log π(o_it | V) − log π(o_it | Ṽ) [L] where the temporal rule scores the contrast clip.

    batch_size: questions per forward. as_sampled: the sampling log-probs equal log π(o | V), since engine and
    trainer compute them alike. frozen_vision: keep the features of V, which the updates use again.
    """
    if rule_of(settings).contrast != "scored":
        return list(rollouts)
    reuses = settings.contrast_unit == "patch" or not as_sampled
    if frozen_vision and reuses and in_one_row(vision_language_model(policy)):
        rollouts = with_vision(policy, rollouts, batch_size)
    contrasts = token_contrasts(policy, rollouts, settings.temperature, batch_size, as_sampled)
    return [replace(one, token_contrasts=own) for one, own in zip(rollouts, contrasts, strict=True)]


# ---- Rewards and advantages


def score(
    rollouts: Sequence[Rollouts],
    terms: RewardTerms,
    settings: TGRPOSettings,
    question_text: Callable[[Sample], str],
    judge: JudgeScores | None = None,
) -> list[Rewards]:
    """Return the rewards R_i = Σ_k w_k·r_ik, [G] of each question.

    A temporal rule adds a term r_it to right answers, or multiplies what is paid for them by a gate g_i
    (rewards/temporal.py). The other arguments and errors are those of `score_terms`.
    """
    rule, is_paid, rewards = rule_of(settings), "temporal" in terms.built_in, []
    scores = score_terms(rollouts, terms, settings, question_text, judge)
    for one, (own, contrast_terms, correct) in zip(rollouts, scores, strict=True):
        gate, deviation = None, 0.0
        if is_paid and rule.bonus is not None:
            own = {**own, "temporal": rule.bonus(one, correct, settings)}
        elif is_paid and rule.gate is not None:
            gate = rule.gate(one, correct, settings)
            paid = total_reward({k: own[k] for k in GATED if k in own}, terms.weights)
            own, deviation = {**own, "temporal": (gate - 1.0) * paid}, gate_deviation(gate, paid)
        totals = [total_reward(own, terms.weights, gate, without).expand(len(correct.ordered))
                  for without in (None, *own)]  # fmt: skip
        without = dict(zip(own, totals[1:], strict=True))
        rewards.append(Rewards(own, totals[0], without, correct, contrast_terms, deviation))
    return rewards


def advantages(
    rollouts: Sequence[Rollouts],
    rewards: Sequence[Rewards],
    settings: TGRPOSettings,
    moments: TaskMoments | None = None,
) -> list[Group]:
    """Return groups with A_i = (R_i − mean(R)) ÷ (std(R) + c + 1e-4), mean and std over the question's G.

    c is the rule's minimum, as far as a gate makes the deviation (rewards/temporal.py). `scale_rewards`
    chooses another std; moments: for `task`. Advantages of the rewards without each term are for the ledger.
    """
    mine = [(r.total, r.without, one.sample.problem_type, r.gate_deviation)
            for one, r in zip(rollouts, rewards, strict=True)]  # fmt: skip
    everyone, places = gather_lists(mine)
    totals, parts, types, gated = zip(*everyone, strict=True)
    total = torch.stack(totals)  # [Q, G], of all ranks
    std = None if moments is None else moments.deviations(total, types)  # of the rewards with all terms
    own = total.std(dim=1) if total.shape[1] > 1 else torch.zeros(len(total))
    share = (torch.tensor(gated) / own.clamp(min=1e-12)).clamp(max=1.0)  # of the deviation, by the gate alone
    minimum = rule_of(settings).floor * share[:, None]
    scale = settings.scale_rewards
    values = group_advantages(total, scale, minimum, std)
    without = {
        name: group_advantages(
            torch.stack([part.get(name, whole) for part, whole in zip(parts, totals, strict=True)]),
            scale, None if name == "temporal" else minimum, std,
        )
        for name in dict.fromkeys(chain(*parts))
    }  # fmt: skip
    return [
        Group(one, own, values[place], {name: others[place] for name, others in without.items()})
        for place, one, own in zip(range(len(everyone))[places], rollouts, rewards, strict=True)
    ]


# ---- The update


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups of one forward and backward pass. The model sees only those that are trained."""

    number: int  # in its step
    groups: Sequence[Group]
    trained: Sequence[Group]

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.trained]

    @property
    def rollouts(self) -> list[Rollout]:
        """[R]"""
        return [rollout for group in self.trained for rollout in group.ordered]

    @property
    def completions(self) -> list[list[Tensor]]:
        return [[rollout.token_ids for rollout in group.ordered] for group in self.trained]

    @property
    def pieces(self) -> list[list[Pieces]]:
        """Completions with what tools returned."""
        return [[rollout.pieces() for rollout in group.ordered] for group in self.trained]

    @property
    def advantages(self) -> Tensor:
        """[R]"""
        return torch.cat([group.advantages for group in self.trained])

    @property
    def problem_ids(self) -> list[str | int]:
        return [group.sample.problem_id for group in self.trained]

    @property
    def finished(self) -> Tensor:
        """[R] bool: False for responses that were cut at the longest length."""
        return torch.tensor([rollout.finish_reason != "length" for rollout in self.rollouts])


@dataclass(frozen=True, slots=True)
class Step:
    """Micro-batches of one optimizer step, for all updates on their rollouts, and the divisors of the loss
    and of the sum of entropies: of all ranks ÷ their number, since gradients are averaged over ranks.
    """

    batches: Sequence[MicroBatch] = ()
    normaliser: float = 1.0
    entropy_tokens: float = 1.0


@dataclass(frozen=True, slots=True)
class References:
    """Values that all updates on a micro-batch share, each [N]: log-probs before the first update, of the
    reference model and of the teacher, the teacher's share of the advantages, and the weights π_old ÷ π_vLLM.
    """

    old_logprobs: Tensor
    ref_logprobs: Tensor | None = None
    sampler_weights: Tensor | None = None
    teacher_credits: Tensor | None = None
    teacher_logprobs: Tensor | None = None


def micro_batches(groups: Sequence[Group], sizes: Sequence[int], settings: TGRPOSettings) -> Step:
    """Split a rank's groups into micro-batches of these sizes; normalise over the whole step.

    At least one group of each is trained on, so that every rank has a loss.
    """
    rest, batches, all_count = list(groups), [], trains_all(settings)
    for number, size in enumerate(sizes):
        part, rest = rest[:size], rest[size:]
        trained = [group for group in part if all_count or bool(group.advantages.any())] or part[:1]
        batches.append(MicroBatch(number, part, trained))
    rollouts = [rollout for group in groups for rollout in group.ordered]
    masked = settings.mask_truncated_completions
    counted = [rollout for rollout in rollouts if not (masked and rollout.finish_reason == "length")]
    counts = gather((len(rollouts), sum(len(rollout.token_ids) for rollout in counted)))
    responses, tokens = (sum(column) for column in zip(*counts, strict=True))
    if masked and tokens == 0:
        warn_once(
            "mask_truncated_completions: all completions of a step were cut off at max_completion_length "
            f"({settings.max_completion_length} tokens), so it learns nothing; raise it if this is frequent"
        )
    normaliser = loss_normaliser(settings.loss_type, responses, tokens, settings.max_completion_length)
    entropy_tokens = max(1.0, tokens * settings.top_entropy_quantile)
    return Step(batches, normaliser / process_count(), entropy_tokens / process_count())


def logprobs_of(
    policy: Any,
    batch: MicroBatch,
    settings: TGRPOSettings,
    vision: Sequence[Any] | None = None,
    with_entropy: bool = True,
) -> GroupLogprobs:
    """Compute log π(o_it | V, q), [N], at the sampling temperature, and entropies [N]. Each question is one
    row: its clip and prompt once, then its G completions. vision: of a frozen tower (`encode_groups`).
    """
    return group_logprobs(
        policy,
        batch.prompts,
        batch.completions,
        temperature=settings.temperature,
        with_entropy=with_entropy,
        vision_features=None if vision is None else list(chain(*vision)),
        entropy_gradient=with_entropy and settings.entropy_coef != 0,
        pieces=batch.pieces,
    )


def policy_loss(
    policy: GroupLogprobs, batch: MicroBatch, references: References, step: Step, settings: TGRPOSettings
) -> SurrogateLoss:
    """Compute a micro-batch's part of the step's loss, a scalar with gradient:

        L = −Σ_i Σ_t w_it·min(ρ_it A_it, clip(ρ_it, 1 − ε, 1 + ε_high) A_it) − β·KL_it   ÷ normaliser
        ρ_it = π(o_it) ÷ π_old(o_it),   A_it = A_i + the teacher's share

    Sums over a response are means over its tokens where `loss_type` says so (objective.py). w_it is the
    engine's importance weight, and 0 for tokens below the share `top_entropy_quantile` of highest entropy.
    `entropy_coef` adds −coefficient · mean entropy. policy: of `logprobs_of`.
    """
    counted = batch.finished if settings.mask_truncated_completions else None
    kept, weights = kept_tokens(policy, counted, settings), references.sampler_weights
    if kept is not None:
        weights = kept.float() if weights is None else kept * weights.to(kept.device)
    soft = settings.sapo.temperature_pos, settings.sapo.temperature_neg
    result = surrogate_loss(
        policy.logprobs,
        references.old_logprobs,
        batch.advantages.to(policy.logprobs.device),
        policy.lengths,
        normaliser=step.normaliser,
        loss_type=settings.loss_type,
        clip=ClipRange(settings.epsilon, settings.epsilon_high or settings.epsilon, settings.delta, soft),
        importance_sampling_level=settings.importance_sampling_level,
        beta=settings.beta,
        ref_logprobs=references.ref_logprobs,
        token_weights=weights,
        counted=counted,
        token_credits=references.teacher_credits,
    )
    if settings.entropy_coef and policy.entropy is not None:
        entropies = entropy_sum(policy.entropy, policy.lengths, counted, kept)
        result = replace(result, loss=result.loss - settings.entropy_coef * entropies / step.entropy_tokens)
    return result


def kept_tokens(policy: GroupLogprobs, counted: Tensor | None, settings: TGRPOSettings) -> Tensor | None:
    """Return [N] bool: the share `top_entropy_quantile` of highest entropy among the tokens that count in
    this micro-batch of all ranks; None: all. counted: [R] bool.
    """
    if settings.top_entropy_quantile == 1.0:
        return None
    assert policy.entropy is not None
    entropy, counted = (
        policy.entropy.detach(),
        torch.ones(len(policy.lengths)) if counted is None else counted,
    )
    among = entropy.cpu()[torch.repeat_interleave(counted.bool(), policy.lengths.cpu())]
    everywhere = torch.cat(gather(among))
    return high_entropy(entropy, everywhere.to(entropy), settings.top_entropy_quantile)
