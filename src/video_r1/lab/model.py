"""The small base models of the lab (a Qwen2.5-VL and a Qwen3.5 with their processors) and their pretraining.

A base learns to see and to speak, not to answer: whatever the prompt asks, it describes an aspect of the
frames in the order of time. A user's Qwen2.5-VL knows that, and more, before it is trained here. Both bases
that ship with the package are ordinary checkpoint folders, made by `video-r1 lab base`.
"""

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
)

from video_r1.data.answers import LETTERS, lettered
from video_r1.data.decoding.media import resize
from video_r1.data.templates import ANSWER_HINTS, INSTRUCTION
from video_r1.files import claimed, follow_umask, replace_json
from video_r1.lab.questions import ASKED_TYPES, any_question, read_mark
from video_r1.lab.scenes import FPS, MARKS, MOMENTS, SECONDS, Look, listing, random_look, render
from video_r1.settings.commands import BaseSettings
from video_r1.settings.training_record import RECORD


def base_folder(family: str = "qwen2_5_vl") -> Path:
    """Return the folder of the packaged base of a family."""
    name = "base" if family == "qwen2_5_vl" else f"base-{family}"
    return Path(str(resources.files("video_r1.lab") / name))


def frame_side(processor: Any) -> int:
    """Return the side of a frame in pixels: 2 × 2 visual tokens of 2 × 2 patches."""
    return 4 * processor.image_processor.patch_size


# Qwen's chat format without a default system message.
CHAT_TEMPLATE = (base_folder() / "chat_template.jinja").read_text("utf-8")


def build_model(seed: int, family: str = "qwen2_5_vl") -> PreTrainedModel:
    """Build a model of the packaged base's architecture with random float32 weights.

    Two settings of its config.json differ in kind from the large models: the rotary base is 20, for sequences
    of some hundred tokens, and the temporal section is small, so that columns and rows of a 2 × 2 grid are
    distinguishable. Three of Qwen3.5's four layers have a state, as in the large models.
    """
    config: Any = AutoConfig.from_pretrained(base_folder(family))
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    config.text_config.dtype = config.vision_config.dtype = None  # so that config.json is the packaged one
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):  # states last for tens of tokens; the default decays at once
            weight.data.copy_(torch.linspace(0.02, 0.3, len(weight)).log())
    model.generation_config = GenerationConfig.from_pretrained(base_folder(family))
    return model


IGNORE = -100
BATCH = 32  # conversations a step
LEARNING_RATE = 1e-3
WARMUP = 200  # steps
# Times of the frames that are sampled from a lab clip (2 a second, evenly spaced).
FRAME_TIMES: list[float] = (np.round(np.linspace(0, SECONDS * FPS - 1, 8)) / FPS).tolist()


def corpus(seed: int, rows: int = 4000) -> Iterator[str]:
    """Yield texts of the lab: questions, options, chains, instructions and hints."""
    rng = np.random.default_rng(seed)
    yield from 50 * (INSTRUCTION, *(ANSWER_HINTS[kind] for kind in ASKED_TYPES))
    for _ in range(rows):
        question = any_question(rng)
        yield f"{question.problem}\n" + "\n".join(lettered(question.choices))
        conclusion = f"{question.answer} is {LETTERS[rng.integers(4)]}."
        yield f"<think>{question.chain} {conclusion}</think>\n<answer>{question.answer}</answer>"
        yield f"<think>{read_mark(_any_mark(rng))}</think>"
        yield f"user\nassistant\nsystem\n{listing([random_look(rng) for _ in range(MOMENTS)], 'scenes')}"


def _any_mark(rng: np.random.Generator) -> str:
    """Draw a mark; none ("") in half of the cases."""
    return str(rng.choice(list(MARKS))) if rng.random() < 0.5 else ""


def _timeline(rng: np.random.Generator) -> tuple[tuple[Look, ...], list[str]]:
    """Draw a timeline; return it and the attributes that can be listed."""
    if rng.random() < 0.35:
        timeline = any_question(rng).timeline
    else:
        digit = rng.random() < 0.25
        looks = [random_look(rng, digit) for _ in range(MOMENTS if rng.random() < 0.8 else 1)]
        for name in ("colour", "shape", "size"):
            if rng.random() < 0.5:
                looks = [replace(look, **{name: getattr(looks[0], name)}) for look in looks]
        if rng.random() < 0.6:
            looks = [replace(look, x=looks[0].x, y=looks[0].y) for look in looks]
        if rng.random() < 0.1:
            looks = [look if rng.random() < 0.5 else replace(look, shape="") for look in looks]
        timeline = tuple(looks)
    kinds = ["scenes", "colours"]
    kinds += ["digits", "digits"] if all(look.shape.isdigit() for look in timeline) else ["shapes"]
    if all(look.shape for look in timeline):
        kinds += ["sizes", "places", "columns"]
    return timeline, kinds


class Conversations(IterableDataset):
    """Endless conversations of several turns, each with another request or random words."""

    def __init__(self, processor: Any, seed: int) -> None:
        self.processor, self.seed = processor, seed
        self.words = sorted({word for text in corpus(seed, 400) for word in text.split() if "<" not in word})

    def _request(self, rng: np.random.Generator) -> str:
        """Draw a request: random words, or a question of the lab, with or without options."""
        words = " ".join(rng.choice(self.words, size=int(rng.integers(1, 13))))
        if rng.random() < 0.6:
            return words
        question = any_question(rng)
        options = rng.permutation(list(question.choices)).tolist() if rng.random() < 0.5 else []
        return "\n".join([question.problem, *lettered(options), words])

    def chat(self, rng: np.random.Generator) -> tuple[str, Tensor]:
        """Draw a conversation. Return its text and frames [T, 3, side, side] uint8; an image has T = 1."""
        timeline, kinds = _timeline(rng)
        mark = _any_mark(rng)
        is_image = len(timeline) == 1
        frames = render(timeline, FRAME_TIMES[:1] if is_image else FRAME_TIMES, rng, mark)
        turns: list[tuple[str, str]] = []
        aspects = rng.permutation(kinds)[: int(rng.integers(2, 4))].tolist()
        if rng.random() < 0.6:
            aspects.insert(int(rng.integers(0, len(aspects) + 1)), "mark")
        for kind in aspects:
            request = self._request(rng)
            if rng.random() < 0.3:
                request = f"{request} {kind}?"
            turns.append((request, read_mark(mark) if kind == "mark" else f"{listing(timeline, kind)}."))
        visual = f"<|vision_start|><|{'image' if is_image else 'video'}_pad|><|vision_end|>"
        text = ""
        for request, response in turns:
            text += f"<|im_start|>user\n{visual}{request}<|im_end|>\n"
            text += f"<|im_start|>assistant\n{response}<|im_end|>\n"
            visual = ""  # only in the first turn
        side = frame_side(self.processor)
        return text, resize(torch.from_numpy(frames).permute(0, 3, 1, 2), side, side)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        for index in itertools.count():
            rng = np.random.default_rng((self.seed, index))
            chats = sorted((self.chat(rng) for _ in range(8 * BATCH)), key=lambda chat: len(chat[0]))
            for at in rng.permutation(8):  # chats of similar length share a batch: less padding
                yield self.collate(chats[at * BATCH : (at + 1) * BATCH])

    def collate(self, chats: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the model's inputs, and `labels` [B, L]: the ids of responses with their ends, else IGNORE.

        Padding is on the right, which causal attention does not see: no attention mask.
        """
        images = [frames for _, frames in chats if len(frames) == 1]
        videos = [frames for _, frames in chats if len(frames) > 1]
        about = {"fps": 1.0, "total_num_frames": SECONDS, "duration": SECONDS, "frames_indices": FRAME_TIMES}
        settings = {"video_metadata": [about] * len(videos), "do_sample_frames": False} if videos else {}
        if videos and hasattr(self.processor.video_processor, "cap_pixels_per_frame"):
            settings["cap_pixels_per_frame"] = False  # for resizing only; warns if unset
        inputs = self.processor(
            text=[text for text, _ in chats],
            images=[frame for frames in images for frame in frames] or None,
            videos=videos or None,
            do_resize=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            **settings,
        )
        ids = inputs["input_ids"]
        start, end = (
            ids.eq(self.processor.tokenizer.convert_tokens_to_ids(f"<|im_{name}|>"))
            for name in ("start", "end")
        )
        turn, ended = start.cumsum(1), end.cumsum(1)  # odd turns are the user's
        header = start | start.roll(1, 1) | start.roll(2, 1)
        is_said = (turn % 2 == 0) & ((ended < turn) | end) & ~header
        batch = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return batch | {"labels": ids.where(is_said, IGNORE)}


def pretrain_base(settings: BaseSettings) -> None:
    """Train a base from random weights and write a checkpoint; seed and `threads` determine the result."""
    assert settings.folder is not None
    with claimed(Path(settings.folder)):
        _pretrain(settings, Path(settings.folder))


def _pretrain(settings: BaseSettings, folder: Path) -> None:
    steps = settings.steps
    torch.set_num_threads(settings.threads)
    model: Any = build_model(settings.seed, settings.family)
    processor: Any = AutoProcessor.from_pretrained(base_folder(settings.family))
    for name in ("is_local", "local_files_only"):  # how it was loaded is no part of the checkpoint
        processor.tokenizer.init_kwargs.pop(name, None)
    pixels = frame_side(processor) ** 2
    record = {  # the frame settings, which commands read from the checkpoint
        "fps": 2.0,
        "min_frames": 4,
        "max_frames": len(FRAME_TIMES),
        "frame_pixels": pixels,
        "image_pixels": pixels,
        "dtype": "float32",
        "positions": "transformers",
    }
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    conversations = Conversations(processor, settings.seed)
    loader = DataLoader(conversations, batch_size=None, num_workers=1, prefetch_factor=4)
    start, total, count = time.perf_counter(), 0.0, 0
    for step, inputs in zip(range(1, steps + 1), loader, strict=False):
        # linear warm-up, constant, then a linear decay over the last 30 %
        scale = min(step / WARMUP, 1.0, (steps - step + 1) / (0.3 * steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        labels = inputs.pop("labels")
        wanted = labels[:, 1:] != IGNORE
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states = model.model(**inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden_states[:, :-1][wanted])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total, count = total + loss.item(), count + 1
        if step % 50 == 0:
            rate = step / (time.perf_counter() - start)
            print(f"step {step}/{steps}  loss {total / count:.4f}  {rate:.2f} steps/s", flush=True)
            total, count = 0.0, 0
        if step % 1000 == 0 or step == steps:
            copy.deepcopy(model).bfloat16().save_pretrained(folder)  # half the size
            processor.save_pretrained(folder)
            replace_json(folder / RECORD, record)
            follow_umask(folder)
