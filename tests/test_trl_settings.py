"""Settings and constructors written for TRL: the same, translated, or refused with what to use instead."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from video_r1 import SFTConfig, TGRPOConfig, TGRPOTrainer
from video_r1.errors import ConfigError
from video_r1.recipe import load_recipe
from video_r1.rewards.scoring import reward_terms
from video_r1.settings.base import flat_types, own_field_types
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.trl import DEFAULTS, REFUSED, translated
from video_r1.training.tgrpo import what_counts

trl = pytest.importorskip("trl", reason="TRL is not installed (extra bench)")

OTHERS: dict[str, Any] = {
    "loss_type": "bnpo", "importance_sampling_level": "sequence", "scale_rewards": "batch",
    "vllm_mode": "server", "vllm_importance_sampling_mode": "token_mask", "delta": 1.5, "epsilon_high": 0.3,
    "reward_weights": [1.0, 0.5], "vllm_server_base_url": "http://host:1", "vllm_server_host": "host",
    "num_generations_eval": 2,
    "top_entropy_quantile": 0.5, "vllm_gpu_memory_utilization": 0.5, "pad_to_multiple_of": 64,
    "num_completions_to_print": 17, "steps_per_generation": 3, "generation_batch_size": 3, "min_p": 0.1,
    "vllm_max_model_length": 2000, "max_tool_calling_iterations": 3, "vllm_importance_sampling_cap": 5.0,
    "model_init_kwargs": {"dtype": torch.bfloat16}, "router_aux_loss_coef": 0.1,
    "generation_kwargs": {"a": 1},     "chat_template_kwargs": {"a": 1},
    "cache_implementation": "static", "log_completions_hub_repo": "me/it",
    "vllm_structured_outputs_regex": ".", "off_policy_mask_threshold": 0.5,
    "vllm_importance_sampling_clip_min": 0.5, "transformers_continuous_batching_config": {"a": 1},
    "multi_objective_aggregation": "normalize_then_sum", "vllm_model_impl": "transformers",
}  # fmt: skip
"""Of TRL's fields, values that are not their default."""
DONE = (
    "log_completions",
    "log_unique_prompts",
    "use_bias_correction_kl",
)  # their other value is what is done
ONLY_WITH: dict[str, dict[str, Any]] = {
    "vllm_mode": {"use_vllm": True},
    "vllm_server_host": {"vllm_mode": "server", "vllm_server_port": 1},
    "vllm_server_port": {"vllm_mode": "server", "vllm_server_host": "host"},
}
CPU: dict[str, Any] = {"output_dir": "run", "use_cpu": True}


def own_fields() -> dict[str, Any]:
    """Name and default of the fields of GRPOConfig and of TRL's base class."""
    declared = {*trl.GRPOConfig.__annotations__, *trl.trainer.base_config._BaseConfig.__annotations__}
    return {field.name: field.default for field in fields(trl.GRPOConfig) if field.name in declared}


def other_value(name: str, default: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    return not default if isinstance(default, bool) else default + 1 if default is not None else None


def values_of(**changes: Any) -> dict[str, Any]:
    config = TGRPOConfig(**CPU, **changes)
    return {field.name: str(getattr(config, field.name)) for field in fields(config) if field.init}


@pytest.mark.parametrize("name", own_fields())
def test_no_field_of_trl_is_dropped(name: str) -> None:
    """Its default is taken; another value changes a setting, or is refused by its name."""
    default, more = own_fields()[name], ONLY_WITH.get(name, {})
    if name not in ("max_completion_length", "beta", "use_bias_correction_kl"):
        TGRPOConfig(**CPU, **{name: default})
    TGRPOConfig(**CPU, beta=0.0, **({} if name == "beta" else {name: default}))
    if (value := other_value(name, default)) is None or name in DONE:
        return
    plain = TGRPOSettings()
    try:
        changed = values_of(**more, **{name: value})
    except ConfigError as error:
        assert str(error).startswith(f"{name} "), error
        return
    assert changed != values_of(**more) or value == getattr(plain, name, None), f"{name} is dropped"


def test_every_field_is_known() -> None:
    """A new version of TRL: put what is new into settings/trl.py, or make it a setting."""
    assert len(trl.GRPOConfig.__annotations__) >= 79
    known = {field.name for field in fields(TGRPOConfig)} | flat_types(own_field_types(TGRPOConfig)).keys()
    _, refused = translated({})
    settings, _ = translated(dict.fromkeys(own_fields()))
    assert not refused and settings.keys() <= known


SERVER = "http://host:8000"


@pytest.mark.parametrize(("recipe", "given", "engine"), [
    ({}, {"use_vllm": "true"}, "vllm"),
    ({}, {"use_vllm": "true", "vllm_mode": "server", "vllm_server_base_url": SERVER}, SERVER),
    ({}, {"vllm_mode": "server", "vllm_server_host": "host"}, SERVER),
    ({}, {"use_vllm": "false", "vllm_server_base_url": SERVER}, "transformers"),
    ({}, {"use_vllm": "true", "vllm_mode": "colocate", "vllm_server_base_url": SERVER}, "vllm"),
    ({"engine": "vllm"}, {"use_vllm": "false"}, "transformers"),
    ({"engine": "vllm"}, {"vllm_mode": "server", "vllm_server_base_url": SERVER}, SERVER),
    ({"engine": SERVER}, {"vllm_mode": "colocate"}, "vllm"),
    ({"use_vllm": True, "vllm_mode": "server"}, {"vllm_server_base_url": SERVER}, SERVER),
    ({"use_vllm": True}, {"engine": "transformers"}, "transformers"),
    ({"engine": "transformers", "use_vllm": True}, {}, "engine is transformers, while .* mean vllm"),
    ({}, {"vllm_mode": "server"}, "vllm_mode is server; name its address"),
    ({}, {"use_vllm": "my.yaml"}, "use_vllm is 'my.yaml'; it must be true or false"),
    ({}, {"engine": "vlm"}, "engine .* is 'vlm'; it must be transformers, vllm or"),
    ({}, {"engine": f"{SERVER}/v1"}, "engine .* give its address, http://host:8000"),
])  # fmt: skip
def test_one_word_for_the_engine(
    recipe: dict[str, Any], given: dict[str, str], engine: str, tmp_path: Path
) -> None:
    """TRL's words are translated; an option decides over a recipe, whichever words the two use."""
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    try:
        found = load_recipe("plan", tmp_path / "my.yaml", given).values()["engine"]
    except ConfigError as error:
        assert re.search(engine, str(error)), error
    else:
        assert found == engine


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"reward_weights": [1.0, 0.5]}, {"reward_weights": [1.0, 0.5]}),
        ({"reward_weights": None, "max_prompt_length": None, "top_p": 1.0, "top_k": 0, "min_p": None},
         {"max_prompt_length": 16384}),
        ({"model_init_kwargs": {"torch_dtype": torch.bfloat16, "attn_implementation": "sdpa"}},
         {"dtype": "bfloat16", "attn_implementation": "sdpa"}),
        ({"model_init_kwargs": {"dtype": "float16"}, "dtype": "float32"}, {"dtype": "float32"}),
        ({"num_completions_to_print": 9, "num_generations": 4}, {"log_rollouts": 3}),
        ({"vllm_max_model_length": 4096, "max_completion_length": 1024}, {"max_prompt_length": 3072}),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 4}, {"gradient_accumulation_steps": 4}),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 2}, {"per_device_train_batch_size": 2}),
        ({"max_tool_calling_iterations": 5}, {"max_looks": 5}),
    ],
)  # fmt: skip
def test_cases_of_trls_forms(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = TGRPOConfig(**CPU, **given)
    assert {name: getattr(config, name) for name in expected} == expected
    text = {name: str(value).replace("torch.", "") for name, value in given.items()}
    values = load_recipe("plan", None, text).values()  # the same words of a command line
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps_per_generation": 2}, "steps_per_generation is 2; each step samples its own .*make it 1 or"),
        ({"generation_batch_size": 8}, "generation_batch_size is 8; .*make it 1 or remove it"),
        ({"shuffle_dataset": False}, "shuffle_dataset is False; there is none: each epoch draws a new order"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, "repetition_penalty is 1.1; .*top_p is 0.9; the sampled"),
        ({"model_init_kwargs": {"revision": "x"}}, "model_init_kwargs has revision; pass a model"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl is true; .*set it to false, or beta 0"),
        ({"learning_rte": 1e-5}, "learning_rte is not a setting of rl; did you mean learning_rate"),
        ({"loss_type": "vespo"}, "loss_type is 'vespo', none of grpo"),
    ],
)
def test_cases_of_refused_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TGRPOConfig(**CPU, **given)
    with pytest.raises(ConfigError):
        load_recipe("plan", None, {name: str(value) for name, value in given.items()})


def test_supervised_training_takes_the_columns_setting_too() -> None:
    assert SFTConfig(**CPU, remove_unused_columns=False).remove_unused_columns is False
    assert SFTConfig(**CPU).remove_unused_columns is False
    with pytest.raises(ConfigError, match="remove_unused_columns is True; the trainers and reward functions"):
        SFTConfig(**CPU, remove_unused_columns=True)


def test_arguments_of_the_trainer() -> None:
    """The positional order is TRL's; what is not taken is refused by a sentence."""
    own = inspect.signature(TGRPOTrainer.__init__).parameters
    theirs = inspect.signature(trl.GRPOTrainer.__init__).parameters
    assert theirs.keys() <= own.keys()
    positional = [name for name, one in own.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)] and positional[-1] == "peft_config"
    for name in ("reward_processing_classes", "quantization_config", "rollout_func", "environment_factory"):
        with pytest.raises(ConfigError, match=f"{name}: "):
            TGRPOTrainer("model", **{name: object()})  # type: ignore[arg-type]


def test_the_page_lists_every_field() -> None:
    page = (Path(__file__).parents[1] / "docs" / "coming-from-trl.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert trl.GRPOConfig.__annotations__.keys() <= listed.keys()
    assert all(listed[name].endswith(said) for name, (_, said) in REFUSED.items() if name in listed)


def test_a_run_says_what_counts() -> None:
    defaults = {field.name: field.default for field in fields(trl.GRPOConfig)}
    theirs = {name: getattr(defaults[name], "value", defaults[name]) for name in DEFAULTS}
    assert theirs == DEFAULTS
    args = TGRPOConfig(**CPU, per_device_train_batch_size=2, gradient_accumulation_steps=3, beta=0.0)
    assert what_counts(args, ["accuracy", "first"]) == (
        "a step: 6 questions × 8 answers; margin (shuffled contrast); rewards: accuracy, first; settings "
        "that differ from TRL's defaults (in brackets): loss_type grpo (dapo), "
        "max_completion_length 768 (512), lr_scheduler_type cosine (linear), weight_decay 0.01 (0.0), "
        "max_grad_norm 5.0 (1.0), "
        "num_train_epochs 1.0 (3.0), gradient_checkpointing False (True)"
    )
    assert "; no temporal rule; rewards: none; " in what_counts(TGRPOConfig(**CPU, temporal_rule="off"), [])


def first(completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def test_cases_of_weights_by_position() -> None:
    settings = TGRPOSettings(reward_weights=[1.0, 0.5], temporal_rule="off")
    assert reward_terms([first, "accuracy"], settings).weights == {"first": 1.0, "accuracy": 0.5}
    assert reward_terms([first, first], settings).weights == {"first": 1.0, "first_2": 0.5}
    with pytest.raises(ConfigError, match=r"reward_weights has 2 weights for 1 rewards \(first\); give one"):
        reward_terms(first, settings)


def test_rewards_by_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a recipe and on the command line: `module:function` and `file.py:function`."""
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "r.yaml").write_text(
        "reward_funcs: [accuracy, mine.py:short, mine:short]\ntemporal_rule: off\n"
    )
    (settings,) = (one for one in load_recipe("plan", "r.yaml").sections if isinstance(one, TGRPOSettings))
    terms = reward_terms(None, settings)
    assert terms.names == ("accuracy", "short", "short_2")
    assert terms.custom["short"](completions=["a", "b"]) == [0.5, 0.5]
    for place in ("mine.py:long", "other.py:short", "nothing:short", "mine:no", "acuracy"):
        with pytest.raises(ConfigError, match=f"reward_funcs.*{place}"):
            TGRPOConfig(**CPU, reward_funcs=[place])
    with pytest.raises(ConfigError, match=r"loss_type: mine.py:long cannot be imported .*KeyError"):
        TGRPOConfig(**CPU, loss_type="mine.py:long")
