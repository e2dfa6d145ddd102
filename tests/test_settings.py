"""Settings, recipes and overrides: types, checks, origins in messages, and every packaged recipe."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pytest
from transformers import TrainingArguments

from video_r1.commands import COMMANDS, TRAINS
from video_r1.errors import ConfigError, RequestError
from video_r1.recipe import load_recipe, save_resolved, training_argument_types
from video_r1.recipe_files import packaged_recipes
from video_r1.settings.base import Settings, own_field_types
from video_r1.settings.decoding import AskSettings, EvalSettings
from video_r1.settings.shared import DataSettings, LoraSettings, ModelSettings, PromptSettings
from video_r1.settings.training import Schedule, SFTSettings, TGRPOSettings, TrainingSettings
from video_r1.settings.types import matches, parse
from video_r1.settings.vllm import EngineSettings

SERVER = {"engine": "http://127.0.0.1:9"}
RL = {"model_name_or_path": "model", "train_manifest": "train.json", "output_dir": "run"}


@pytest.mark.parametrize(("text", "hint", "value"), [
    ("7", int, 7),
    (7.0, int, 7),
    ("1e-6", float, 1e-6),  # YAML leaves 1e-6 as text
    (3, float, 3.0),
    ("off", bool, False),
    ("none", float | None, None),
    ("none", str, "none"),
    ("16,32,64", list[int], [16, 32, 64]),
    ("[16, 32]", list[int] | None, [16, 32]),
    (16, list[int], [16]),
    ("wandb,tensorboard", str | list[str], ["wandb", "tensorboard"]),
    ("accuracy=1,format=0.5", dict[str, float], {"accuracy": 1.0, "format": 0.5}),
    ("{accuracy: 2}", dict[str, float], {"accuracy": 2.0}),
    (False, Literal["margin", "off"], "off"),  # YAML reads a bare off as false
    ('{"a": 1}', dict | str | None, {"a": 1}),
])  # fmt: skip
def test_values_are_read_by_the_settings_type(text: Any, hint: Any, value: Any) -> None:
    parsed = parse(text, hint)
    assert parsed == value
    assert type(parsed) is type(value)
    assert matches(parsed, hint)


@pytest.mark.parametrize(("text", "hint", "said"), [
    (7.5, int, "int"),
    (True, int, "int"),
    ("maybe", bool | None, "true | false or none"),
    ("sum", Literal["grpo", "dapo"], "grpo | dapo"),
    ("accuracy", dict[str, float], "mapping of text to float"),
    ("accuracy=much", dict[str, float], "float"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_the_type_in_words(text: Any, hint: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said.replace('|', '[|]')}$"):
        parse(text, hint)


@pytest.mark.parametrize(("kind", "values", "names"), [
    (TGRPOSettings, {"num_generations": 1}, ["num_generations"]),
    (TGRPOSettings, {"num_generations": "8"}, ["num_generations"]),
    (TGRPOSettings, {"temporal_rule": "margin", "num_contrast_generations": 0}, ["num_contrast_generations"]),
    (TGRPOSettings, {"temperature": 0.0}, ["temperature"]),
    (TGRPOSettings, {"contrast_unit": "patch", "temporal_contrast": "frozen"}, ["contrast_unit"]),
    (TGRPOSettings, {"epsilon": 0.2, "epsilon_high": 0.1}, ["epsilon_high"]),
    (TGRPOSettings, {"length_range": [512, 320]}, ["length_range"]),
    (TGRPOSettings, {"max_completion_length": 256, "length_range": [320, 512]}, ["length_range"]),
    (TGRPOSettings, {"beta": -0.1, "learning_rate": -1.0}, ["learning_rate", "beta"]),
    (SFTSettings, {"max_steps": -1, "num_train_epochs": 0}, ["num_train_epochs"]),
    (PromptSettings, {"max_frames": 2}, ["max_frames"]),
    (ModelSettings, {"lora_target_modules": ["q_proj"]}, ["lora_target_modules"]),
    (EngineSettings, {"async_rollouts": 1}, ["async_rollouts"]),
    (EngineSettings, {**SERVER, "async_rollouts": 2}, ["async_rollouts"]),
    (EngineSettings, {**SERVER, "async_rollouts": 1, "vllm_importance_sampling_correction": False},
     ["async_rollouts"]),
    (EvalSettings, {"order": ["ordered", "ordered"]}, ["order"]),
    (AskSettings, {"start": 4.0, "end": 2.0}, ["end"]),
    (AskSettings, {"problem_type": "multiple choice", "options": ["A. left"]}, ["options"]),
])  # fmt: skip
def test_settings_check_themselves_when_they_are_built(
    kind: type[Settings], values: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert [name for name, _ in caught.value.problems] == names


@pytest.mark.parametrize(("kind", "expected"), [
    (TGRPOSettings, {
        "num_generations": 8, "beta": 0.04, "learning_rate": 1e-6, "max_grad_norm": 5.0, "weight_decay": 0.01,
        "lr_scheduler_type": "cosine", "max_completion_length": 768, "length_bounds": [320, 512],
        "length_reward": 0.2, "correct_threshold": 0.5,
    }),
    (EvalSettings, {
        "temperature": 0.01, "top_p": 0.001, "max_new_tokens": 1024, "frame_pixels": 256 * 28 * 28,
    }),
    (PromptSettings, {"frame_pixels": 128 * 28 * 28}),
])  # fmt: skip
def test_defaults_are_the_papers(kind: type[Settings], expected: dict[str, Any]) -> None:
    assert {name: getattr(kind(), name) for name in expected} == expected


def test_each_temporal_rule_has_its_own_defaults() -> None:
    paper, gate = TGRPOSettings(), TGRPOSettings(temporal_rule="likelihood_gate")
    assert (paper.temporal_rule, paper.alpha, paper.contrast) == ("margin", 0.3, "shuffled")
    assert (gate.alpha, gate.contrast) == (0.9, "frozen")
    assert (gate.contrast_generations, paper.contrast_generations) == (0, 4)
    for rule in ("margin", "likelihood_gate"):  # a size of 0 needs no contrast
        off = TGRPOSettings(temporal_rule=rule, temporal_alpha=0.0)
        assert (off.paid_rule, off.contrast_generations) == ("off", 0)
    assert TGRPOSettings(temporal_rule="likelihood_gate", contrast_unit="patch").contrast == "shuffled"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_stands_in_one_section_of_a_command_and_has_a_help_text(command: str) -> None:
    names = [name for kind in COMMANDS[command].sections for name in own_field_types(kind)]
    assert len(names) == len(set(names))
    for kind in COMMANDS[command].sections:
        for field in dataclasses.fields(kind):
            assert field.metadata["help"], field.name


@pytest.mark.parametrize(("value", "said"), [
    (1.0, "is 1.0; it must be at least 0 and below 1"),
    (float("nan"), "is nan; it must be at least 0 and below 1"),
])  # fmt: skip
def test_a_value_out_of_its_bounds_is_told_all_of_them(value: float, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelSettings(lora=LoraSettings(dropout=value))
    assert caught.value.problems == (("dropout", said),)


def test_importing_the_settings_does_not_import_torch() -> None:
    code = "import sys, video_r1, video_r1.recipe, video_r1.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_options_override_the_recipe(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "model_name_or_path: m\ntrain_manifest: t.json\noutput_dir: run\n"
        "learning_rate: 1e-5\nbeta: 0\nwarmup_steps: 5\ntemporal_rule: off\neval_strategy: no\n",
    )
    resolved = load_recipe("rl", recipe, {"beta": "0.1", "reward-weights": "format=0.5"})
    settings = resolved.section(TGRPOSettings)
    assert (settings.learning_rate, settings.beta, settings.temporal_rule) == (1e-5, 0.1, "off")
    assert settings.reward_weights == {"format": 0.5}
    assert resolved.training == {"eval_strategy": "no"}
    assert resolved.section(DataSettings).train_manifest == "t.json"
    with pytest.raises(KeyError):
        resolved.section(EvalSettings)


def test_every_problem_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "model_name_or_path: m\noutput_dir: run\n\nnum_generations: 1\nlearnin_rate: 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe("rl", recipe, {"max_frames": "2", "bf16": "perhaps", "max_response_length": "9"})
    for said in (
        "num_generations (recipe mine.yaml, line 4) is 1; a group needs at least 2",
        "learnin_rate (recipe mine.yaml, line 5) is not a setting of rl; did you mean learning_rate?",
        "max_frames (option --max_frames) is 2, below min_frames",
        "bf16 (option --bf16) is 'perhaps'; it must be true | false or none",
        "it is a setting of sft",
        "train_manifest is missing",
    ):
        assert said in str(caught.value)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr_scheduler_type", "cosin", "linear | cosine"),
        ("eval_strategy", "sometimes", "no | steps | epoch"),
        ("warmup_steps", "few", "float"),
        ("waarmup_steps", "5", "did you mean warmup_steps?"),
        ("num_shuffled_generations", "4", "its name is num_contrast_generations"),
        ("self_reflection_phrases", "wait", "the phrases that are counted are fixed: remove it"),
    ],
)
def test_fields_of_training_arguments_are_checked_too(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("rl", None, {**RL, name: value})
    assert said in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "a recipe is a YAML mapping"),
        ("3: 4\n", "a recipe is a YAML mapping"),
        ("beta: [1\n", "cannot be read as a recipe"),
        ("beta: 1\nalpha: 2\nbeta: 2\n", "line 3: beta stands there a second time"),
        ("learning-rate: 1\nlearning_rate: 2\n", "line 2: learning_rate stands there a second time"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe("rl", write(tmp_path, text))
    assert said in str(caught.value)


def test_a_missing_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean lab-tgrpo"):
        load_recipe("rl", "lab-tgpro")


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_loads_for_its_command(name: str) -> None:
    from video_r1.training.sft import SFTConfig
    from video_r1.training.tgrpo import TGRPOConfig

    command = "eval" if name.endswith("-eval") else "sft" if "-sft" in name else "rl"
    recipe = load_recipe(command, name)
    assert load_recipe(command, f"recipes/{name}.yaml").values() == recipe.values()
    if command in TRAINS:
        kind = TGRPOConfig if command == "rl" else SFTConfig
        config = kind(**{**recipe.arguments_for(kind), "bf16": False, "use_cpu": True})
        assert config.learning_rate == recipe.section(TrainingSettings).learning_rate
        assert config.max_frames == recipe.section(PromptSettings).max_frames


def test_the_packaged_model_has_a_name() -> None:
    model = load_recipe("sft", None, {**RL, "model_name_or_path": "lab-base"}).section(ModelSettings)
    assert Path(model.model_name_or_path or "").parts[-2:] == ("lab", "base")


@pytest.mark.parametrize("command", TRAINS)
def test_resolved_settings_are_a_recipe_that_gives_the_same_settings(tmp_path: Path, command: str) -> None:
    options = {**RL, "temporal_rule": "off", "epsilon_high": "0.3"} if command == "rl" else RL
    first = load_recipe(
        command, None, {**options, "warmup_steps": "3", "hub_token": "secret", "report_to": "a,b"}
    )
    path = save_resolved(first, tmp_path / "run")
    assert path.name == "config.yaml"
    assert "secret" not in path.read_text()
    second = load_recipe(command, path)
    assert {**second.values(), "hub_token": "secret"} == first.values()
    assert [entry.name for entry in path.parent.iterdir()] == [
        "config.yaml"
    ]  # nothing temporary stays behind


def test_what_transformers_refuses_is_a_wrong_request() -> None:
    from video_r1.training.tgrpo import TGRPOConfig

    with pytest.raises(ConfigError, match="transformers refuses these settings: At most one of fp16"):
        TGRPOConfig(output_dir="run", use_cpu=True, bf16=True, fp16=True)


def test_own_settings_do_not_hide_a_field_of_training_arguments_by_accident() -> None:
    """What both have is meant to be this project's own default; a new clash has to be looked at."""
    own = {
        name for command in TRAINS for kind in COMMANDS[command].sections for name in own_field_types(kind)
    }
    defaults = {f.name for f in dataclasses.fields(TrainingSettings)}
    assert own & set(training_argument_types()) == defaults & set(training_argument_types())


def test_the_schedules_are_those_of_transformers() -> None:
    assert get_args(Schedule) == get_args(training_argument_types()["lr_scheduler_type"])


def test_enums_of_training_arguments_are_choices() -> None:
    """Objects, which no option can give, keep their types."""
    types = training_argument_types()
    assert "linear" in get_args(types["lr_scheduler_type"]) and types["warmup_steps"] is float
    assert types.keys() == {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


@pytest.mark.parametrize("given", [
    {"judge": "http://h/v1", "judge_wait": 9}, {"judge": "endpoint=http://h/v1,wait=9"},
    {"judge": {"endpoint": "http://h/v1", "wait": "9"}}, {"judge_endpoint": "http://h/v1", "judge_wait": 9.0},
])  # fmt: skip
def test_entries_of_a_group_in_a_recipe_and_on_a_command_line(given: dict[str, Any]) -> None:
    """Flat or in a mapping; what is not given has its default."""
    recipe = load_recipe("plan", None, given)
    judge = recipe.section(TGRPOSettings).judge
    assert (judge.endpoint, judge.wait, judge.timeout) == ("http://h/v1", 9.0, 120.0)
    assert recipe.values()["judge"]["wait"] == 9.0
    assert TGRPOSettings(judge=cast(Any, dataclasses.asdict(judge))).judge == judge
    assert TGRPOSettings(judge=judge).judge == judge


@pytest.mark.parametrize(("given", "message"), [
    ({"judge_wait": -1}, r"judge_wait \(option --judge_wait\) is -1.0; it must be at least 0"),
    ({"judge": {"endpoint": "x"}}, r"judge_endpoint .* is 'x'; give an address"),
    ({"judge": "wait=much"}, r"judge_wait .* is 'much'; it must be float"),
    ({"judge": {"wai": 1}}, r"judge_wai .* is not a setting of plan; did you mean judge_wait"),
    ({"judge_wai": 1}, "judge_wai.* is not a setting of plan; did you mean judge"),
])  # fmt: skip
def test_wrong_entries_of_a_group_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("plan", None, given)
    with pytest.raises(ConfigError, match="judge_wait"):
        TGRPOSettings(judge={"wait": -1})  # type: ignore[arg-type]
