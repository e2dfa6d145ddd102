"""A backend "gloo" of vLLM's weight transfer: weights over TCP, to a server on any device.

    trainer: source ─► broadcast from rank 0 ─► every worker of the server: load_weights

vLLM's own backends (nccl, ipc) need GPUs on both sides. This one has their two classes and their handshake.
Importing this module imports vLLM. The plugin in vllm_positions registers the backend in a server's
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

PATIENCE = timedelta(seconds=300)  # of either side for the other one


class Snapshot(WeightSource):
    """Weights by name, moved to `device` one at a time."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.weights, self.device = weights, device

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.items():
            yield name, tensor.to(self.device).contiguous()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer's store listens; world_size counts the trainer and all workers."""

    master_address: str
    master_port: int
    world_size: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What the trainer broadcasts, in its order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """As GlooInitInfo, on the trainer's side; the port is chosen here."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    world_size: int


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The side of a server's worker."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        layout = self.parallel_config
        rank = 1 + layout.data_parallel_index * layout.world_size + layout.rank
        address, port, size = init_info.master_address, init_info.master_port, init_info.world_size
        self.group = ProcessGroupGloo(TCPStore(address, port, size, False, PATIENCE), rank, size, PATIENCE)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which need not exist.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        assert self.group is not None, "init_transfer_engine comes first"
        for name, dtype, shape in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, strict=True
        ):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight, 0).wait()
            cast(Any, self.model).load_weights([(name, weight.to(self.device))])

    def shutdown(self) -> None:
        self.group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's side. Only the sender (rank 0) takes part."""

    init_info_cls = GlooTrainerInitInfo
    store: TCPStore
    group: Any

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: Any, source: WeightSource | None = None
    ) -> GlooTrainerWeightTransferEngine:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        address, size = init_info.master_address, init_info.world_size
        engine.store = TCPStore(address, 0, size, True, PATIENCE, wait_for_workers=False)
        info = GlooInitInfo(address, engine.store.port, size)
        with ThreadPoolExecutor(1) as pool:  # the workers wait for this side, and this side for them
            future = pool.submit(client.init_weight_transfer_engine, asdict(info))
            engine.group = ProcessGroupGloo(engine.store, 0, size, PATIENCE)
            future.result()
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        info = GlooUpdateInfo(
            [entry.name for entry in meta],
            [str(entry.dtype).removeprefix("torch.") for entry in meta],
            [list(entry.shape) for entry in meta],
        )
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(self.client.update_weights, asdict(info))
            for _, tensor in self.source:
                if future.done():
                    break  # refused, or the server is gone
                self.group.broadcast(tensor, 0).wait()
            future.result()
        finally:
            pool.shutdown(wait=False)  # after an error here, the request goes on until its own time limit
        self.client.finish_weight_update()


def register() -> None:
    """Makes the backend known to this process's vLLM. Doing so again changes nothing."""
    from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)
