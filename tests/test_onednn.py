"""Linear layers through oneDNN: the same results, the layers that are meant, the model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rollout_transformers import build_model, build_prompts, reference_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from video_r1.models import onednn

ROWS = 10**5  # so many that no layer is too small

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


class OneDnnCalls(TorchDispatchMode):
    """Counts products through oneDNN, and those with a weight in an arrangement of oneDNN's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.arranged = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.calls += 1
            self.arranged += args[1].is_mkldnn
        return func(*args, **(kwargs or {}))


def linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module) is torch.nn.Linear]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "copied"), [("qwen2_5_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", True), ("qwen3_5", True)]
)
def test_same_logits(family: str, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(onednn, "MOST_ARRANGED_BYTES", 2**30 if copied else 0)
    model, inputs = build_model(family).eval(), reference_inputs(build_prompts(family)[0])
    expected = model(**inputs).logits
    with onednn.onednn_linears(model, 8), OneDnnCalls() as seen:
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    text = len(linears(model.model.language_model)) + 1
    assert seen.calls == text + len(linears(model.model.visual)) + 1  # the head; the patches' convolution
    assert seen.arranged == (text if copied else 0)
    with OneDnnCalls() as after:
        assert torch.equal(model(**inputs).logits, expected)
    assert after.calls == 0


@torch.no_grad()
def test_small_products_stay_with_torch() -> None:
    model, inputs = build_model("qwen2_5_vl").eval(), reference_inputs(build_prompts("qwen2_5_vl")[1])
    weights = max(layer.weight.numel() for layer in linears(model))
    with onednn.onednn_linears(model, onednn.LEAST_PRODUCTS // weights - 1), OneDnnCalls() as seen:
        model(**inputs)  # no layer is large enough
    assert seen.calls == 0
    layer, rows = torch.nn.Linear(512, 256), onednn.LEAST_PRODUCTS // (512 * 256)
    model.set_output_embeddings(layer)
    with onednn.onednn_linears(model, ROWS), OneDnnCalls() as seen:
        layer(torch.randn(rows - 1, 512))
        assert seen.calls == 0
        layer(torch.randn(rows, 512))
        assert seen.calls == 1


@torch.no_grad()
@pytest.mark.parametrize("what", ["autocast", "bfloat16", "own forward"])
def test_other_layers_stay_as_they_are(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST_PRODUCTS", 1)
    model, inputs = build_model("qwen2_5_vl").eval(), reference_inputs(build_prompts("qwen2_5_vl")[0])
    if what == "bfloat16":
        model.to(torch.bfloat16)
    if what == "own forward":
        for layer in [*linears(model), model.model.visual.patch_embed.proj]:
            layer.forward = layer.forward
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"),
        onednn.onednn_linears(model, ROWS),
        OneDnnCalls() as seen,
    ):
        model(**inputs)
    assert seen.calls == 0
    assert all(("forward" in vars(layer)) == (what == "own forward") for layer in linears(model))
