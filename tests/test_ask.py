"""Asking one question: the sample made of it, streaming, and the command on a real checkpoint and clip."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scripted_engine import ScriptedEngine, rollout
from tiny_models import moving_square, tiny_processor, write_clip

from video_r1.data import reading
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.errors import ConfigError, MediaError, PromptError, RequestError
from video_r1.evaluation import session
from video_r1.evaluation.ask import question_sample, run_ask
from video_r1.evaluation.session import ModelSession, TextStream, heard
from video_r1.models.loading import load_model
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.decoding import AskSettings
from video_r1.settings.frames import FrameBudget


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_square(16), fps=4)


def question(text: str, path: Path | str, **settings: Any) -> Sample:
    return question_sample(AskSettings(path=str(path), **settings), text)


@pytest.mark.parametrize(
    ("name", "options", "given", "expected"),
    [
        ("a.mp4", (), None, ("video", "free-form", ())),
        ("a.gif", (), None, ("video", "free-form", ())),
        ("a.bin", ("left", "up"), None, ("video", "multiple choice", ("A. left", "B. up"))),
        ("a.jpg", ("A. left", "(B) up"), None, ("image", "multiple choice", ("A. left", "(B) up"))),
    ],
)
def test_question_sample(tmp_path: Path, name: str, options: tuple, given: Any, expected: tuple) -> None:
    path = tmp_path / name
    path.touch()
    sample = question("What?", path, options=list(options), problem_type=given)
    assert (sample.data_type, sample.problem_type, sample.options) == expected


@pytest.mark.parametrize("files", [{"path": ""}, {"path": "a.mp4", "more_paths": [""]}])
def test_an_empty_path_is_refused(
    tmp_path: Path, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no name of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(RequestError, match="a path is empty"):
        run_ask(AskSettings(model="m", question=["What?"], **files))


def test_stream_waits_for_whole_characters() -> None:
    tokenizer = tiny_processor("qwen2_5_vl").tokenizer
    text = "Über 🙂 naïve <think>x</think>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) // 2
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for token in [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]:
        stream.add(token)
    assert "".join(pieces) == text and len(pieces) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streamed_text_is_the_completion(checkpoint: Path, clip: Path) -> None:
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    engine = TransformersEngine(load_model(checkpoint), builder.tokenizer)
    sample, sampling = question("Where?", clip), SamplingSettings(max_tokens=24, seed=1)
    prompt = builder.build(sample, read_media(sample, FrameBudget(frame_pixels=56 * 56)))
    pieces: list[str] = []
    ((completion,),) = heard(
        engine, builder.tokenizer, [prompt], sampling, lambda _, piece: pieces.append(piece)
    )
    assert "".join(pieces) == completion.text and len(pieces) > 5
    assert len(completion.token_ids) > 10

    whole: list[str] = []  # of an engine that cannot be heard while it works
    deaf = ScriptedEngine(lambda *_: [completion.text])
    heard(deaf, builder.tokenizer, [prompt], sampling, lambda _, piece: whole.append(piece))
    assert whole == [completion.text]


def test_command(checkpoint: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "still.png"
    Image.fromarray(moving_square(2)[0]).save(image)
    for path in (clip, image):
        settings = AskSettings(
            model=str(checkpoint), path=str(path), question=["Where is the square?"], max_new_tokens=12,
            frame_pixels=56 * 56, image_pixels=56 * 56, device="cpu",
        )  # fmt: skip
        answer = run_ask(settings)
        output = capsys.readouterr()
        assert output.out.endswith(f"{answer}\n" if answer else "No answer was given.\n")
        assert "cut off at 12 tokens" in output.err


@pytest.mark.parametrize(
    ("output", "options", "printed"),
    [
        ("A dog runs.", [], "A dog runs.\n"),  # without tags the output is the answer: once is enough
        ("<think>t</think> A dog runs.\n", [], "<think>t</think> A dog runs.\n\n"),
        ("B", ["left", "right"], "B\n\nAnswer: B. right\n"),
        ("", [], "\n\nNo answer was given.\n"),
    ],
)
def test_an_answer_is_printed_once(
    output: str,
    options: list[str],
    printed: str,
    checkpoint: Path,
    clip: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "video_r1.evaluation.session.open_engine", lambda *_: ScriptedEngine(lambda *_: [output])
    )
    run_ask(
        AskSettings(
            model=str(checkpoint), path=str(clip), question=["What?"], options=options, frame_pixels=56 * 56
        )
    )
    assert capsys.readouterr().out == printed


def test_errors_reach_the_caller(checkpoint: Path, clip: Path) -> None:
    with pytest.raises(PromptError, match=r"^question 'Where\?': its prompt .*max_prompt_length"):
        run_ask(AskSettings(model=str(checkpoint), path=str(clip), question=["Where?"], max_prompt_length=20))
    with pytest.raises(RequestError, match="no such file"):
        run_ask(AskSettings(model=str(checkpoint), path="gone.mp4", question=["Where?"]))


def sees_order(prompt: Prompt, n: int) -> list[str]:
    """Right in order, and else as often as not."""
    letters = ["B" if prompt.order == "ordered" or i % 2 else "A" for i in range(n)]
    return [f"<answer>{letter}</answer>" for letter in letters]


def test_contrasts_and_follow_up_questions(
    checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares of each order with their intervals; the clip is decoded once for all questions."""
    engine, decoded = ScriptedEngine(sees_order), []
    monkeypatch.setattr("video_r1.evaluation.session.open_engine", lambda *_: engine)
    read = reading.read_media_at
    monkeypatch.setattr(reading, "read_media_at", lambda *a: decoded.append(a) or read(*a))
    settings = AskSettings(
        model=str(checkpoint), path=str(clip), question=["Where to, left or right?", "And then?"],
        options=["left", "right"], answer="right", contrast=["shuffled", "blind"], samples=8,
        frame_pixels=56 * 56,
    )  # fmt: skip
    assert run_ask(settings) == "B. right"
    assert len(decoded) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Where to, left or right?" and "And then?" in lines
    found = [" ".join(line.split()) for line in lines]
    assert "ordered 8 of 8 0.68 to 1.00 B ×8" in found
    assert found.count("shuffled 4 of 8 0.22 to 0.78 +0.50 [+0.07, +0.78] A ×4, B ×4") == 2
    assert lines[-1] == (
        "The order of the frames matters here: with its frames shuffled, fewer answers are right."
    )
    sampling = engine.sampled[-1]
    assert (sampling.temperature, sampling.top_p, sampling.n) == (1.0, 1.0, 8)
    assert len(set(engine.seeds[-1])) == 3


def test_a_model_that_is_better_without_the_clip(clip: Path) -> None:
    sample = question("Where?", clip, options=["left", "right"], answer="B")

    def said(asked: Sample, **right: int) -> str:
        prompts: Any = [SimpleNamespace(order=order) for order in right]
        texts = ["<answer>B</answer>"] * 8 + ["<answer>A</answer>"] * 8
        groups = [[rollout(text) for text in texts[8 - count :][:8]] for count in right.values()]
        return session.verdict(asked, session.views_of(asked, prompts, groups))

    better = "The model answers better without the clip: 88 % are right, 25 % with the clip in order."
    assert said(sample, ordered=2, shuffled=3, blind=7) == better
    assert said(sample, ordered=5, shuffled=5, blind=6).startswith("These answers do not show")
    assert said(sample, ordered=8, blind=8) == "" == said(sample, ordered=8)


def test_without_a_right_answer_the_majority_in_order_counts(checkpoint: Path, clip: Path) -> None:
    sample = question("Where?", clip, options=["left", "right"])
    settings = AskSettings(model=str(checkpoint), frame_pixels=56 * 56)
    with closing(ModelSession(settings)) as opened:
        prompts = opened.prompts(sample, ["ordered", "reversed"])
        groups = ScriptedEngine(sees_order).sample(prompts, SamplingSettings(n=4))
        ordered, other = session.views_of(sample, prompts, groups)
        assert ordered.counted == [True] * 4 and other.counted == [False, True, False, True]
        assert other.gap is not None and other.gap.mean == 0.5 and ordered.gap is None
        still = replace(sample, path="still.png", data_type="image")
        picture = Media(prompts[0].media[0].frames[:1], torch.zeros(1), 0.0, "image")
        opened._clips[opened._key(still)] = (picture,)
        with pytest.raises(MediaError, match="an image, which cannot be reversed; ask in order, or blind"):
            opened.prompts(still, ["reversed"])


def test_a_clip_that_is_replaced_is_read_again(checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    """Under its name, while a model stays loaded, as in the studio."""
    path = tmp_path / "clip.mp4"
    shutil.copy(clip, path)
    sample = question("Where?", path)
    settings = AskSettings(model=str(checkpoint), frame_pixels=56 * 56)
    with closing(ModelSession(settings)) as opened:
        (before,) = opened.media(sample)
        assert opened.media(sample)[0] is before and opened.has(sample)
        write_clip(path, moving_square(frames=4))
        assert not opened.has(sample) and len(opened.media(sample)[0].frames) < len(before.frames)


def test_an_answer_that_no_option_is(clip: Path) -> None:
    assert question("Where?", clip, options=["left", "right"], answer="b").answer == "B"
    with pytest.raises(RequestError, match=r"answer is 'up'; it must be one of the options, A\. left"):
        question("Where?", clip, options=["left", "right"], answer="up")


def test_an_engine_of_the_user(
    checkpoint: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file with one method, named by a setting."""
    (tmp_path / "own.py").write_text(OWN_ENGINE)
    asked = AskSettings(model=str(checkpoint), path=str(clip), question=["What moves?"], frame_pixels=56 * 56)
    run_ask(replace(asked, engine=f"{tmp_path / 'own.py'}:Echo", max_new_tokens=16))
    assert "16 tokens at most" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"engine: .*own.py:Nothing cannot be imported"):
        run_ask(replace(asked, engine=f"{tmp_path / 'own.py'}:Nothing"))


OWN_ENGINE = """
import torch
from video_r1.data.rollouts import Rollout
from video_r1.rollout.engine import RolloutEngine, wanted_counts

class Echo(RolloutEngine):
    def __init__(self, settings, processor):
        self.settings = settings

    def sample(self, prompts, sampling, counts=None, on_token=None):
        text = f"{sampling.max_tokens} tokens at most"
        one = Rollout(torch.zeros(1, dtype=torch.long), torch.zeros(1), text, "stop")
        return [[one] * count for count in wanted_counts(prompts, sampling, counts)]
"""
