"""The hand-over from GPU to GPU, with vLLM's own engine of the trainer's side.

What needs two GPUs is replaced: the group of processes and the broadcast into it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from video_r1.rollout.http_client import ServerFailure
from video_r1.rollout.vllm.hand_over import Copies, NCCLHandOver, SyncClient

pytestmark = pytest.mark.vllm
MODULE = "vllm.distributed.weight_transfer.nccl_engine"


class Group:
    destroyed = 0

    def destroy(self) -> None:
        Group.destroyed += 1


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What is broadcast, a dictionary for each hand-over."""
    engine = importlib.import_module(MODULE)
    found: list[dict[str, Tensor]] = []
    monkeypatch.setattr(engine, "open_trainer_endpoint", lambda info: Group())
    monkeypatch.setattr(
        engine, "packed_nccl_broadcast_producer", lambda iterator, **_: found.append(dict(iterator))
    )
    return found


def test_one_connection_for_all_hand_overs_until_one_fails(sent: list[dict[str, Tensor]]) -> None:
    calls: list[tuple[str, Any]] = []
    broken: list[str] = []

    def call(path: str, body: Any = None) -> None:
        calls.append((path, body))
        if path in broken:
            raise ServerFailure("away")

    hand_over = NCCLHandOver("http://127.0.0.1:8000", workers=2, device="cpu")
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.bfloat16)}
    for version in ("first", "second"):
        hand_over.keep(weights, version)
        hand_over.send(call)
        assert {name: (t.tolist(), t.dtype) for name, t in sent[-1].items()} == {
            name: (t.tolist(), t.dtype) for name, t in weights.items()
        }
        weights = {name: tensor + 1 for name, tensor in weights.items()}
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [path for path, _ in calls] == ["/init_weight_transfer_engine", *update, *update]
    start, described = calls[0][1]["init_info"], calls[2][1]["update_info"]
    assert start["master_address"] == "127.0.0.1" and start["world_size"] == 3 and start["rank_offset"] == 1
    assert described["names"] == ["a", "b"] and described["dtype_names"] == ["float32", "bfloat16"]
    assert described["shapes"] == [[3, 2], [4]]

    calls.clear()
    broken.append("/update_weights")
    with pytest.raises(ServerFailure, match="away"):
        hand_over.send(call)
    assert Group.destroyed == 1
    broken.clear()
    hand_over.send(call)
    assert [path for path, _ in calls][-4:] == ["/init_weight_transfer_engine", *update]
    hand_over.close()
    assert Group.destroyed == 2


def test_the_client_has_what_vllm_calls() -> None:
    base = importlib.import_module("vllm.distributed.weight_transfer.base")
    wanted = {name for name in vars(base.VLLMWeightSyncClient) if not name.startswith("_")}
    assert wanted <= set(vars(SyncClient))


def test_copies_use_their_memory_again() -> None:
    """Contiguous, in the server's number format, and where the weights are: no way through main memory."""
    copies = Copies(on_host=False)
    first = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4)}
    taken = copies.take(first.items(), torch.bfloat16)
    places = {name: tensor.data_ptr() for name, tensor in taken.items()}
    assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for tensor in taken.values())
    second = {name: tensor + 1 for name, tensor in first.items()}
    again = copies.take(second.items(), torch.bfloat16)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places
    assert all(torch.equal(again[name].float(), tensor) for name, tensor in second.items())
    on_meta = Copies(on_host=False).take([("c", torch.ones(2, device="meta"))], torch.float32)
    assert on_meta["c"].device.type == "meta"
    assert Copies(on_host=True).take(first.items(), torch.float32)["a"].device.type == "cpu"
