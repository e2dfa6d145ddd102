"""Code that was written for TRL, with another import; tables of prompts and images; chats of turns."""

from __future__ import annotations

import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tgrpo_trainers import make_trainer, policy_of
from tiny_questions import read_lines, training_arguments
from transformers import AutoProcessor

from video_r1 import (
    FrameBudget,
    PromptBuilder,
    TGRPOConfig,
    TGRPOTrainer,
    load_manifest,
    read_media,
)
from video_r1.data.manifests.trl_rows import trl_samples
from video_r1.errors import ConfigError, ManifestError
from video_r1.rollout.endpoint_engine import chat_request
from video_r1.rollout.engine import SamplingSettings

CODE = """
from trl import GRPOConfig, GRPOTrainer

SYSTEM_PROMPT = "Reason first, in <think> tags, and then answer."

def make_conversation(example):
    conversation = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": example["problem"]},
    ]
    return {"prompt": conversation, "image": example["image"]}

dataset = dataset.map(make_conversation)

def accuracy_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    seen.append((contents, solution, kwargs))
    return [float(len(content) % 5 == 0) for content in contents]

def asked(prompts, completions, **kwargs):
    return [float(prompt[-1]["role"] == "user") for prompt in prompts]

trainer = GRPOTrainer(
    model=model_id,
    args=GRPOConfig(num_generations=4, max_completion_length=8, remove_unused_columns=False, **arguments),
    reward_funcs=[think_format_reward, accuracy_reward, asked],
    train_dataset=dataset,
)
trainer.train()
"""


def table(count: int = 4) -> datasets.Dataset:
    rows = [
        {
            "image": Image.new("RGB", (84, 56), (40 * n, 90, 200 - 40 * n)),
            "problem": f"What is in picture {n}?",
            "solution": f"$x = {n}$",
        }
        for n in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def think_format_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """As TRL's function of that name reads completions."""
    return [
        float(re.match(r"^<think>.*?</think>.*$", one[0]["content"], re.DOTALL) is not None)
        for one in completions
    ]


def test_code_for_trl_runs_with_another_import(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    names = {
        "dataset": table(),
        "seen": seen,
        "model_id": str(checkpoint),
        "think_format_reward": think_format_reward,
        "arguments": training_arguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=2),
    }
    changed = "from video_r1 import TGRPOConfig as GRPOConfig, TGRPOTrainer as GRPOTrainer"
    exec(compile(CODE.replace("from trl import GRPOConfig, GRPOTrainer", changed), "code", "exec"), names)
    contents, solutions, others = seen[-1]
    assert len(contents) == 8 and set(solutions) <= {f"$x = {n}$" for n in range(4)}  # as the table has them
    assert {"prompts", "completion_ids", "problem"} <= others.keys()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and all(line["reward/asked"] == 1 for line in lines)
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()

    trainer: Any = names["trainer"]
    (group, *_) = trainer.step.batches[0].groups
    text = AutoProcessor.from_pretrained(checkpoint).tokenizer.decode(group.prompt.input_ids)
    roles = [message["role"] for message in group.prompt.messages]
    assert roles == ["system", "user"]
    assert text.index("Reason first") < text.index("<|image_pad|>") < text.index(group.sample.problem)
    assert "Think within" not in text  # the prompt is the table's own, without this project's template


HEAD = "from trl import GRPOConfig, GRPOTrainer\n"
SCRIPTS = {
    "own reward": """
def short(completions, **kwargs):
    return [-float(len(each[0]["content"])) for each in completions]

args = GRPOConfig(num_generations=2, max_completion_length=6, beta=0.0, **common)
GRPOTrainer(model_id, short, args, chats).train()
""",
    "weights": """
def first(completions, **kwargs):
    return [float(n % 2) for n, _ in enumerate(completions)]

def second(prompts, completions, solution, **kwargs):
    return [float(len(each)) for each in solution]

args = GRPOConfig(num_generations=2, max_completion_length=6, reward_weights=[1.0, 0.5], **common)
trainer = GRPOTrainer(model=model_id, reward_funcs=[first, second], args=args, train_dataset=chats)
trainer.train()
""",
    "LoRA": """
from peft import LoraConfig

args = GRPOConfig(num_generations=2, max_completion_length=6, scale_rewards=False, **common)
adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
right = lambda completions, **kwargs: [1.0 for _ in completions]
trainer = GRPOTrainer(model_id, right, args, chats, peft_config=adapters)
trainer.train()
trainer.save_model(args.output_dir)
""",
    "image table": """
dataset = images.map(lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]})

async def near(completions, image=None, **kwargs):
    return [0.5 for _ in completions]

args = GRPOConfig(num_generations=2, max_completion_length=6, loss_type="dapo", **common)
GRPOTrainer(model=model_id, reward_funcs=near, args=args, train_dataset=dataset).train()
""",
    "streaming": """
def reward(completions, **kwargs):
    return [1.0 for _ in completions]

stream = chats.to_iterable_dataset()
args = GRPOConfig(num_generations=2, max_completion_length=6, log_completions=True, **common)
GRPOTrainer(model_id, reward_funcs=[reward], args=args, train_dataset=stream).train()
""",
}


@pytest.mark.parametrize("style", SCRIPTS)
def test_scripts_of_five_styles_run_with_another_import(style: str, checkpoint: Path, tmp_path: Path) -> None:
    chats = [{"prompt": [{"role": "user", "content": f"Is {n} even?"}], "solution": str(n)} for n in range(3)]
    common = training_arguments(tmp_path / "run", max_steps=1, preflight_questions=0)
    changes = {"num_generations", "max_completion_length", "beta", "scale_rewards", "loss_type"}
    names = {
        "model_id": str(checkpoint),
        "chats": datasets.Dataset.from_list(chats),
        "images": table(),
        "common": {name: value for name, value in common.items() if name not in changes},
    }
    changed = "from video_r1 import TGRPOConfig as GRPOConfig, TGRPOTrainer as GRPOTrainer\n"
    exec(compile((HEAD + SCRIPTS[style]).replace(HEAD, changed), style, "exec"), names)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert {"loss", "reward/total"} <= line.keys()
    assert (tmp_path / "run" / "adapter_config.json").exists() == (style == "LoRA")


def test_an_optimizer_and_its_schedule_are_used(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    plain = make_trainer(checkpoint, str(manifest), tmp_path / "plain")
    model, processor = policy_of(plain), cast(Any, plain.processing_class)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=9)
    args = TGRPOConfig(**training_arguments(tmp_path / "run", max_steps=1, preflight_questions=0))
    trainer = TGRPOTrainer(
        model, "accuracy", args, str(manifest), None, processor, None, None,
        (optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer  # type: ignore[union-attr]
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["learning_rate"] == pytest.approx(0.005)


def test_rows_that_are_no_question_are_all_named(tmp_path: Path) -> None:
    picture = Image.new("RGB", (56, 56))
    rows = [
        {"prompt": "What?", "image": picture},
        {"prompt": [{"role": "assistant", "content": "Yes."}], "image": picture},
        {"prompt": 3, "image": picture},
        {"prompt": "What?", "image": 3},
    ]
    with pytest.raises(ManifestError) as caught:
        trl_samples(rows, tmp_path)
    assert [problem.row for problem in caught.value.problems] == [2, 3, 4]
    (sample, again) = trl_samples([rows[0], rows[0]], tmp_path)
    assert sample.path == again.path and Path(sample.path).exists()  # one file for one picture
    assert sample.messages == ({"role": "user", "content": "What?"},) and sample.answer == ""
    (words,) = trl_samples([{"prompt": "What?", "images": []}], tmp_path)
    assert words.data_type == "text" and words.paths == ()


def parts(*each: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(each)}]


TEXT = {"type": "text", "text": "Which way?"}
CLIP, OTHER = {"type": "video", "video": "c.mp4"}, {"type": "video_url", "video_url": {"url": "d.mp4"}}


@pytest.mark.parametrize(
    ("row", "shown", "said"),
    [
        ({"prompt": "Which way?", "video": "c.mp4"}, ["c.mp4"], "Which way?"),
        ({"prompt": "Which way?", "videos": ["c.mp4", Path("d.mp4")]}, ["c.mp4", "d.mp4"], "Which way?"),
        ({"prompt": parts(CLIP, TEXT)}, ["c.mp4"], "<video>Which way?"),
        ({"prompt": parts(TEXT, CLIP, {**TEXT, "image": None})}, ["c.mp4"], "Which way?<video>Which way?"),
        ({"prompt": parts(CLIP, TEXT, OTHER)}, ["c.mp4", "d.mp4"], "<video>Which way?<video>"),
        ({"prompt": parts({"type": "video", "index": 0}, TEXT), "videos": ["d.mp4"]}, ["d.mp4"], None),
        ({"prompt": parts({"type": "image", "path": "p.jpg"}, TEXT)}, ["p.jpg"], "<image>Which way?"),
        ({"prompt": "Which way?", "image": {"path": "p.jpg", "bytes": None}}, ["p.jpg"], "Which way?"),
        ({"prompt": "Which way?", "answer": "page.png"}, [], "Which way?"),
    ],
)
def test_cases_of_media_in_trl_tables(row: Any, shown: list[str], said: str | None, tmp_path: Path) -> None:
    (sample,) = trl_samples([row], tmp_path)
    assert sample.paths == tuple(str(Path(name).resolve()) for name in shown)
    assert sample.data_type == ("text" if not shown else "image" if "p.jpg" in shown else "video")
    assert said is None or sample.messages[-1]["content"] == said
    assert "c.mp4" not in str(sample.extra)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Which way?", "clip": "c.mp4"}, "its column clip holds a picture or clip"),
        ({"prompt": "Which way?", "path": ["c.MP4"]}, "its column path holds"),
        ({"prompt": "Which way?", "photo": Image.new("L", (9, 9))}, "its column photo holds"),
        ({"prompt": parts({"type": "video"}, TEXT)}, "has places for 1 files, and the row has 0"),
        ({"prompt": parts({"type": "image"}, TEXT), "video": "c.mp4"}, "images and videos"),
        ({"prompt": parts(CLIP, TEXT), "video": "c.mp4"}, "holds files, and so does its column"),
        ({"prompt": parts({**CLIP, "max_pixels": 9}, TEXT)}, "has max_pixels, which is not read"),
        ({"prompt": parts({"type": "audio", "audio": "a.wav"}, TEXT)}, "part of the type audio"),
        ({"prompt": "<video> or <video>?", "videos": ["c.mp4"] * 3}, "mark <video> 2 times for 3 files"),
        (
            {"prompt": [{"role": "tool", "content": "x"}, *parts(TEXT)]},
            "its prompt must be a text, or a list",
        ),
        ({"prompt": [{"role": "user", "content": None}]}, "its prompt must be"),
        ({"prompt": parts(3)}, "its prompt must be"),
        (
            {"prompt": "Which way?", "video": "https://host/c.mp4"},
            "a URL; these are refused unless allow_urls",
        ),
        ({"prompt": "Which way?", "video": [Image.new("L", (9, 9))]}, "its video is a Image; use a file"),
        ({"question": "Which way?"}, "prompt is missing"),
    ],
)
def test_cases_of_rows_that_would_be_trained_blind(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"row 2: .*{re.escape(message)}"):
        trl_samples([{"prompt": "Which way?"}, row], tmp_path)


def test_cases_of_a_video_table_show_the_clip(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    clip = {"type": "video", "video": str(manifest.parent / "0.mp4")}
    rows = [{"prompt": "Which way?", "videos": [clip["video"]]}, {"prompt": parts(TEXT, clip), "solution": 3}]
    trainer = make_trainer(
        checkpoint, rows, tmp_path / "run", max_steps=1, temporal_rule="off", per_device_train_batch_size=2
    )
    trainer.train()
    for group in trainer.step.batches[0].groups:
        assert trainer.builder.visual_tokens(group.prompt.input_ids) == 8  # 4 frames: 2 patches of 4 tokens


@pytest.mark.parametrize(
    ("answer", "solution", "problem_type"),
    [
        (3, "3", "numerical"), (3.5, "3.5", "numerical"), (np.int64(0), "0", "numerical"),
        (True, "True", "free-form"), (np.bool_(True), "True", "free-form"), (np.str_("3"), "3", "free-form"),
        ("3", "3", "free-form"), ("<answer>3</answer>", "3", "free-form"),
        (float("nan"), "", "free-form"), (["a"], "", "free-form"), (None, "", "free-form"),
    ],
)  # fmt: skip
def test_cases_of_answers(
    answer: Any, solution: str, problem_type: str, checkpoint: Path, tmp_path: Path
) -> None:
    (sample,) = trl_samples([{"prompt": "How many?", "answer": answer}], tmp_path)
    assert (sample.answer, sample.problem_type) == (solution, problem_type)
    if answer is None:
        with pytest.raises(ManifestError, match="1 of 1 rows have no text or number in solution, ans"):
            make_trainer(checkpoint, [{"prompt": "How many?"}], tmp_path, "accuracy")


SPAN = '{"time": [%s]}'


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"problem_type": "numerical", "answer": "3,5"}, "must be a finite number, not '3,5'; a comma"),
        ({"problem_type": "numerical", "answer": "1 200"}, "1 200"),
        ({"problem_type": "regression", "answer": 0}, "errors are relative to it"),
        ({"answer": "?!"}, "must have a word or a symbol to compare, unlike '?!'"),
        ({"problem_type": "OCR", "answer": "?!"}, "?!"),  # what that message says
        ({"problem_type": "OCR", "answer": "\u200b"}, "has nothing that can be seen"),
        ({"problem_type": "mc", "answer": "left"}, "must be an option's letter, not 'left'"),
        ({"problem_type": "mc", "answer": "(B)"}, "B"),
        ({"answer": "<think>so</think> <answer>red</answer>"}, "red"),
        ({"answer": "a </think> b"}, "has a tag in it"),
        ({"answer": Decimal("2.5")}, "2.5"),
        ({"problem_type": "temporal grounding", "video": "c.mp4", "answer": SPAN % "3, 2"}, "from 3 s to 2"),
        ({"problem_type": "temporal grounding", "video": "c.mp4", "answer": SPAN % "1, 2"}, SPAN % "1, 2"),
        ({"problem_type": "temporal grounding", "answer": SPAN % "1, 2"}, "is for videos, and this is a t"),
        ({"answer": "red", "process": "it is red"}, "process is 'it is red'; it must be <think>"),
        ({"answer": "red", "video": "c.mp4", "start": 4, "end": 3}, "the window ends (3 s) before it starts"),
        ({"answer": "red", "image": "p.jpg", "start": 1}, "start and end are for videos"),
    ],
)
def test_cases_of_truths_that_are_not_paid(row: Any, read: str, tmp_path: Path) -> None:
    """A row of a table passes the check of a manifest: with the reason, or with the answer as it is read."""
    rows = [{"prompt": "What?"}, {"prompt": "What?", **row}]
    try:
        found = trl_samples(rows, tmp_path)[1].answer
    except ManifestError as error:
        (problem,) = error.problems
        assert problem.row == 2 and read in problem.text
    else:
        assert found == read


def test_a_table_of_prompts_has_windows_and_rationales(tmp_path: Path) -> None:
    row = {"prompt": "What?", "video": "c.mp4", "start": 1, "end": 2.5, "process": "<think>So.</think>"}
    (sample,) = trl_samples([row], tmp_path)
    assert (sample.start, sample.end, sample.process) == (1.0, 2.5, row["process"])
    assert (sample.solution, sample.extra["start"]) == ("<answer></answer>", 1)  # as the table has it


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "I;16", "F", "YCbCr", "1", "turned"])
def test_cases_of_pictures_are_the_same_at_both_doors(mode: str, tmp_path: Path) -> None:
    """A file of a manifest, and the same picture inside a table."""
    pixels = np.arange(48 * 80 * 3).reshape(48, 80, 3).astype(np.uint8)
    picture, name = Image.fromarray(pixels), tmp_path / "p.tif"
    if mode == "turned":
        name = tmp_path / "p.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(name, exif=exif)
    else:
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else picture
        picture.convert(mode).save(name)
    opened = Image.open(name)
    (sample,) = trl_samples([{"prompt": "What?", "image": opened}], tmp_path / "media")
    row = {"problem_id": 1, "problem": "?", "data_type": "image", "problem_type": "OCR", "path": name.name}
    (other,) = load_manifest([row | {"solution": "<answer>x</answer>"}], tmp_path)
    budget = FrameBudget(image_pixels=80 * 80, size_multiple=16)
    first, second = (read_media(one, budget).frames for one in (sample, other))
    assert torch.equal(first, second) and opened.mode == (mode if mode != "turned" else "RGB")


def test_cases_of_streams_splits_and_ids(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "What?", "image": Image.new("RGB", (56, 56)), "id": "same"} for _ in range(2)]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(checkpoint, stream, tmp_path, temporal_rule="off")
    assert [sample.problem_id for sample in cast(Any, trainer.train_dataset)] == [1, 2]
    nested = datasets.Dataset.from_list([{"prompt": "What?", "images": [row["image"]]} for row in rows])
    assert [sample.data_type for sample in trl_samples(nested, tmp_path)] == ["image"] * 2
    with pytest.raises(ConfigError, match="train_dataset has the splits train, test; pass one"):
        make_trainer(checkpoint, datasets.DatasetDict({"train": nested, "test": nested}), tmp_path)
    broken = Image.open(io.BytesIO((tmp_path / "media").glob("*.png").__next__().read_bytes()[:60]))
    with pytest.raises(ManifestError, match="row 1: its image cannot be read"):
        trl_samples([{"prompt": "What?", "image": broken}], tmp_path)


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Is there a square?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Which way does it move?"},
]


def test_a_row_may_be_a_chat_of_several_turns(checkpoint: Path, manifest: Path) -> None:
    """Its visuals stand before the first question, for the trainer's processor and for an endpoint."""
    rows = json.loads(manifest.read_text())[:1]
    del rows[0]["problem"]
    (sample,) = load_manifest([rows[0] | {"messages": CHAT}], manifest.parent)
    assert sample.problem == "Which way does it move?"
    media = read_media(sample, FrameBudget(frame_pixels=56 * 56, max_frames=4))
    builder = PromptBuilder(AutoProcessor.from_pretrained(checkpoint))
    prompt = builder.build(sample, media)
    text = builder.tokenizer.decode(prompt.input_ids)
    said = ["Be short.", "<|video_pad|>", "Is there a square?", "Yes.", "Which way does it move?"]
    places = [text.index(part) for part in said]
    assert places == sorted(places) and "Think within" not in text
    request = chat_request("m", prompt, "video", SamplingSettings(), 1, 0)["messages"]
    assert [message["role"] for message in request] == [turn["role"] for turn in CHAT]
    assert [part["type"] for part in request[1]["content"]] == ["video_url", "text"]
    assert request[2]["content"] == "Yes."


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({}, r"messages is \{\}; it must be a list"),
        ("hello", "messages is 'hello'"),
        (CHAT[:3], "the last one the user's"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "judge", "content": "Hm"}], "role"),
    ],
)
def test_what_is_no_chat(manifest: Path, messages: Any, message: str) -> None:
    row = json.loads(manifest.read_text())[0]
    with pytest.raises(ManifestError, match=message):
        load_manifest([row | {"messages": messages}], manifest.parent)
