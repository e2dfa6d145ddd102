"""Everything that touches rewards, advantages or the token loss, in pairs. Each pair's loss and its gradient
equal a plain float64 computation of docs/t-grpo.md (`expected_loss`), which shares no code with the package.

A new part joins PARTS, and a new setting of training joins a part or ELSEWHERE. Two questions with four
completions each: the first is about a clip with a contrast, the second has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Group, Rollout, Rollouts, ToolCall, ToolTurn
from video_r1.errors import ConfigError
from video_r1.models.group_forward import GroupLogprobs
from video_r1.rewards.scoring import reward_terms
from video_r1.settings.base import flat_types, is_group, own_field_types
from video_r1.settings.training import JudgeSettings, TGRPOSettings, TrainingSettings
from video_r1.training.advantages import TaskMoments
from video_r1.training.questions import Slot, with_shuffled_options
from video_r1.training.selection import Answered
from video_r1.training.step import MicroBatch, References, advantages, micro_batches, policy_loss, score


def own(completions: list[str], **columns: Any) -> list[float | None]:
    """Pays by length; not for texts without thoughts."""
    return [0.01 * len(text.split("<think>")[1]) if "<think>" in text else None for text in completions]


@dataclass(frozen=True)
class Part:
    """Settings of a part, and what it changes in the questions (`world`). one_of: parts that exclude it."""

    settings: dict[str, Any] = field(default_factory=dict)
    world: dict[str, Any] = field(default_factory=dict)
    one_of: str = ""  # parts of one kind are values of one setting: they cannot meet


PARTS = {
    "margin": Part({"temporal_rule": "margin"}, one_of="rule"),
    "threshold": Part({"temporal_rule": "threshold", "temporal_threshold_mu": 0.9}, one_of="rule"),
    "gate": Part({"temporal_rule": "likelihood_gate", "temporal_alpha": 0.8}, one_of="rule"),
    "rule off": Part({"temporal_rule": "off"}, one_of="rule"),
    "a size of 0": Part({"temporal_alpha": 0.0}, one_of="rule"),
    "weights": Part({"reward_weights": {"accuracy": 0.5, "format": 2.0}}),
    "a list": Part(world={"list": ["accuracy"]}),
    "own reward": Part(world={"own": True}),
    "judge": Part(world={"judge": "reward"}, settings={"judge_endpoint": "http://j"}, one_of="judge"),
    "judge as accuracy": Part(
        {"judge_endpoint": "http://j", "judge_use": "accuracy"}, {"judge": "accuracy"}, one_of="judge"
    ),
    "length": Part({"length_reward": 0.2, "length_range": [3, 4]}),
    "teacher": Part({"teacher_model_name_or_path": "t", "teacher_weight": 0.5}, {"teacher": True}),
    "cost of calls": Part({"look_cost": 0.05}, {"calls": True}),
    "dynamic sampling": Part({"dynamic_sampling": 1}),
    "option shuffling": Part({"shuffle_options": True}),
    "scale batch": Part({"scale_rewards": "batch"}, one_of="scale"),
    "scale task": Part({"scale_rewards": "task"}, one_of="scale"),
    "scale none": Part({"scale_rewards": "none"}, one_of="scale"),
    "sequence ratio": Part({"importance_sampling_level": "sequence"}),
    "masked truncations": Part({"mask_truncated_completions": True}),
    "entropy share": Part({"top_entropy_quantile": 0.5}),
    "entropy bonus": Part({"entropy_coef": 0.1}),
    "KL": Part({"beta": 0.04}),
    "second update": Part({"num_iterations": 2}, {"old": True}),
    "sampler's weights": Part(world={"sampler": True}),
    "bnpo": Part({"loss_type": "bnpo"}, one_of="loss"),
    "dapo": Part({"loss_type": "dapo"}, one_of="loss"),
    "dr_grpo": Part({"loss_type": "dr_grpo"}, one_of="loss"),
    "cispo": Part({"loss_type": "cispo", "epsilon_high": 1.5}, one_of="loss"),
    "sapo": Part({"loss_type": "sapo"}, one_of="loss"),
    "two-sided clip": Part({"delta": 1.5, "epsilon_high": 0.3}),
    "text row": Part(world={"other": {"data_type": "text", "path": ""}}, one_of="other"),
    "image": Part(world={"other": {"data_type": "image", "path": "/i.png"}}, one_of="other"),
    "several clips": Part(world={"first": {"more_paths": ("/w.mp4",)}}),
    "graded answers": Part(world={"graded": True}),
    "micro-batches": Part(world={"sizes": [1, 1]}),
}
ELSEWHERE = {
    "samples": "num_generations num_contrast_generations num_generations_eval max_completion_length "
    "temperature",
    "chooses the contrast clip": "temporal_contrast contrast_unit",
    "a bound of a part": "epsilon sapo_temperature_pos sapo_temperature_neg correct_threshold teacher_frames "
    "teacher_pixels reward_funcs",
    "logs or checks": "log_rollouts preflight_questions",
    "the judge's requests": " ".join(f"judge_{name}" for name in own_field_types(JudgeSettings)),
}
SENTENCES = {
    frozenset(["a list", "weights"]): "a weight of a reward that is not paid is refused",
    frozenset(["cispo", "two-sided clip"]): "cispo has one bound, epsilon_high, and keeps every gradient",
    frozenset(["a list", "own reward"]): "own reward is an entry of the list",
    frozenset(["a list", "judge"]): "a list without judge is refused while the endpoint is set",
    frozenset(
        ["option shuffling", "graded answers"]
    ): "options belong to multiple choice, graded answers do not",
}


def test_interactions_every_setting_is_a_part() -> None:
    types = flat_types(own_field_types(TGRPOSettings))
    mine = {name for name, hint in types.items() if not is_group(hint)} - own_field_types(
        TrainingSettings
    ).keys()
    parts = {name for part in PARTS.values() for name in part.settings}
    listed = parts | set(" ".join(ELSEWHERE.values()).split())
    assert mine - listed == set(), "join PARTS or ELSEWHERE"


# ---- The questions

ANSWERS, CONTRAST = ("right", "right", "wrong", "right"), ("right", "wrong")
OTHERS = (
    "wrong",
    "bare",
    "wrong",
    "wrong",
)  # of the question without a contrast: `bare` is right, unformatted
LENGTHS = ((3, 4, 2, 5), (2, 3, 3, 4))  # tokens
DROPS = ((0.2, 3.0, 1.0, 0.0), None)  # d of the first token, 0 of the others
JUDGED = ((0.9, 0.2, 0.4, 1.0), (0.1, 0.8, 0.0, 0.3))
CALLS = ((0, 1, 2, 0), (1, 0, 0, 0))
CUT = ((False, False, True, True), (False, True, False, False))
GRADED = {"right": "a red ball rolls away", "wrong": "a red hat sat there"}


def text(kind: str, letters: dict[str, str]) -> str:
    if kind == "bare":
        return f"<answer>{letters['right']}</answer>"
    return f"<think>{kind}</think><answer>{letters[kind]}</answer>"


class World:
    """Two scored groups and their tokens, by some parts."""

    def __init__(self, names: tuple[str, ...]) -> None:
        settings: dict[str, Any] = {
            "length_reward": 0.0, "beta": 0.0, "max_completion_length": 8, "num_generations": 4,
            "temporal_rule": "off",
        }  # fmt: skip
        self.about: dict[str, Any] = {}
        for name in names:
            settings |= PARTS[name].settings
            self.about |= PARTS[name].world
        if "a size of 0" in names and "temporal_rule" not in {k for n in names for k in PARTS[n].settings}:
            settings["temporal_rule"] = "margin"
        self.settings = TGRPOSettings(**settings)
        drawn = torch.Generator().manual_seed(sum(map(len, names)))
        self.tokens = [[self.draw(length, drawn) for length in lengths] for lengths in LENGTHS]

    @staticmethod
    def draw(length: int, drawn: torch.Generator) -> dict[str, Tensor]:
        def noise(size: float) -> Tensor:
            return size * torch.randn(length, generator=drawn, dtype=torch.float64)

        policy = -1.0 + noise(0.2)
        return {
            "policy": policy, "old": policy + noise(0.4), "ref": policy + noise(0.3),
            "teacher": 5.0 * noise(0.3), "sampler": noise(0.3).exp(), "entropy": noise(1.0).abs(),
        }  # fmt: skip

    def groups(self) -> list[Group]:
        about, settings = self.about, self.settings
        graded = about.get("graded")
        samples = []
        for number, changes in enumerate((about.get("first", {}), about.get("other", {}))):
            kind = "free-form" if graded else "multiple choice"
            solution = GRADED["right"] if graded else "B"
            options = () if graded else ("A. ant", "B. bee", "C. cat")
            given = {"data_type": "video", "path": "/v.mp4", **changes}
            sample = Sample(number, "what?", problem_type=kind, solution=f"<answer>{solution}</answer>",
                            options=options, **given)  # fmt: skip
            if settings.shuffle_options:
                sample = with_shuffled_options(sample, torch.Generator().manual_seed(number))
                assert sample.options[0] != "A. ant"  # else nothing is tested
            samples.append(sample)
        rewards: Any = about.get("list")
        if about.get("own"):
            names = ["accuracy", "format", *(["length"] if settings.length_reward else [])]
            names += ["temporal"] if settings.paid_rule != "off" else []
            rewards = [*names, *(["judge"] if about.get("judge") == "reward" else []), own]
        terms = reward_terms(rewards, settings)
        answered, contrast = [], []
        for number, sample in enumerate(samples):
            texts = {option[3:]: option[0] for option in sample.options}
            letters = dict(GRADED) if graded else {"right": texts["bee"], "wrong": texts["cat"]}
            made = []
            for place, kind in enumerate((ANSWERS, OTHERS)[number]):
                calls = (ToolCall("look", {}, ()),) * (CALLS[number][place] if about.get("calls") else 0)
                turns = (ToolTurn(1, "", calls, cast(Any, None)),) if calls else ()
                length = LENGTHS[number][place]
                reason = "length" if CUT[number][place] else "stop"
                made.append(Rollout(torch.zeros(length, dtype=torch.long), torch.zeros(length),
                                    text(kind, letters), reason, turns))  # fmt: skip
            sampled = number == 0 and settings.contrast_generations
            contrast.append(
                [Rollout(torch.zeros(1), torch.zeros(1), text(kind, letters), "stop") for kind in CONTRAST]
                if sampled
                else []
            )
            scored, first = settings.paid_rule == "likelihood_gate", DROPS[number]
            drops = (
                [
                    torch.cat([torch.tensor([d]), torch.zeros(n - 1)])
                    for d, n in zip(first, LENGTHS[0], strict=True)
                ]
                if scored and first
                else None
            )
            question = Question(sample, cast(Any, None), cast(Any, None), 0,
                                teacher=cast(Any, "t") if about.get("teacher") else None)  # fmt: skip
            answered.append(Rollouts(question, made, contrast[number], drops))

        def judge(asked: Any) -> list[Tensor]:
            both = settings.judge.use == "accuracy"
            judged = [[*JUDGED[n], 0.9, 0.2][: 4 + both * len(contrast[n])] for n in range(2)]
            return [torch.tensor(scores) for scores in judged] if asked else []

        moments = TaskMoments() if settings.scale_rewards == "task" else None
        rewards = score(
            answered, terms, settings, lambda sample: "what?", judge if about.get("judge") else None
        )
        return advantages(answered, rewards, settings, moments)


def package_loss(world: World) -> tuple[float, Tensor, list[bool]]:
    """The loss, its gradient by each token's log-prob, and which groups dynamic sampling would replace."""
    settings, about = world.settings, world.about
    groups = world.groups()
    step = micro_batches(groups, about.get("sizes", [2]), settings)
    everything = torch.cat([t["policy"] for question in world.tokens for t in question]).requires_grad_()
    parts = iter(everything.split([len(t["policy"]) for question in world.tokens for t in question]))
    policy = {id(group): [next(parts) for _ in group.ordered] for group in groups}
    tokens = {id(group): own for group, own in zip(groups, world.tokens, strict=True)}

    def of(batch: MicroBatch, name: str) -> Tensor:
        return torch.cat([each[name] for group in batch.trained for each in tokens[id(group)]])

    loss = torch.zeros((), dtype=torch.float64)
    for batch in step.batches:
        values = torch.cat([part for group in batch.trained for part in policy[id(group)]])
        lengths = torch.tensor([len(part) for group in batch.trained for part in policy[id(group)]])
        references = References(
            of(batch, "old") if about.get("old") else values.detach(),
            of(batch, "ref") if settings.beta else None,
            of(batch, "sampler") if about.get("sampler") else None,
            settings.teacher.weight * of(batch, "teacher") if about.get("teacher") else None,
        )
        logprobs = GroupLogprobs(values, lengths, of(batch, "entropy"))
        loss = loss + policy_loss(logprobs, batch, references, step, settings).loss
    if loss.requires_grad:
        loss.backward()
    gradient = torch.zeros_like(everything) if everything.grad is None else everything.grad
    flat = [Answered(Slot(0, 0), group.rollouts, group.rewards).teaches_nothing for group in groups]
    return float(loss.detach()), gradient, flat


# ---- The same by hand


def expected_loss(world: World) -> tuple[float, Tensor, list[bool]]:
    s, about = world.settings, world.about
    base, total, deviations, flat = [], [], [], []
    for q in range(2):
        rows, without, gated, gates = [], [], [], []
        kinds = (ANSWERS, OTHERS)[q]
        graded = {"right": 1.0, "bare": 1.0, "wrong": fmean([2 / 5, 1 / 4, 2 / 5])}
        accuracy = [graded[k] if about.get("graded") else float(k != "wrong") for k in kinds]
        tilde = [graded[k] if about.get("graded") else float(k != "wrong") for k in CONTRAST]
        if about.get("judge") == "accuracy":
            accuracy, tilde = list(JUDGED[q]), [0.9, 0.2]
        exact = not about.get("graded")
        right = [a == 1.0 if exact else a > 0.5 + 1e-6 for a in accuracy]
        p, p_tilde = fmean(right), fmean([a == 1.0 if exact else a > 0.5 + 1e-6 for a in tilde])
        rule = s.temporal_rule if s.alpha > 0 and not about.get("list") else "off"
        for i in range(4):
            w = cast(dict[str, float], s.reward_weights)
            pays = w.get("accuracy", 1.0) * accuracy[i]
            rest = 0.0
            if not about.get("list"):
                rest += w.get("format", 1.0) * (kinds[i] != "bare")
                if about.get("own"):
                    letters = dict(GRADED) if about.get("graded") else {"right": "B", "wrong": "C"}
                    said = text(kinds[i], letters).removeprefix("<think>")
                    rest += 0.0 if kinds[i] == "bare" else 0.01 * len(said)
                if s.length_reward and right[i] and 3 <= LENGTHS[q][i] <= 4:
                    pays += 0.2
                if about.get("judge") == "reward":
                    pays += JUDGED[q][i]
            if s.look_cost:
                rest -= s.look_cost * CALLS[q][i]
            bonus, gate = 0.0, 1.0
            if q == 0 and right[i]:
                bonus = {
                    "margin": s.alpha * max(0.0, p - p_tilde),
                    "threshold": s.alpha * (p >= 0.9 * p_tilde),
                }.get(rule, 0.0)
            if q == 0 and rule == "likelihood_gate":
                n = LENGTHS[0][i]
                contrast = DROPS[0][i] / min(8, math.ceil(n / 2))  # the other end is 0
                gate = 1 - s.alpha * (math.exp(-contrast) if right[i] else 1.0)
            rows.append(rest + pays * gate + bonus)
            without.append(rest + pays)
            gated.append(pays)
            gates.append(gate)
        common = sum(g * b * b for g, b in zip(gates, gated, strict=True)) / max(
            1e-12, sum(b * b for b in gated)
        )
        deviations.append(stdev((g - common) * b for g, b in zip(gates, gated, strict=True)))
        total.append(rows)
        base.append(without)
        flat.append(max(without) - min(without) < 1e-7 and not about.get("teacher"))
    every = [r for rows in total for r in rows]
    advantages = []
    for q in range(2):
        centred = [r - fmean(total[q]) for r in total[q]]
        group = stdev(total[q])
        rule = s.temporal_rule if s.alpha > 0 and not about.get("list") else "off"
        if rule == "likelihood_gate" and group > 1e-9:
            group += 0.1 * min(1.0, deviations[q] / group)
        if s.scale_rewards == "none":
            scale = 1.0
        elif s.scale_rewards == "batch":
            scale = stdev(every) + 1e-4
        elif s.scale_rewards == "task":  # one task: the step's own moments
            scale = max(1e-3, math.sqrt(max(0.0, fmean([r * r for r in every]) - fmean(every) ** 2))) + 1e-4
            if max(abs(c) / scale for c in centred) > 5:
                scale = group + 1e-4
        else:
            scale = group + 1e-4
        advantages.append([c / scale for c in centred])

    flat_total = [max(rows) - min(rows) < 1e-7 for rows in total]
    own_terms = s.beta or s.entropy_coef or about.get("teacher")
    count_flat = own_terms or s.loss_type == "bnpo" or s.top_entropy_quantile < 1
    sizes = about.get("sizes", [2])
    batches, start = [], 0
    for size in sizes:
        members = list(range(start, start + size))
        batches.append([q for q in members if count_flat or not flat_total[q]] or members[:1])
        start += size
    counts = [(q, i) for q in range(2) for i in range(4) if not (s.mask_truncated_completions and CUT[q][i])]
    step_tokens = sum(LENGTHS[q][i] for q, i in counts)
    budget = 8 * 8
    loss = torch.zeros((), dtype=torch.float64)
    leaves = [[t["policy"].clone().requires_grad_() for t in question] for question in world.tokens]
    for batch in batches:
        inside = [(q, i) for q in batch for i in range(4) if (q, i) in counts]
        entropies = torch.cat([world.tokens[q][i]["entropy"] for q, i in inside])
        bound = torch.quantile(entropies, 1 - s.top_entropy_quantile)
        batch_tokens = sum(LENGTHS[q][i] for q, i in inside)
        for q, i in inside:
            t, pi = world.tokens[q][i], leaves[q][i]
            old = t["old"] if about.get("old") else pi.detach()
            log_ratio = pi - old
            if s.importance_sampling_level == "sequence":
                mean = log_ratio.mean()
                log_ratio = mean.detach() + pi - pi.detach() if about.get("teacher") else mean.expand_as(pi)
            ratio = log_ratio.exp()
            a = advantages[q][i] + (0.5 * t["teacher"] if about.get("teacher") else torch.zeros_like(pi))
            high = s.epsilon_high or s.epsilon
            if s.loss_type == "cispo":
                gain = ratio.clamp(max=high).detach() * a * pi
            elif s.loss_type == "sapo":
                tau = torch.where(a > 0, 1.0, 1.05).double()
                gain = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * a
            else:
                first = ratio if s.delta is None else ratio.clamp(max=s.delta)
                gain = torch.minimum(first * a, ratio.clamp(1 - s.epsilon, 1 + high) * a)
            if about.get("sampler"):
                gain = gain * t["sampler"]
            if s.top_entropy_quantile < 1:
                gain = gain * (t["entropy"] >= bound)
            token_loss = -gain
            if s.beta:
                d = t["ref"] - pi
                token_loss = token_loss + s.beta * (d.exp() - d - 1)
            divisor = {
                "grpo": len(pi) * 8, "sapo": len(pi) * 8, "dapo": step_tokens, "cispo": step_tokens,
                "dr_grpo": budget, "bnpo": batch_tokens * 8 / (4 * len(batch)),
            }[s.loss_type]  # fmt: skip
            loss = loss + token_loss.sum() / divisor
            if s.entropy_coef:
                kept = t["entropy"] >= bound if s.top_entropy_quantile < 1 else torch.ones_like(pi)
                loss = loss - s.entropy_coef * (t["entropy"] * kept).sum() / (
                    step_tokens * s.top_entropy_quantile
                )
    loss.backward()
    gradient = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for row in leaves for x in row])
    return float(loss.detach()), gradient, flat


PAIRS = [*((name,) for name in PARTS), *combinations(PARTS, 2)]


@pytest.mark.parametrize("part", PARTS)
def test_interactions_of_a_part_with_every_other(part: str) -> None:
    met = 0
    for other in PARTS:
        kinds = {PARTS[part].one_of, PARTS[other].one_of}
        if (other != part and len(kinds) == 1 and kinds != {""}) or frozenset([part, other]) in SENTENCES:
            continue
        world = World((part,) if part == other else (part, other))
        loss, gradient, flat = package_loss(world)
        by_hand = expected_loss(world)
        assert loss == pytest.approx(by_hand[0], abs=2e-6), (part, other)
        torch.testing.assert_close(gradient, by_hand[1], rtol=1e-5, atol=2e-6, msg=f"{part}, {other}")
        assert flat == by_hand[2], (part, other)
        met += 1
    assert met > len(PARTS) // 2


@pytest.mark.parametrize(
    ("rewards", "settings", "said"),
    [
        (["accuracy"], {"judge_endpoint": "http://j"}, "does not name 'judge'"),
        (["accuracy"], {"reward_weights": {"format": 2.0}}, "none of the rewards"),
        (["accuracy"], {"loss_type": "cispo", "epsilon_high": 1.5, "delta": 1.5}, "delta is 1.5"),
    ],
)
def test_interactions_that_are_refused(rewards: Any, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reward_terms(rewards, TGRPOSettings(length_reward=0.0, **settings))
