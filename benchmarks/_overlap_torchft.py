"""torchft's DiLoCo inside a Trainer, as a peer in ``co2_overlap.py``. It is imported only where torchft can be."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from typing_extensions import override

__all__ = ["TorchftDiLoCo"]

_LONG = timedelta(seconds=300)


class TorchftDiLoCo(Callback):
    """Wraps fit in torchft's context manager, each worker a replica group of its own, as its example does.

    Worker 0 also runs the Lighthouse server that torchft's managers ask for a quorum.

    Args:
        tau: Steps between exchanges.
        delay: Steps that an exchange may take in the background (``fragment_sync_delay``).
    """

    def __init__(self, tau: int, delay: int) -> None:
        self.tau, self.delay = tau, delay

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, trainer.optimizers[0])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._context.__exit__(None, None, None)
        dist.barrier()  # the server has to outlive the other worker's manager
        self._manager.shutdown(wait=False)
        self._group.shutdown()
        if self._server is not None:
            self._server.shutdown()

    def _begin(self, pl_module: LightningModule, inner: Any) -> None:
        rank, address = int(os.environ["NODE_RANK"]), os.environ["WORKER_ADDRESS"]
        self._server = LighthouseServer(bind="0.0.0.0:0", min_replicas=2, join_timeout_ms=1000) if rank == 0 else None
        port = torch.tensor([int(self._server.address().rpartition(":")[2]) if self._server is not None else 0])
        dist.broadcast(port, 0)
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self._group = ProcessGroupGloo(timeout=_LONG)
        self._manager = Manager(
            pg=self._group,
            load_state_dict=pl_module.load_state_dict,
            state_dict=pl_module.state_dict,
            min_replica_size=2,
            use_async_quorum=False,
            init_sync=False,  # the same seed made both models
            timeout=_LONG,
            quorum_timeout=_LONG,
            rank=0,
            world_size=1,
            store_addr=address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{int(port)}",
            replica_id=f"worker{rank}",
            hostname=address,
        )
        outer = torch.optim.SGD(pl_module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        fragments = [pl_module]
        self._context = DiLoCo(
            self._manager, fragments, inner, outer, sync_every=self.tau, fragment_sync_delay=self.delay
        )
        self._context.__enter__()
