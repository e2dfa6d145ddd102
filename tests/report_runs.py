"""Made-up run folders for the report's tests: real JPEG strips, believable curves, hostile strings."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Correct, Group, Rewards, Rollout, Rollouts
from video_r1.evaluation.summary import summarise
from video_r1.settings.frames import CONTROLS
from video_r1.training.recording import save_strip

# Text from outside that must stay text.
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<!--<script>",
    "]]>&lt;b&gt;{{data}} {{script}}",
    "\u2028\u2029\u202e\ud800",
    "javascript:window.pwned=1",
    '"><svg onload=window.pwned=1>',
)

TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
COLOURS = {"red": (205, 70, 60), "green": (70, 150, 90), "blue": (60, 100, 190), "yellow": (225, 180, 60)}


def disc_clip(count: int, height: int, width: int, seed: int) -> Tensor:
    """A disc that crosses a shaded, noisy background: [T, 3, H, W] uint8."""
    random_ = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    ground = torch.tensor([random_.uniform(150, 215) for _ in range(3)]).view(3, 1, 1) * (0.75 + 0.25 * y)
    colour = torch.tensor(random_.choice(list(COLOURS.values())), dtype=torch.float32).view(3, 1, 1)
    angle, radius = random_.uniform(0, 2 * math.pi), random_.uniform(0.1, 0.16)
    frames = []
    for t in torch.linspace(-0.34, 0.34, count).tolist():
        centre_x, centre_y = 0.5 + t * math.cos(angle), 0.5 + t * math.sin(angle)
        edge = torch.sigmoid((radius - torch.hypot(x - centre_x, y - centre_y)) * 90)
        frame = ground * (1 - edge) + colour * edge + 5 * torch.randn(3, height, width, generator=generator)
        frames.append(frame.clamp(0, 255).to(torch.uint8))
    return torch.stack(frames)


def metrics_line(step: int, steps: int, random_: random.Random) -> dict[str, Any]:
    done = step / steps
    learned = 0.2 + 0.55 / (1 + math.exp(-9 * (done - 0.4)))

    def noisy(value: float, spread: float) -> float:
        return round(min(1, max(0, value + random_.gauss(0, spread))), 4)

    line: dict[str, Any] = {"step": step, "epoch": round(done, 3), "time": round(3.4 * step, 1)}
    line["reward/accuracy"] = noisy(learned, 0.07)
    for i, kind in enumerate((*TYPES, "video", "image")):
        line[f"reward/accuracy/{kind}"] = noisy(learned - 0.15 + 0.05 * i, 0.12)
    gap = 0.32 * max(0.0, done - 0.15) ** 0.7
    p_shuffled = noisy(learned - gap, 0.05)
    credits = {"accuracy": 0.5 + 0.3 * done, "format": 0.45 * (1 - done), "length": 0.1}
    signs = {"accuracy": 0.8, "format": 0.2, "length": 0.1}
    line |= {
        "reward/temporal": noisy(0.3 * gap * learned, 0.015),
        "reward/temporal/video": noisy(0.36 * gap * learned, 0.018),
        "reward/format": noisy(0.3 + 0.68 * min(1, 2.2 * done), 0.04),
        "reward/total": round(learned + gap, 4),
        "temporal/p": line["reward/accuracy"],
        "temporal/p_contrast": p_shuffled,
        "temporal/gap": round(line["reward/accuracy"] - p_shuffled, 4),
        "temporal/credit": noisy(0.01, 0.005),
        **{f"credit/{term}": noisy(share, 0.04) for term, share in credits.items()},
        **{f"credit_sign/{term}": round(random_.gauss(sign, 0.1), 4) for term, sign in signs.items()},
        "completion/length": round(48 + 14 * done + random_.gauss(0, 2), 2),
        "completion/length/video": round(52 + 12 * done + random_.gauss(0, 3), 2),
        "completion/length/image": round(38 + 4 * done + random_.gauss(0, 3), 2),
        "completion/truncated": noisy(0.1 * (1 - done), 0.02),
        "policy/kl": round(0.04 * done + abs(random_.gauss(0, 0.004)), 5),
        "policy/entropy": round(0.9 - 0.5 * done + random_.gauss(0, 0.03), 4),
        "loss": round(random_.gauss(0, 0.02), 5),
        "learning_rate": 1e-6 * 0.5 * (1 + math.cos(math.pi * done)),
        "groups/no_variance": noisy(0.5 - 0.25 * done, 0.08),
        "media/skipped": 1.0 if step % 97 == 0 else 0.0,
        "speed/tokens_per_second": round(1840 + random_.gauss(0, 90), 1),
        "seconds/rollout": round(1.9 + random_.gauss(0, 0.1), 3),
        "seconds/update": round(1.2 + random_.gauss(0, 0.07), 3),
    }
    return line


def completion(
    random_: random.Random, right: bool, formatted: bool, answer: str, wrong: str, long: bool = False
) -> dict[str, Any]:
    said = answer if right else wrong
    thought = (
        "At first I see the disc near the left edge, then at the centre, then close to the right border. "
    )
    if long:
        thought += "Wait, let me look again at the second moment: the disc has moved a little, not much. " * 9
    thought += f"So it moves to the {'right' if right else 'left'}, which is option {said}."
    text = (
        f"<think>{thought}</think>\n<answer>{said}</answer>"
        if formatted
        else f"{thought} The answer is {said}."
    )
    right = right and formatted
    rewards = {"accuracy": float(right), "format": float(formatted), "temporal": 0.15 * right, "length": 0.0}
    return {
        "text": text,
        "tokens": len(text) // 4,
        "finish_reason": "length" if not formatted and long else "stop",
        "rewards": rewards,
    }


def group_line(
    run: Path, step: int, number: int, random_: random.Random, skill: float, size: tuple[int, int, int]
) -> dict[str, Any]:
    image = number % 20 == 1
    frames = disc_clip(1 if image else size[0], size[1], size[2], seed=number)
    strip = save_strip(frames, run / "frames" / f"{step}-{number}.jpg")
    strip["timestamps"] = [round(0.5 * i, 2) for i in range(len(frames))]
    ordered = [
        completion(random_, random_.random() < skill, random_.random() < 0.5 + skill / 2, "B", "A", i == 3)
        for i in range(8)
    ]
    totals = torch.tensor([sum(c["rewards"].values()) for c in ordered])
    advantages = (totals - totals.mean()) / (totals.std() + 1e-4)
    for item, total, advantage in zip(ordered, totals.tolist(), advantages.tolist(), strict=True):
        item["total"], item["advantage"] = round(total, 4), round(advantage, 4)
    shuffled = [
        completion(random_, random_.random() < skill * 0.45, True, "B", random_.choice("ACD"))
        for _ in range(0 if image else 4)
    ]
    for item in shuffled:
        item["rewards"] = {name: item["rewards"][name] for name in ("accuracy", "format")}
    order = list(range(len(frames)))
    random_.shuffle(order)
    return {
        "step": step,
        "problem_id": number,
        "problem": "What colour is the disc?"
        if image
        else "In which direction does the disc move across the scene?",
        "problem_type": "multiple choice" if number % 3 else "free-form",
        "data_type": "image" if image else "video",
        "options": ["A. to the left", "B. to the right", "C. upwards", "D. downwards"],
        "answer": "B",
        "data_source": "lab/colour" if image else "lab/direction",
        "path": f"{'images' if image else 'videos'}/{number}.{'png' if image else 'mp4'}",
        "frames": strip,
        "permutation": None if image else order,
        "ordered": ordered,
        "shuffled": shuffled,
        "p": sum(c["rewards"]["accuracy"] for c in ordered) / 8,
        "p_shuffled": None if image else sum(c["rewards"]["accuracy"] for c in shuffled) / 4,
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def write_rl_run(
    run: Path, steps: int = 150, every: int = 5, size: tuple[int, int, int] = (8, 56, 56)
) -> None:
    random_ = random.Random(1)
    write_lines(run / "metrics.jsonl", [metrics_line(step, steps, random_) for step in range(1, steps + 1)])
    groups = [
        group_line(run, step, 2 * step + k, random_, 0.15 + 0.65 * step / steps, size)
        for step in range(every, steps + 1, every)
        for k in range(2)
    ]
    write_lines(run / "rollouts.jsonl", groups)
    reasons = {88: "the file ends in the middle of a frame", 301: "there is no video stream"}
    write_lines(
        run / "quarantine.jsonl",
        [{"path": f"videos/{i}.mp4", "problem_id": i, "reason": why} for i, why in reasons.items()],
    )
    write_lines(run / "left_out.jsonl", left_out_lines(steps))
    (run / "config.yaml").write_text(
        "model_name_or_path: models/lab-base\ntrain_manifest: data/rl.json\nnum_generations: 8\n"
        "learning_rate: 1.0e-06\ntemporal_rule: margin\ntemporal_contrast: null\nbeta: 0.04\nseed: 42\n"
        "length_range: [320, 512]\nhub_token: hf_very_private\n",
        "utf-8",
    )


def left_out_lines(steps: int) -> list[dict[str, Any]]:
    """Of every third step a question that another one replaced, after one in vain, and one that stayed."""
    lines = []
    for step in range(3, steps + 1, 3):
        for number, (reason, round_, by) in enumerate(
            [("replaced", 0, 3000 + step), ("tried", 1, 3000 + step), ("no variance", 0, None)]
        ):
            right = number % 2
            lines.append({
                "step": step, "problem_id": 1000 + 10 * step + number,
                "problem": "In which direction does the disc move across the scene?",
                "problem_type": "multiple choice", "data_type": "video", "data_source": "lab/direction",
                "accuracy": float(right), "p_shuffled": 0.25, "reward": 1.0 + right,
                "reason": reason, "round": round_, "replaced_by": by,
            })  # fmt: skip
    return lines


def prediction(number: int, order: str, right: bool, **more: Any) -> dict[str, Any]:
    return {
        "problem_id": number, "order": order, "output": f"<answer>{order} {number}</answer>", "answer": "B",
        "prediction": "B", "score": float(right), "strict_score": 0.0, "format": True, "tokens": 40,
        "finish_reason": "stop", "data_type": "video", "data_source": "lab", **more,
    }  # fmt: skip


def write_evaluation(folder: Path, ordered: float, shuffled: float, questions: int = 240) -> dict[str, Any]:
    """Predictions on videos and, every sixth, an image; returns the summary that is written beside them."""
    random_ = random.Random(folder.name)
    families = ("direction", "counting", "digits", "speed", "first")
    lines = []
    for order, rate in (("ordered", ordered), ("shuffled", shuffled)):
        for i in range(questions):
            image = i % 6 == 5
            if image and order == "shuffled":
                continue
            right = random_.random() < rate - 0.08 + 0.04 * (i % 5)
            family = families[i % 5]
            kinds = {"problem_type": TYPES[i % 5], "data_type": "image" if image else "video"}
            names = {"data_source": f"lab/{family}", "task_type": family}
            scores = {"strict_score": float(right), "format": random_.random() < ordered + 0.25}
            lines.append(prediction(i, order, right, frames=8, **scores, **kinds, **names))
    write_lines(folder / "predictions-8.jsonl", lines)
    summary = {"questions": questions, "settings": {"seed": 0}, "frames": {"8": summarise(lines)}}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return summary


def write_looks(folder: Path, ordered: float, elsewhere: float, shuffled: float | None = None) -> None:
    """120 questions about videos in order and with looks elsewhere in the clip; the summary beside them."""
    random_, rates = random.Random(folder.name), {"ordered": ordered, "elsewhere": elsewhere}
    rates |= {} if shuffled is None else {"shuffled": shuffled}
    lines = [
        prediction(i, order, random_.random() < rate, frames=8, problem_type="free-form")
        for order, rate in rates.items()
        for i in range(120)
    ]
    write_lines(folder / "predictions-8.jsonl", lines)
    summary = {"questions": 120, "settings": {"seed": 0}, "frames": {"8": summarise(lines)}}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def write_controls(folder: Path, rate: float, direct: float) -> None:
    """120 questions in order and with five controls, with reasoning and directly."""
    random_ = random.Random(folder.name)
    types, tasks = ("multiple choice", "numerical"), ("object_rel_direction_medium", "count")
    for begin, right, tokens in (("predictions", rate, 180), ("direct", direct, 6)):
        lines = []
        for order in CONTROLS:
            for i in range(120):
                is_right = random_.random() < right - 0.1 * CONTROLS.index(order)
                kinds = {"problem_type": types[i % 2], "task_type": tasks[i % 2]}
                lines.append(prediction(i, order, is_right, tokens=tokens + i % 3, **kinds))
        write_lines(folder / f"{begin}-16.jsonl", lines)


def write_demo(demo: Path) -> None:
    write_rl_run(demo / "rl")
    random_ = random.Random(2)
    write_lines(
        demo / "sft" / "metrics.jsonl",
        [
            {
                "step": step,
                "time": 0.3 * step,
                "loss": round(0.3 + 3 * math.exp(-step / 60) + random_.gauss(0, 0.05), 4),
                "grad_norm": round(1 + abs(random_.gauss(0, 0.4)), 3),
                "learning_rate": 1e-3 * (1 - step / 200),
            }
            for step in range(5, 201, 5)
        ],
    )
    for name, rates in {"base": (0.21, 0.2), "sft": (0.46, 0.34), "rl": (0.73, 0.37)}.items():
        write_evaluation(demo / f"eval-{name}", *rates)
    (demo / "summary.json").write_text(json.dumps({"seconds": {"total": 548.2, "lab": 31.0, "rl": 262.5}}))


def write_hostile_run(run: Path) -> None:
    """A run in which every text that can come from outside is an attack."""
    attack = " ".join(HOSTILE)
    write_rl_run(run, steps=12, every=4)
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        for field in ("problem", "problem_type", "data_type", "answer", "data_source", "path"):
            line[field] = HOSTILE[i % len(HOSTILE)]
        line["problem_id"] = attack + str(i)
        line["options"] = [attack, HOSTILE[i % len(HOSTILE)]]
        for completion in line["ordered"] + line["shuffled"]:
            completion["text"] = f"<think>{attack}</think><answer>{attack}</answer>{attack}"
            completion["rewards"][attack] = 1.0
    write_lines(run / "rollouts.jsonl", lines)
    metrics: list[dict[str, Any]] = [
        {"step": s} | {f"reward/{t}": s for t in HOSTILE} | {"__proto__": s, "a/b/" + attack: s}
        for s in range(1, 5)
    ]
    write_lines(run / "metrics.jsonl", metrics)
    write_lines(run / "quarantine.jsonl", [{"path": attack, attack: attack, "__proto__": attack}])
    told = dict.fromkeys(("problem_id", "problem", "problem_type", "data_source", "reason"), attack)
    odd = {"step": 1e300, "accuracy": "x", "reward": [], "round": {}, "replaced_by": [attack], attack: attack}
    write_lines(run / "left_out.jsonl", [told | odd, {"step": -1, "reason": ["replaced"]}, {}])
    (run / "config.yaml").write_text(json.dumps({attack: attack, "model": attack, "seed": attack}))
    write_evaluation(run / f"eval-{HOSTILE[1]}", 0.5, 0.5)
    predictions = run / f"eval-{HOSTILE[1]}" / "summary.json"
    predictions.write_text(
        predictions.read_text().replace("lab/direction", "<img src=x onerror=window.pwned=1>")
    )


def data_of(page: Path) -> dict[str, Any]:
    """The values that a report's page embeds."""
    return json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[0])


def plain_frames(*levels: int, size: tuple[int, int] = (28, 28)) -> torch.Tensor:
    """Frames of one grey level each: [T, 3, H, W]."""
    return torch.stack([torch.full((3, *size), level, dtype=torch.uint8) for level in levels])


def group_of(problem_id: str | int = 7, rewards: list[float] | None = None, video: bool = True) -> Group:
    rewards = rewards or [1.0, 0.0]
    permutation = torch.tensor([2, 0, 1])
    frames = plain_frames(10, 120, 240) if video else plain_frames(10)
    times = torch.arange(len(frames), dtype=torch.float64) / 2
    media = Media(frames, times, 1.5 if video else 0.0, "video" if video else "image")
    prompt = Prompt(torch.tensor([1]), {}, (media,), None, [])
    shuffled_media = media.reordered(permutation) if video else media
    shuffled_prompt = Prompt(torch.tensor([1]), {}, (shuffled_media,), permutation, [])

    def rollout(text: str, length: int) -> Rollout:
        return Rollout(torch.arange(length), torch.zeros(length), text, "stop")

    total = torch.tensor(rewards)
    right = Correct(total > 0.5, torch.zeros(int(video), dtype=torch.bool))
    sample = Sample(
        problem_id, "Which way?", "video" if video else "image", "multiple choice", "<answer>B</answer>",
        "/data/set/videos/7.mp4", ("A. left", "B. right"), data_source="lab/direction",
    )  # fmt: skip
    question = Question(sample, prompt, shuffled_prompt if video else None, 0)
    ordered = [rollout("<think>x</think><answer>B</answer>", 5), rollout("A", 3)]
    contrast_terms = {"accuracy": torch.tensor([0.0])} if video else {}
    return Group(
        Rollouts(question, ordered, [rollout("C", 2)] if video else []),
        Rewards({"accuracy": total}, total, {}, right, contrast_terms),
        torch.tensor([0.7, -0.7]),
    )
