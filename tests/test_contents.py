"""What is continued, and whose figures these are: models, questions and media count by contents."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluation import evaluate, lines, sample, scripted
from tgrpo_trainers import make_trainer
from tiny_models import moving_square, write_clip
from tiny_questions import write_manifest
from transformers import AutoProcessor

from video_r1.annotation.annotate import drawing
from video_r1.data.manifests.records import Sample, load_manifest, samples_digest
from video_r1.data.prompts import PromptBuilder
from video_r1.errors import ConfigError, RequestError
from video_r1.evaluation.question_loop import engine_facts
from video_r1.fingerprint import contents
from video_r1.settings.decoding import AnnotateSettings, EvalSettings


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", moving_square())
    return folder


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(AutoProcessor.from_pretrained(checkpoint))


def other_weights(folder: Path) -> None:
    """Change one byte of the weights; the size and the time of change stay."""
    path = folder / "model.safetensors"
    times = os.stat(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def test_a_model_is_its_files(model: Path, tmp_path: Path) -> None:
    first = contents(model)
    assert first is not None and contents(tmp_path / "none") is None and contents("a") is None
    (model / "metrics.jsonl").write_text("{}")  # no file of the model
    assert contents(shutil.copytree(model, tmp_path / "copy")) == first
    found: set[Any] = {first}
    for change in (
        other_weights,
        lambda folder: (folder / "chat_template.jinja").write_text("x"),
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 7}'),
        lambda folder: (folder / "model-00002.safetensors").write_bytes(b"x"),
    ):
        change(model)
        found.add(contents(model))
    assert len(found) == 5
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    (adapters / "adapter_model.safetensors").write_bytes(b"adapters")
    before = contents(adapters)
    other_weights(model)
    assert contents(adapters) not in (before, None)


def test_an_evaluation_belongs_to_its_weights(
    builder: PromptBuilder, media: Path, model: Path, tmp_path: Path
) -> None:
    """Replaced under the same path: refused, not the old model's figures. Moved: continued."""
    samples = [sample(1, media), sample(2, media)]
    given: dict[str, Any] = {"folder": tmp_path / "eval", "frames": [8]}
    summary = evaluate(samples, scripted(), builder, model=str(model), **given)
    moved = model.rename(tmp_path / "moved")
    nothing = scripted(calls=0)  # a call is an interruption
    assert evaluate(samples, nothing, builder, model=str(moved), **given)["frames"] == summary["frames"]
    with pytest.raises(RequestError, match=r"holds an evaluation with other settings: dtype \("):
        evaluate(samples, nothing, builder, model=str(moved), **given, dtype="bfloat16")
    other_weights(moved)
    with pytest.raises(RequestError, match=r"other settings: model_files \(.*Choose another output folder"):
        evaluate(samples, nothing, builder, model=str(moved), **given)
    assert engine_facts(EvalSettings(engine="vllm"), "a")["engine"] == "vllm"


def test_a_row_with_another_type_or_solution_is_scored_anew(
    builder: PromptBuilder, media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{question} {options}")  # no hint of the type: another one leaves the prompt as it is
    plain = builder.with_template(PromptBuilder(builder.processor, template).template)
    samples, folder = [sample(1, media), sample(2, media)], tmp_path / "eval"
    evaluate(samples, scripted(), plain, folder=folder, frames=[8])
    capsys.readouterr()
    for field, change in (("solution", "<answer>A</answer>"), ("problem_type", "free-form")):
        now = [replace(samples[0], **{field: change}), samples[1]]
        summary = evaluate(now, scripted(calls=0), plain, folder=folder, frames=[8])
        assert "2 answers are scored anew" in capsys.readouterr().err
        assert summary == evaluate(now, scripted(), plain, folder=tmp_path / field, frames=[8])
        assert lines(folder / "predictions-8.jsonl") == lines(tmp_path / field / "predictions-8.jsonl")
        assert summary["frames"]["8"]["ordered"]["accuracy"] < 1
    with pytest.raises(RequestError, match="prompts"):
        evaluate([replace(now[0], problem="?"), now[1]], scripted(calls=0), plain, folder=folder, frames=[8])


def test_a_replaced_clip_is_refused_and_a_moved_one_continues(builder: PromptBuilder, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, moving_square())
    given: dict[str, Any] = {"folder": tmp_path / "eval", "frames": [8]}
    evaluate([sample(1, folder, "a.mp4"), sample(2, folder, "b.mp4")], scripted(), builder, **given)
    moved = folder.rename(tmp_path / "moved")
    samples = [sample(1, moved, "a.mp4"), sample(2, moved, "b.mp4")]
    evaluate(samples, scripted(calls=0), builder, **given)
    (moved / "b.mp4").rename(tmp_path / "b.mp4")
    evaluate(samples, scripted(calls=0), builder, **given)  # a lost clip was asked while it was there
    write_clip(moved / "b.mp4", moving_square(frames=20))
    with pytest.raises(RequestError, match=r"other settings: media .*b\.mp4 \("):
        evaluate(samples, scripted(calls=0), builder, **given)
    swapped = [samples[0], replace(samples[1], path=samples[0].path)]
    with pytest.raises(RequestError, match="questions"):
        evaluate(swapped, scripted(calls=0), builder, **given)


def test_a_local_teacher_is_its_weights(model: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    samples = load_manifest(manifest)

    def drawn(samples: list[Sample] = samples, **changes: Any) -> dict[str, Any]:
        given = {"manifest": str(manifest), "teacher": str(model), "out": "cot.json", **changes}
        return drawing(AnnotateSettings(**given), samples)

    first = drawn()
    assert drawn(dtype="bfloat16")["dtype"] != first["dtype"]
    other = [replace(samples[0], problem_type="free-form"), *samples[1:]]
    assert drawn(other)["manifest"] != first["manifest"]
    other_weights(model)
    assert drawn()["model_files"] != first["model_files"]


def test_questions_are_compared_by_all_their_fields(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    manifest = write_manifest(data)
    rows = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(rows, indent=1))
    (data / "deep").mkdir()

    def digest_of(rows: list[Any]) -> str:
        manifest.write_text(json.dumps(rows))
        return samples_digest(load_manifest(manifest))

    before = digest_of(rows)
    assert digest_of([{**row, "path": f"deep/../{row['path']}"} for row in rows]) == before
    first, rest = rows[0], rows[1:]
    for field, value in (
        ("solution", "<answer>A</answer>"), ("process", "<think>else</think>"), ("path", "1.mp4"),
        ("start", 0.5), ("play", "reversed"), ("mine", {"weight": 2}), ("data_source", "else"),
    ):  # fmt: skip
        assert digest_of([{**first, field: value}, *rest]) != before, field
    assert before not in (digest_of(rows[::-1]), digest_of([*rows, {**first, "problem_id": 99}]))
    assert digest_of(rows) == before
    moved = data.rename(tmp_path / "moved")
    assert samples_digest(load_manifest(moved / manifest.name)) == before


# ---- Training


def train(folder: Path, model: Path | str, manifest: Any, **changes: Any) -> Any:
    settings = {"max_steps": 1, "save_steps": 1, "num_generations": 2, "max_completion_length": 4, **changes}
    trainer = make_trainer(str(model), manifest, folder, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def begun(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step: its model, questions, template and run folder below one folder."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(checkpoint, folder / "model")
    (folder / "template.txt").write_text("{question} {options} Answer.")
    train_begun(folder)
    return folder


def train_begun(folder: Path, **changes: Any) -> Any:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        write_manifest(folder)
    given = {"prompt_template": str(folder / "template.txt"), "evaluated": str(manifest), **changes}
    return train(folder / "run", folder / "model", str(manifest), **given)


def _rewrite(change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        rows = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(change(rows), indent=1))

    return write


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (_rewrite(lambda rows: rows), ""),
        (lambda folder: (folder / "model" / "notes.txt").write_text("x"), ""),
        (_rewrite(lambda rows: rows[1:]), r"contents of eval_manifest \('8 questions, .* → '7 questions"),
        (_rewrite(lambda rows: rows[::-1]), "contents of train_manifest"),
        (_rewrite(lambda rows: [{**rows[0], "solution": "<answer>A</answer>"}, *rows[1:]]), "train_manifest"),
        (lambda folder: (folder / "template.txt").write_text("{question} {options}"), "prompt_template"),
        (lambda folder: other_weights(folder / "model"), "contents of model_name_or_path"),
    ],
)  # fmt: skip
def test_cases_17_a_run_resumes_on_its_own_questions(
    begun: Path, tmp_path: Path, change: Callable[[Path], Any], refused: str
) -> None:
    """The folder was moved as a whole; what was rewritten in it under its path is named, with the remedy."""
    folder = Path(shutil.copytree(begun, tmp_path / "moved"))
    change(folder)
    if refused:
        with pytest.raises(ConfigError, match=refused) as error:
            train_begun(folder, max_steps=2)
        assert "Choose another output_dir, or remove the folder" in str(error.value)
        with pytest.raises(ConfigError, match=refused):
            train_begun(folder)  # nor is it finished
    else:
        assert train_begun(folder, max_steps=2).state.global_step == 2


def test_questions_given_as_objects_are_compared_too(begun: Path, checkpoint: Path, tmp_path: Path) -> None:
    samples = load_manifest(begun / "manifest.json")
    train(tmp_path / "run", checkpoint, samples, evaluated={"a": samples[:4], "b": samples[4:]})
    for questions, held_out, said in (
        (samples[1:], {"a": samples[:4], "b": samples[4:]}, "train_manifest"),
        (samples, {"a": samples[:4], "b": samples[5:]}, "contents of b "),
    ):
        with pytest.raises(ConfigError, match=said):
            train(tmp_path / "run", checkpoint, questions, evaluated=held_out, max_steps=2)


def test_other_media_under_the_same_paths(
    begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "other"))
    write_clip(folder / "0.mp4", moving_square(frames=20))
    assert train_begun(folder, max_steps=2).state.global_step == 2
    assert "some training media have changed since the run began" in caplog.text


def test_the_quarantine_is_that_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    """Begun anew with the run; kept by a resumed one, which lists no question twice."""
    run, quarantine = tmp_path / "run", tmp_path / "run" / "quarantine.jsonl"
    run.mkdir()
    quarantine.write_text('{"problem_id": "of an earlier start", "reason": "?"}\n{"problem_i')
    manifest = write_manifest(tmp_path, bad=(0, 1))
    for steps in (3, 6):
        train(run, checkpoint, str(manifest), max_steps=steps, per_device_train_batch_size=4)
        assert sorted(line["problem_id"] for line in lines(quarantine)) == [0, 1]


def test_a_tensor_changed_in_a_large_file_is_seen(tmp_path: Path) -> None:
    """Of a large file one place in each MB is read: a matrix of 1 MB is seen wherever it lies."""
    path = tmp_path / "weights.bin"
    with open(path, "wb") as file:
        file.truncate((1 << 28) + 5_000_000)
    before = contents(path)
    with open(path, "r+b") as file:
        file.seek(12_345_678)
        file.write(b"\1" * (1 << 20))
    assert contents(path) != before
