"""The hand-over from GPU to GPU, with vLLM's own engine of the trainer's side.

What needs two GPUs is replaced: the group of processes and the broadcast into it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from video_r1.chat_client import ServerFailure
from video_r1.rollout.vllm.weight_sync import Copies, NCCLSync, SyncClient

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


def test_one_connection_for_all_syncs_until_one_fails(sent: list[dict[str, Tensor]]) -> None:
    calls: list[tuple[str, Any]] = []
    broken: list[str] = []

    def call(path: str, body: Any = None) -> None:
        calls.append((path, body))
        if path in broken:
            raise ServerFailure("away")

    sync, served = over_nccl(), "first weights"
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.bfloat16)}
    for version in ("first", "second"):
        sync.keep(weights, version)
        sync.send(call, served)
        served = version
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
        sync.send(call, served)
    assert Group.destroyed == 1
    broken.clear()
    sync.send(call, served)
    assert [path for path, _ in calls][-4:] == ["/init_weight_transfer_engine", *update]
    sync.close()
    assert Group.destroyed == 2


def over_nccl(limit: float = 60.0) -> NCCLSync:
    Group.destroyed = 0
    sync = NCCLSync("http://127.0.0.1:8000", workers=2, device="cpu", limit=limit)
    sync.keep({"a": torch.ones(2)}, "ours")
    return sync


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """What waits as NCCL does for a process that has died; a thread is left in it until the test's end."""
    over = threading.Event()

    def wait(*_: Any, **__: Any) -> None:
        over.wait()

    engine = importlib.import_module(MODULE)
    monkeypatch.setattr(engine, "open_trainer_endpoint", lambda info: Group())
    monkeypatch.setattr(engine, "packed_nccl_broadcast_producer", wait)
    yield wait
    over.set()


def test_a_transfer_that_does_not_end_is_given_up(waits: Callable[..., None]) -> None:
    """Nor does it ask anything of the server, if it ends after all."""
    paths: list[str] = []
    sync = over_nccl(limit=0.5)
    with pytest.raises(ServerFailure, match=r"not taken the weights after 0\.5 s"):
        sync.send(lambda path, body=None: paths.append(path), "first weights")
    assert paths[-1] == "/update_weights" and Group.destroyed == 1
    client = SyncClient(lambda path, body=None: paths.append(path))
    client.transfer.set_exception(TimeoutError())
    with pytest.raises(ServerFailure, match="given up"):
        client.finish_weight_update()
    assert paths[-1] == "/update_weights"


def test_an_update_that_broke_off_is_ended_before_the_next(sent: list[dict[str, Tensor]]) -> None:
    paths: list[str] = []

    def call(path: str, body: Any = None) -> None:
        paths.append(path)
        if path == "/start_weight_update" and "/finish_weight_update" not in paths:
            raise ServerFailure("HTTP 500: start_weight_update called while one is already active.")

    over_nccl().send(call, "first weights")
    start, finish = "/start_weight_update", "/finish_weight_update"
    assert paths[1:] == [start, finish, start, "/update_weights", finish] and len(sent) == 1


def test_the_client_has_what_vllm_calls() -> None:
    base = importlib.import_module("vllm.distributed.weight_transfer.base")
    wanted = {name for name in vars(base.VLLMWeightSyncClient) if not name.startswith("_")}
    assert wanted <= set(vars(SyncClient))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_copies_use_their_memory_again(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous, in the server's number format, and in one block of memory of their size."""
    pinned: dict[int, int] = {}  # size of each registered block by its address
    if on_gpu:
        cuda = SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: pinned.update({address: size}),
            cudaHostUnregister=pinned.pop,
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copies = Copies()
    first = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4)}
    taken = copies.take(first.items(), torch.bfloat16)
    places = {name: tensor.data_ptr() for name, tensor in taken.items()}
    assert pinned == ({places["a"]: 2 * 10} if on_gpu else {})
    assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for tensor in taken.values())
    second = {name: tensor + 1 for name, tensor in first.items()}
    again = copies.take(second.items(), torch.bfloat16)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places
    assert all(torch.equal(again[name].float(), tensor) for name, tensor in second.items())
    del copies
    assert not pinned
