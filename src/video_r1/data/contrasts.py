"""Contrast clips: a question's own clip without its frame order, or without its frames.

Each is a pure function of the number of frames T: which of them stand, and in which order. What a model gets
right with a contrast clip needs nothing that the contrast takes away; the temporal gap is what it gets right
only in order.

| contrast | frames of a clip 0 1 2 3 4 5 6 7 | takes away | source |
|---|---|---|---|
| shuffled | 3 1 0 2 7 5 4 6, any order but the clip's own | order | T-GRPO, arXiv 2503.21776 |
| reversed | 7 6 5 4 3 2 1 0 | the arrow of time | ArrowRL, arXiv 2506.03340 |
| frozen | 5 5 5 5 5 5 5 5, any one of them | change | – |
| single | 4 4, the middle one, as one temporal patch | all frames but one | – |
| dropped | 1 2 5 6, half of them in order | moments | TaRO, arXiv 2606.09248 |
| blind | none: the prompt has no visuals | everything | – |

Shuffled and reversed may act on pairs of frames, the temporal patches of the Qwen vision towers: reversed is
then 6 7 4 5 2 3 0 1. A tower sees one pair at a time, so that features are permuted as the pairs are.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from video_r1.data.decoding.media import Shown, clips_of, shuffled_order
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.settings.frames import TEMPORAL_PATCH, Contrast, ContrastUnit


def contrast_frames(
    contrast: Contrast, frames: int, generator: Generator, unit: ContrastUnit = "frame"
) -> Tensor | None:
    """[T'] int64: the frames of a clip of `frames` frames that the contrast shows, by number.

    None for a clip that is too short to have it. generator: for what is drawn, which is the same for the
    same generator. unit: what shuffled and reversed permute.
    """
    by_patch = unit == "patch" and contrast in ("shuffled", "reversed")
    if frames < (2 * TEMPORAL_PATCH if by_patch or contrast == "dropped" else 2):
        return None
    if not by_patch:
        return _CONTRASTS[contrast](frames, generator)
    patches = torch.arange(frames).split(TEMPORAL_PATCH)
    return torch.cat([patches[i] for i in _CONTRASTS[contrast](len(patches), generator)])


def contrast_order(
    contrast: Contrast, clips: Sequence[int], generator: Generator, unit: ContrastUnit = "frame"
) -> Tensor | None:
    """`contrast_frames` of each of several clips, drawn one after the other; numbers count on through them.

    clips: the frames of each. One that is too short for the contrast keeps its order; None where all are.
    """
    found = [contrast_frames(contrast, frames, generator, unit) for frames in clips]
    if all(order is None for order in found):
        return None
    orders = [torch.arange(n) if order is None else order for order, n in zip(found, clips, strict=True)]
    firsts = [sum(clips[:place]) for place in range(len(clips))]
    return torch.cat([first + order for first, order in zip(firsts, orders, strict=True)])


def reversed_order(frames: int, generator: Generator) -> Tensor:
    """From the last frame to the first."""
    return torch.arange(frames).flip(0)


def frozen(frames: int, generator: Generator) -> Tensor:
    """One frame, drawn uniformly, in every place."""
    return torch.randint(frames, (1,), generator=generator).expand(frames).clone()


def single(frames: int, generator: Generator) -> Tensor:
    """The middle frame, as often as makes one temporal patch: a picture, at a picture's price."""
    return torch.full((TEMPORAL_PATCH,), frames // 2)


def dropped(frames: int, generator: Generator) -> Tensor:
    """Half of the frames, drawn uniformly, in their order; an even number, as pairs make temporal patches."""
    kept = frames // 2 // TEMPORAL_PATCH * TEMPORAL_PATCH
    return torch.randperm(frames, generator=generator)[:kept].sort().values


def blind(frames: int, generator: Generator) -> Tensor:
    """No frame at all."""
    return torch.empty(0, dtype=torch.long)


def contrast_prompt(
    sample: Sample,
    media: Shown,
    builder: TextPrompts,
    contrast: Contrast,
    generator: Generator,
    unit: ContrastUnit = "frame",
) -> Prompt | None:
    """The question about the contrast clip, of several clips each one's; None where all are too short, as
    images (of one frame) are.

    Raises PromptError.
    """
    shown = contrast_order(contrast, [len(clip.frames) for clip in clips_of(media)], generator, unit)
    return None if shown is None else builder.build(sample, media, shown, contrast)


def blind_prompt(sample: Sample, media: Shown, builder: TextPrompts) -> Prompt:
    """The question alone, of an image too. Raises PromptError."""
    return builder.build(sample, media, torch.empty(0, dtype=torch.long), "blind")


_CONTRASTS: dict[Contrast, Callable[[int, Generator], Tensor]] = {
    "shuffled": shuffled_order,
    "reversed": reversed_order,
    "frozen": frozen,
    "single": single,
    "dropped": dropped,
    "blind": blind,
}
