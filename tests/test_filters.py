"""`keep`: expressions by hand, what is refused, and what a training run is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from video_r1.cli import main
from video_r1.data.manifests.records import Sample, kept_samples, load_manifest
from video_r1.errors import ConfigError, ManifestError, RequestError
from video_r1.recipe import load_recipe
from video_r1.settings.filters import parse_keep
from video_r1.settings.shared import DataSettings
from video_r1.training import runs

RATES = {"blind": 0.25, "frozen": 0.5, "shuffled": 0.375, "ordered": 0.875}


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("ordered - shuffled > 0.1", True),
        ("ordered - shuffled >= 0.5", True),
        ("0.2 < ordered < 0.9", True),
        ("0.9 > ordered > blind >= 0.25", True),
        ("blind == 0.25 and frozen != 0.5", False),
        ("not (blind < 0.5 or ordered < 0.5)", False),
        ("2 * (ordered - blind) - 1 > 0.2", True),
        ("ordered - blind - shuffled > 0.2", True),  # from left to right: 0.25
        ("-blind < +.1e0", True),
    ],
)
def test_expressions(expression: str, kept: bool) -> None:
    assert parse_keep(expression).keeps(RATES) is kept


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("ordered - shuffled > 0.1", True),  # nothing is known of it
        ("not ordered - shuffled > 0.1", True),
        ("ordered < 0.5 and shuffled > 0.1", False),  # false whatever `shuffled` may be
        ("ordered > 0.9 > shuffled", False),
        ("not (ordered > 0.5 or shuffled > 0.1)", False),
    ],
)
def test_a_missing_rate_is_no_reason_to_drop(expression: str, kept: bool) -> None:
    assert parse_keep(expression).keeps({"blind": 0.0, "ordered": 0.875, "shuffled": None}) is kept
    assert parse_keep(expression).keeps({"blind": 0.0, "ordered": 0.875}) is kept


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("__import__('os').system('true') > 0", "is no pass rate, number, sum or product"),
        ("ordered.__class__ > 0", "'ordered.__class__' is no pass rate"),
        ("9**9**9**9 > ordered", "'9 ** 9 ** 9 ** 9' is no pass rate"),
        ("1e999 > ordered", "out of the range"),
        ("ordered - shuffled", "'ordered - shuffled' is no comparison"),
        ("ordered and shuffled > 0", "'ordered' is no comparison"),
        ("ordered >", "invalid syntax"),
        ("ordered > 0\0", "null"),
        ("(" * 240 + "1" + ")" * 240 + " > 0", "nested"),
        ("ordered > 0 and " * 40 + "1 > 0", "characters; at most 500"),
    ],
)
def test_what_is_no_comparison_of_rates(expression: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keep(expression)
    assert said in str(caught.value) and len(str(caught.value)) < 700


def sample(number: int, **rates: Any) -> Sample:
    extra = {"pass_rates": rates} if rates else {}
    return Sample(number, "?", "video", "free-form", "<answer>x</answer>", "/x.mp4", extra=extra)


def test_kept_samples(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(0, ordered=0.5, shuffled=0.5), sample(1, ordered=1.0, shuffled=0.5),
               sample(2, ordered=1.0), sample(3)]  # fmt: skip
    kept = kept_samples(samples, "ordered - shuffled > 0.1")
    assert [each.problem_id for each in kept] == [1, 2, 3]
    said = capsys.readouterr().err
    assert "3 of 4 questions are trained on, 2 of them without a rate that it names" in said
    assert [each.problem_id for each in kept_samples(samples, "ordered < 1")] == [0, 3]
    for expression, message in (
        ("order > 0", "no question has a pass rate 'order'; there are"),
        ("reversed > 0", "there are ordered, shuffled"),
    ):
        with pytest.raises(ConfigError, match=message):
            kept_samples(samples, expression)
    with pytest.raises(ConfigError, match="none of the 2 questions is kept"):
        kept_samples(samples[:2], "shuffled > 0.5")
    with pytest.raises(ConfigError, match="has no pass rates; video-r1 data audit"):
        kept_samples(samples[3:], "ordered > 0")
    for wrong in (1.5, "high", True, [0.5]):
        with pytest.raises(ManifestError, match="question 9: the pass rate 'ordered' is"):
            kept_samples([sample(9, ordered=wrong)], "ordered > 0")
    with pytest.raises(ManifestError, match="question 9: pass_rates must map names to numbers"):
        kept_samples([Sample(9, "?", "video", "OCR", "", "/x", extra={"pass_rates": 3})], "ordered > 0")


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_a_run_is_given_what_is_kept(
    command: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those alone, in their order; validation has all. The expression belongs to the run's settings."""
    rows = json.loads(manifest.read_text())
    for number, row in enumerate(rows):
        row["pass_rates"] = {"ordered": number / 8}
    audited = manifest.with_name("audited.json")
    audited.write_text(json.dumps(rows))
    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, model: Any, **arguments: Any) -> None:
            given.update(arguments)

        def train(self) -> None: ...

    monkeypatch.setattr(runs, "model_of", lambda recipe: (None, None))
    settings = {"model_name_or_path": "m", "train_manifest": audited, "eval_manifest": audited,
                "output_dir": tmp_path / "run", "use_cpu": True, "keep": "0.2 < ordered < 0.6"}  # fmt: skip
    from video_r1.training.sft import SFTConfig
    from video_r1.training.tgrpo import TGRPOConfig

    recipe = load_recipe(command, None, {name: str(value) for name, value in settings.items()})
    runs.run_recipe(recipe, Trainer, {"rl": TGRPOConfig, "sft": SFTConfig}[command])  # type: ignore[arg-type]
    assert [each.problem_id for each in given["train_dataset"]] == [2, 3, 4]
    assert len(given["eval_dataset"]) == len(rows) == len(load_manifest(audited))
    folder = tmp_path / "run"
    (folder / "config.yaml").write_text("keep: ordered < 1\n")
    assert runs.changed_settings(recipe.values(), folder) == {"keep": ("ordered < 1", "0.2 < ordered < 0.6")}
    assert "keep" not in runs.MAY_CHANGE  # continued with another one, it is refused


def test_a_wrong_expression_is_refused_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError, match=r"'ordered \+': invalid syntax"):
        DataSettings(keep="ordered +")
    words = ["rl", "lab-tgrpo", "--keep", "ordered.real > 0", "--output_dir", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "video-r1: keep (option --keep) 'ordered.real > 0': 'ordered.real' is no pass rate"
    )
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()
