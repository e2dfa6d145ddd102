"""Records of sampled groups with their frames, for the report and the studio."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Group, Rewards, Rollout
from video_r1.files import append_line, draft_of

JPEG_SIDE_LIMIT = 65_500  # the format stores a side in 16 bits
RECORDED = (
    "problem_id", "problem", "problem_type", "data_type", "options", "answer", "data_source", "play"
)  # fmt: skip
PROBLEM = 300  # characters kept of the question of a skipped group
FRAME_SIDE, IMAGE_SIDE = 224, 672  # longest side of a saved frame of a clip, and of an image


def save_strip(frames: Sequence[Tensor] | Tensor, path: Path, max_side: int | None = None) -> dict[str, Any]:
    """Write frames [3, H, W] uint8 side by side, first to last, as one JPEG. Raises OSError.

    A tile has the largest H and W, its longer side at most `max_side` pixels (224; of one image: 672); other
    frames fit into it, on black. Returns the `frames` object of rollouts.jsonl: `strip` (folder and file
    name, relative to the run), `count`, `width` and `height` (of one tile, pixels).
    """
    max_side = max_side or (IMAGE_SIDE if len(frames) == 1 else FRAME_SIDE)
    height, width = (max(frame.shape[side] for frame in frames) for side in (1, 2))
    scale = min(1.0, max_side / max(height, width), JPEG_SIDE_LIMIT / (len(frames) * width))
    tile = (max(1, int(width * scale)), max(1, int(height * scale)))
    strip = Image.new("RGB", (len(frames) * tile[0], tile[1]))
    for place, frame in enumerate(frames):
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy())
        if tuple(frame.shape[1:]) != (height, width):
            image = ImageOps.pad(image, tile, Image.Resampling.LANCZOS)
        elif image.size != tile:
            image = image.resize(tile, Image.Resampling.LANCZOS)
        strip.paste(image, (place * tile[0], 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without chroma subsampling a tile's colours do not bleed into its neighbour.
    with draft_of(path) as draft:
        strip.save(draft, "JPEG", quality=82, subsampling=0, optimize=True)
    facts = {"strip": f"{path.parent.name}/{path.name}", "count": len(frames)}
    return {**facts, "width": tile[0], "height": tile[1]}


def save_shown(shown: Sequence[Media], path: Path) -> dict[str, Any]:
    """`save_strip` of the frames of all clips or images. Several add `clips`, each one's frames."""
    counts = [len(media.frames) for media in shown]
    side = IMAGE_SIDE if max(counts) == 1 else FRAME_SIDE
    facts = save_strip([frame for media in shown for frame in media.frames], path, side)
    return facts if len(shown) == 1 else {**facts, "clips": counts}


def record_group(
    run_dir: Path,
    step: int,
    group: Group,
    tokenizer: Any = None,
    teacher_logprobs: Sequence[Tensor] | None = None,
) -> None:
    """Append a group to `run_dir`/rollouts.jsonl and save its frames in `run_dir`/frames. Raises OSError.

    teacher_logprobs: log π_T [L] of each ordered completion.
    """
    sample, rewards, rollouts, shown = group.sample, group.rewards, group.rollouts, group.prompt.media
    name = f"{run_dir / 'frames'}/{step}-{_file_name(sample.problem_id)}"
    frames: dict[str, Any] = save_shown(shown, Path(f"{name}.jpg")) if shown else {"count": 0}
    frames["timestamps"] = [round(float(t), 3) for media in shown for t in media.timestamps]
    names = [_short(path) for path in sample.paths]
    contrast = rollouts.question.contrast
    permutation = contrast.permutation if contrast else None
    ordered = _completions(group.ordered, rewards.terms, f"{name}-look")
    for record, total, advantage in zip(ordered, rewards.total, group.advantages, strict=True):
        record["total"], record["advantage"] = _number(total), _number(advantage)
    if "temporal" in group.advantages_without and contrast is not None:
        for record, advantage in zip(ordered, group.advantages_without["temporal"], strict=True):
            record["advantage_without_temporal"] = _number(advantage)
    if rollouts.token_contrasts is not None and tokenizer is not None:
        for record, rollout, contrasts in zip(ordered, group.ordered, rollouts.token_contrasts, strict=True):
            _record_words(record, "word_drops", tokenizer, rollout, contrasts)
    if teacher_logprobs is not None and tokenizer is not None:
        for record, rollout, taught in zip(ordered, group.ordered, teacher_logprobs, strict=True):
            _record_words(record, "word_logprobs", tokenizer, rollout, rollout.logprobs, taught)
    line = {
        "step": step,
        **{name: getattr(sample, name) for name in RECORDED},
        "path": names if len(names) > 1 else "".join(names),
        "frames": frames,
        "contrast": contrast.order if contrast else None,
        "permutation": None if permutation is None else [int(i) for i in permutation],
        "ordered": ordered,
        "shuffled": _completions(rollouts.contrast, rewards.contrast_terms, f"{name}-shuffled"),
        "p": rewards.correct.p,
        "p_contrast": rewards.correct.p_contrast,
    }
    append_line(run_dir / "rollouts.jsonl", line)


def skipped_facts(sample: Sample, rewards: Rewards) -> dict[str, Any]:
    """Return the record of a question that a step learns nothing from: all its completions earn `reward`."""
    names = [name for name in RECORDED if name not in ("options", "answer", "play")]
    return {
        **{name: getattr(sample, name) for name in names},
        "problem": sample.problem[:PROBLEM],
        "accuracy": _number(rewards.correct.p),
        "p_contrast": rewards.correct.p_contrast,
        "reward": _number(rewards.total[0]),
    }


def _short(path: str) -> str:
    """Shorten a path to the file and its folder, for reports that others read."""
    inside, joined, file = path.rpartition("::")
    return inside + joined + "/".join(PurePath(file).parts[-2:])


def _record_words(
    record: dict[str, Any], name: str, tokenizer: Any, rollout: Rollout, *values: Tensor
) -> None:
    """Set `name` of a recorded completion and of each of its earlier turns to the words (`by_word`)."""
    ends = [turn.after for turn in rollout.turns]
    for part, *own in zip([*record.get("turns", ()), record], [0, *ends], [*ends, None], strict=True):
        tokens = slice(*own)
        part[name] = by_word(tokenizer, rollout.token_ids[tokens], *(each[tokens] for each in values))


def by_word(tokenizer: Any, token_ids: Tensor, *values: Tensor) -> list[list[Any]]:
    """Return [word, sum of each of the `values`] for each word of tokens [L]; values: [L] each, in nats. The
    words joined are the completion's text.
    """
    words: list[tuple[list[int], list[float]]] = []
    for token, *own in zip(token_ids.tolist(), *(each.tolist() for each in values), strict=True):
        piece = tokenizer.decode([token], skip_special_tokens=True)
        if words and not piece[:1].isspace():
            tokens, sums = words[-1]
            words[-1] = [*tokens, token], [a + b for a, b in zip(sums, own, strict=True)]
        else:
            words.append(([token], own))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in words]
    return [[text, *(round(s, 3) for s in sums)] for text, (_, sums) in zip(texts, words, strict=True)]


def _completions(
    rollouts: Sequence[Rollout], rewards: Mapping[str, Tensor], strips: str
) -> list[dict[str, Any]]:
    """strips: beginning of the paths of the frames that tools returned."""
    return [
        {
            "text": rollout.text,
            "tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            **({"turns": recorded_turns(rollout, f"{strips}-{i}")} if rollout.turns else {}),
            "rewards": {name: _number(values[i]) for name, values in rewards.items()},
        }
        for i, rollout in enumerate(rollouts)
    ]


def recorded_turns(rollout: Rollout, strips: str) -> list[dict[str, Any]]:
    """Return the turns before the last as in rollouts.jsonl: what the policy wrote, its calls and what came
    back. strips: beginning of the paths of the frames, in a folder of the run.
    """
    turns = []
    for number, turn in enumerate(rollout.turns):
        shown = turn.prompt.media
        record: dict[str, Any] = {"text": turn.text, "calls": []}
        for call in turn.calls:
            said = " ".join(part for part in call.result if isinstance(part, str))
            facts = {"name": call.name, "arguments": call.arguments, "result": said, "failed": call.failed}
            record["calls"].append(facts)
        if shown:
            record["frames"] = save_shown(shown, Path(f"{strips}-{number}.jpg"))
            record["frames"]["timestamps"] = [round(float(t), 3) for media in shown for t in media.timestamps]
        turns.append(record)
    return turns


def _number(value: Tensor | float) -> float | None:
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def _file_name(problem_id: str | int) -> str:
    """Turn a problem id into a unique part of a file name: letters, digits and `_-` only."""
    text = str(problem_id)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
    if name != text:
        name += "-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return name
