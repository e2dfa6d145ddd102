"""How trained weights reach a server: through a folder that both see, or from GPU to GPU.

Both keep the present weights, so that a server that comes back can be handed them again.
"""

from __future__ import annotations

import shutil
import socket
import threading
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from video_r1.chat_client import ServerFailure, ServerRefusal
from video_r1.files import follow_umask
from video_r1.models.families import find_family
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import EXPERTS
from video_r1.models.lora import adapted_name, dense_weight, is_four_bit, merged_weight, whole

HEAD = "lm_head.weight"

Call = Callable[..., Any]
"""Posts to the server: `call(path, body=None)` returns its answer."""


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model inside DDP, FSDP2 and PEFT by its plain name, as a published checkpoint has
    it; detached, 4 bits in full.

    The head is always among them. A model that ties it to the embedding saves no head, and vLLM would keep
    the old one without an error. Adapters are added to copies of their weights, W + s·B·A, layer by layer:
    the model itself is left as it is (merging and unmerging it in place would round its weights).
    """
    inner = vision_language_model(model)
    layers = dict(inner.named_modules())
    merged = {
        f"{_without_layers(name)}.{adapted_name(layer)}": layer
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }
    small = {f"{_without_layers(name)}.weight": layer for name, layer in layers.items() if is_four_bit(layer)}
    family = find_family(inner)
    turned = EXPERTS if family is not None and family.transposed_experts else ()
    names = set()
    # state_dict() would share out again what FSDP2 has gathered
    for name, parameter in inner.named_parameters():
        plain = _plain_name(name)
        if plain is None:
            continue
        names.add(plain)
        if plain in merged:
            tensor = merged_weight(merged[plain])
        elif plain in small:
            tensor = dense_weight(small[plain])
        else:
            tensor = whole(parameter)
        yield plain, tensor.transpose(1, 2) if plain.endswith(turned) else tensor
    if HEAD not in names:
        yield HEAD, whole(inner.get_output_embeddings().weight)


def _plain_name(name: str) -> str | None:
    """The name without PEFT's parts; None for a tensor that only PEFT has."""
    if ".lora_" in name or ".original_module." in name:
        return None
    if ".modules_to_save." in name:
        before, after = name.split(".modules_to_save.")
        return f"{before}.{after.split('.', 1)[1]}"
    return _without_layers(name)


def _without_layers(name: str) -> str:
    """Without PEFT's wrappers, of which the experts of a layer may have several."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


# ---- Their way to a server


class Copies:
    """Copies of weights by name in main memory, which later copies use again; pinned where a GPU fills it."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def take(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights, contiguous and in this number format; they replace those of the call before."""
        for name, tensor in weights:
            if name not in self.memory:
                self.memory[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
            self.memory[name].copy_(tensor.to(dtype), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self.memory)


class FolderHandOver:
    """Writes a checkpoint's weights into `folder`, which the server sees under the same path."""

    def __init__(self, folder: Path) -> None:
        self.copies = Copies()
        self.folder = folder
        self.close = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.current = folder

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        """The weights from now on, no two of which share memory; None where only the version is named."""
        before, self.current = self.current, self.folder / version
        if weights is None:
            return
        self.current.mkdir(parents=True)
        save_file(dict(weights), self.current / "model.safetensors")
        follow_umask(self.current)
        if before != self.folder:
            shutil.rmtree(before, ignore_errors=True)

    def send(self, call: Call, served: str) -> None:
        """Gives them to the server, which is paused. served: the version that it has until then, whatever it
        is. Raises ServerFailure and ServerRefusal.
        """
        kwargs = {"weights_path": str(self.current)}
        call("/collective_rpc", {"method": "take_weights", "kwargs": kwargs})


class NCCLHandOver:
    """Sends the weights from GPU to GPU, through vLLM's weight transfer.

    url: the server's address; workers: its processes with a GPU; device: this process's GPU; limit: seconds
    for connecting, and for one transfer. The present weights wait in main memory, in the server's number
    format. Each `send` after a failure, or to a server that has come back, makes a new connection.
    """

    def __init__(self, url: str, workers: int, device: str, limit: float) -> None:
        self.copies = Copies()
        self.url, self.workers, self.device, self.limit = url, workers, torch.device(device), limit
        self.weights: Mapping[str, Tensor] = {}
        self.version = self.sent = ""  # of these weights, and of those that the connected server took last
        self.engine: Any = None

    def keep(self, weights: Mapping[str, Tensor] | None, version: str) -> None:
        self.weights, self.version = {} if weights is None else weights, version

    def send(self, call: Call, served: str) -> None:
        """As FolderHandOver.send."""
        if served != self.sent:  # the connection is to processes that have ended
            self.close()
        try:
            if self.engine is None:
                client = SyncClient(call)
                self.engine = self.settled(client.under_way, lambda: self.connect(client))
            self.engine.client.under_way = under_way = Future()
            self.settled(under_way, self.engine.send_weights)
        except BaseException as error:  # whatever it was, Ctrl-C too: half-used connections are of no use
            self.close()
            if isinstance(error, (OSError, RuntimeError)):  # NCCL says with the latter that one side is gone
                raise ServerFailure(f"the transfer of weights broke off: {error}") from error
            raise
        self.sent = self.version

    def settled(self, under_way: Future[Any], work: Callable[[], Any]) -> Any:
        """What `work` returns; raises what ends it first: its own error, that of a route, or the limit.

        In a thread of its own: NCCL waits without end for a server that has died, until `close` aborts it.
        """

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                settle(under_way, work())
            except BaseException as error:
                settle(under_way, error)

        threading.Thread(target=run, name="weights", daemon=True).start()
        try:
            return under_way.result(self.limit)
        except BaseException as error:
            if not under_way.done():
                settle(under_way, error)  # nothing more is asked of the server
                if isinstance(error, TimeoutError):
                    raise ServerFailure(f"it had not taken the weights after {self.limit:g} s") from error
            raise

    def connect(self, client: SyncClient) -> Any:
        """vLLM's engine of the trainer's side, connected with all workers."""
        from vllm.distributed.weight_transfer import base  # pyright: ignore[reportMissingImports]
        from vllm.distributed.weight_transfer import nccl_engine as nccl  # pyright: ignore[reportMissingImports]

        hand_over = self

        class Present(base.WeightSource):
            """The weights of the moment."""

            def metadata(self) -> list[Any]:
                weights = hand_over.weights.items()
                return [base.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for name, tensor in hand_over.weights.items():
                    yield name, tensor.to(hand_over.device)

        info = nccl.NCCLTrainerInitInfo(local_address(self.url), free_port(), 1 + self.workers, rank=0)
        engine = nccl.NCCLTrainerWeightTransferEngine
        return engine.trainer_init(info, client=client, source=Present())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None


HandOver = FolderHandOver | NCCLHandOver


class SyncClient:
    """vLLM's control of a weight transfer, over the server's routes.

    under_way: what is being done; the first route that fails ends it, and no other is asked after its end.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.under_way: Future[Any] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        try:
            self.call("/start_weight_update")
        except (ServerFailure, ServerRefusal) as failure:
            if "already active" not in str(failure):
                raise
            self._post("/finish_weight_update", {"weight_version": None})  # one that broke off
            self._post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version})

    def _post(self, path: str, body: Any = None) -> None:
        if self.under_way.done():
            raise ServerFailure("the transfer of weights was given up")
        try:
            self.call(path, body)
        except BaseException as error:
            settle(self.under_way, error)
            raise


def settle(under_way: Future[Any], outcome: Any) -> None:
    """Ends it with a result or an exception, unless something else has ended it."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            under_way.set_exception(outcome)
        else:
            under_way.set_result(outcome)


def local_address(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
