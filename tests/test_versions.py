"""Untested releases of libraries: a broken fast path gives way, and a broken Trainer is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from group_batches import build, expanded_logprobs, make_prompt, tokens_of
from test_rollout_transformers import PROCESSORS
from transformers import AttentionInterface, vision_utils

from video_r1.errors import ConfigError
from video_r1.models import attention, checked, families, gated_delta, group_forward, onednn
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.engine_factory import in_process_engine
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.shared_prefix import SharedPrefixCache
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.run_trainer import check_replaced
from video_r1.training.tgrpo import TGRPOTrainer
from video_r1.training.trainer import QuestionTrainer

ROW, DECODING = "a group in one row", "decoding over a shared prompt"
Patch = pytest.MonkeyPatch


@pytest.fixture
def newer(monkeypatch: Patch) -> None:
    """As if the installed libraries were newer than all tested ones."""
    monkeypatch.setattr(checked, "NEWEST_TESTED", dict.fromkeys(checked.NEWEST_TESTED, "1.0"))


def no_patched_functions(patch: Patch) -> None:
    patch.setattr(gated_delta, "RULE", "the_rule_by_its_new_name")


def unused_functions(patch: Patch) -> None:
    """The functions are there, but the layers use others."""
    module = gated_delta.import_module(str(families.QWEN3_5.state_functions))
    for name in (gated_delta.CONVOLUTION, gated_delta.RULE):
        function = getattr(module, name)
        patch.setattr(module, name, lambda *args, group_layout=None, f=function, **kw: f(*args, **kw))
    patch.setattr(group_forward, "forking_states", lambda module: nullcontext())


def no_layout(patch: Patch) -> None:
    """Attention functions no longer get the forward's other arguments."""
    plain = AttentionInterface()["sdpa"]
    patch.setitem(AttentionInterface._global_mapping, attention.IMPLEMENTATION, plain)


def swallowed_cache(patch: Patch) -> None:
    """The argument has another name, and the forward ignores what it does not know."""
    named = lambda text, cache: {"cache_of_6": cache, "use_cache": True}  # noqa: E731
    patch.setattr("video_r1.rollout.transformers.with_cache", named)


BROKEN: list[tuple[str, str, Callable[[Patch], object], str, str]] = [
    ("vision", "qwen2_5_vl", lambda p: p.delattr(vision_utils, "get_vision_position_ids"), ROW, "fails with"),
    ("row", "qwen2_5_vl", no_layout, ROW, "is off by"),
    ("functions", "qwen3_5", no_patched_functions, ROW, "has no attribute 'the_rule_by_its_new_name'"),
    ("state", "qwen3_5", unused_functions, ROW, "is off by"),
    ("cache", "qwen3_vl", lambda p: p.delattr(SharedPrefixCache, "update"), DECODING, "fails with Attrib"),
    ("state of cache", "qwen3_5", lambda p: p.delattr(SharedPrefixCache, "update_recurrent_state"), DECODING,
     "fails with Attrib"),
    ("swallowed", "qwen3_vl", swallowed_cache, DECODING, "fails with"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "breaking", "path", "said"), [case[1:] for case in BROKEN],
                         ids=[case[0] for case in BROKEN])  # fmt: skip
def test_a_broken_fast_path_gives_way(
    family: str, breaking: Callable[[Patch], object], path: str, said: str, newer: None,
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Log-probs and rollouts stay right, and one warning names the path and the version."""
    torch.manual_seed(0)
    model, prompt = build(family), make_prompt(family, 5, ("video", (2, 4, 4)), 3)
    completions = tokens_of(4, 7)
    expected, _ = expanded_logprobs(model, prompt, completions, 1.0)
    breaking(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = group_logprobs(model, [prompt], [completions]).logprobs
            engine: Any = in_process_engine(model, PROCESSORS[family])
    torch.testing.assert_close(
        found, expected, atol=0.02, rtol=0
    )  # placeholders have no chance: a little more
    (warning,) = [record.message for record in caplog.records if "plain path" in record.message]
    assert warning.startswith(path) and said in warning
    assert f"transformers {transformers.__version__}" in warning
    assert isinstance(engine, GeneralEngine)
    (group,) = engine.sample([prompt], SamplingSettings(n=2, max_tokens=5, seed=1))
    monkeypatch.undo()
    tokens = [rollout.token_ids for rollout in group]
    sampled = torch.cat([rollout.logprobs for rollout in group])
    torch.testing.assert_close(sampled, expanded_logprobs(model, prompt, tokens, 1.0)[0], atol=0.02, rtol=0)


def test_a_newer_release_that_breaks_nothing(newer: None, caplog: pytest.LogCaptureFixture) -> None:
    for family in ("qwen2_5_vl", "qwen3_5"):
        assert isinstance(in_process_engine(build(family), PROCESSORS[family]), TransformersEngine)
    assert "plain path" not in caplog.text


@pytest.mark.parametrize("name", ["_flash", "_flash_backward"])
def test_torch_without_its_private_attention(
    name: str, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    model, prompt, completions = build("qwen2_5_vl"), make_prompt("qwen2_5_vl", 6), tokens_of(4, 7, 2)
    expected, _ = expanded_logprobs(model, prompt, completions, 1.0)
    monkeypatch.setattr(attention, name, None)
    found = group_logprobs(model, [prompt], [completions]).logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found.sum().backward()
    assert caplog.text.count("the CPU's flash attention fails with TypeError") == 1


def test_torch_without_its_private_linear_layers(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("qwen2_5_vl")
    monkeypatch.setattr(onednn, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    with torch.no_grad(), onednn.onednn_linears(model, 2):
        assert not any("forward" in vars(layer) for layer in model.modules())
    assert caplog.text.count("linear layers through oneDNN fails with TypeError") == 1


@pytest.mark.parametrize(
    ("name", "theirs", "said"),
    [
        ("_save", None, "Trainer._save takes nothing (it is gone)"),
        (
            "log",
            lambda self, logs, start_time, step: None,
            "'step'], its replacement here",
        ),
        ("compute_loss", lambda self, model: None, "Trainer.compute_loss takes ['self', 'model']"),
    ],
)
def test_a_trainer_with_other_methods_is_refused(
    name: str, theirs: Any, said: str, monkeypatch: Patch
) -> None:
    check_replaced(TGRPOTrainer)
    if theirs is None:
        monkeypatch.delattr(transformers.Trainer, name)
    else:
        monkeypatch.setattr(transformers.Trainer, name, theirs)
    with pytest.raises(ConfigError) as refused:
        check_replaced(TGRPOTrainer)
    assert said in str(refused.value) and transformers.__version__ in str(refused.value)


def test_a_users_trainer_may_have_methods_of_its_own() -> None:
    class Mine(TGRPOTrainer):
        def _of_mine(self) -> None: ...
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...  # pyright: ignore

    check_replaced(Mine)
    assert QuestionTrainer in Mine.__mro__
