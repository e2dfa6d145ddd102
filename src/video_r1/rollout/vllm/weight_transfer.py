"""A backend "tcp" of vLLM's weight transfer: weights over sockets, to a server on any device.

    trainer: source ─► a stream of bytes to every worker of the server ─► load_weights

vLLM's own backends (nccl, ipc) need GPUs on both sides. This one has their two classes and their handshake.
A side that fails closes its stream, so that the other one fails at once and does not wait.
Importing this module imports vLLM. The plugin in vllm_positions registers the backend in a server's
processes.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
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

PATIENCE = 300.0  # seconds, of either side for the other one


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
class TCPInitInfo(WeightTransferInitInfo):
    """Where the trainer listens."""

    master_address: str
    master_port: int


@dataclass
class TCPUpdateInfo(WeightTransferUpdateInfo):
    """What the trainer sends, in its order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class TCPTrainerInitInfo(TrainerInitInfo):
    """The trainer's own address, and how many workers will call it."""

    backend: ClassVar[str] = "tcp"

    master_address: str
    workers: int


class TCPWeightTransferEngine(WeightTransferEngine[TCPInitInfo, TCPUpdateInfo]):
    """The side of a server's worker."""

    init_info_cls = TCPInitInfo
    update_info_cls = TCPUpdateInfo
    stream: socket.socket | None = None

    def init_transfer_engine(self, init_info: TCPInitInfo) -> None:
        self.shutdown()
        self.stream = socket.create_connection((init_info.master_address, init_info.master_port), PATIENCE)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which need not exist.
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.shutdown()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: TCPUpdateInfo) -> None:
        assert self.stream is not None, "init_transfer_engine comes first"
        for name, dtype, shape in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, strict=True
        ):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            missing = as_bytes(weight)
            while missing:
                count = self.stream.recv_into(missing)
                if not count:
                    raise ConnectionError("the trainer has closed the stream of weights")
                missing = missing[count:]
            cast(Any, self.model).load_weights([(name, weight.to(self.device))])

    def shutdown(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class TCPTrainerWeightTransferEngine(TrainerWeightTransferEngine[TCPTrainerInitInfo]):
    """The trainer's side. Only the sender (rank 0) takes part."""

    init_info_cls = TCPTrainerInitInfo
    streams: list[socket.socket]

    @classmethod
    def trainer_init(
        cls, init_info: TCPTrainerInitInfo, *, client: Any, source: WeightSource | None = None
    ) -> TCPTrainerWeightTransferEngine:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        with socket.create_server(("", 0), backlog=init_info.workers) as door:
            info = TCPInitInfo(init_info.master_address, door.getsockname()[1])
            client.init_weight_transfer_engine(asdict(info))  # answers when all workers have called
            door.settimeout(PATIENCE)
            engine.streams = [door.accept()[0] for _ in range(init_info.workers)]
        for stream in engine.streams:
            stream.settimeout(PATIENCE)
        return engine

    def send_weights(self) -> None:
        """Raises OSError when a stream breaks, and what the client raises."""
        assert self.source is not None
        meta = self.source.metadata()
        info = TCPUpdateInfo(
            [entry.name for entry in meta],
            [str(entry.dtype).removeprefix("torch.") for entry in meta],
            [list(entry.shape) for entry in meta],
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(self.client.update_weights, asdict(info)), pool.submit(self._send)]
            wait(both, return_when=FIRST_EXCEPTION)
            if not all(future.done() for future in both):
                self.shutdown()  # the one has failed: the other one has nothing to wait for
            for future in both:
                future.result()
        self.client.finish_weight_update()

    def _send(self) -> None:
        assert self.source is not None
        for _, tensor in self.source:
            for stream in self.streams:
                stream.sendall(as_bytes(tensor))

    def shutdown(self) -> None:
        for stream in self.streams:
            try:
                stream.shutdown(socket.SHUT_RDWR)  # ends a call that another thread is in
            except OSError:
                pass  # the other side was faster
            stream.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any type."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def register() -> None:
    """Makes the backend known to this process's vLLM. Doing so again changes nothing."""
    from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    if "tcp" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("tcp", TCPWeightTransferEngine)
        WeightTransferTrainerFactory.register_engine("tcp", TCPTrainerWeightTransferEngine)
