"""Several processes that share the tokens of every section, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import mixed_attention as ma


class Ranks:
    """The processes of a run, or the one that there is.

    Args:
        size: How many torchrun has started.
        device: Where they compute; of GPUs each takes its own.

    Attributes:
        device: Where this one computes.
        is_first: Whether this one reports and saves.

    Raises:
        ValueError: If there are more or fewer processes.
    """

    def __init__(self, size: int = 1, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.mesh: Any = None
        self.is_first = True
        started = int(os.environ.get("WORLD_SIZE", 1))
        if size != started:
            raise ValueError(
                f"--ranks {size}: {started} processes were started; torchrun --nproc-per-node {size} starts as many"
            )
        if size == 1:
            return
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.mesh = init_device_mesh(self.device.type, (size,), mesh_dim_names=("tokens",))
        self.is_first = dist.get_rank() == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """Spreads the tokens of a model's attention; returns what is to be trained, whose gradients are means."""
        if self.mesh is None:
            return model
        parallelize_module(model, self.mesh, ma.distributed.ContextParallel())
        return nn.parallel.DistributedDataParallel(model)

    def specs(self, groups: Mapping[str, Tensor]) -> list[ma.TokenSpec]:
        """Groups ``(B, n, ...)`` with their sizes on every rank, where the processes share them."""
        specs = [ma.TokenSpec(name, tokens.shape[1]) for name, tokens in groups.items()]
        return specs if self.mesh is None else list(ma.distributed.shard_specs(specs, self.mesh))

    def share(self, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of tokens ``(B, n, ...)`` that is this process's."""
        if self.mesh is None:
            return dict(groups)
        return {name: tokens[:, ma.distributed.share_of(tokens.shape[1], self.mesh)] for name, tokens in groups.items()}

    def whole(self, values: Tensor, specs: list[ma.TokenSpec]) -> Tensor:
        """The values ``(B, n, ...)`` at the tokens of all processes, of those at their shares of some groups."""
        return values if self.mesh is None else ma.distributed.gather(values, specs, mesh=self.mesh)

    def whole_caches(self, caches: Any) -> Any:
        """KV caches of the tokens of all processes."""
        return caches if self.mesh is None else ma.distributed.gather_cache(caches, mesh=self.mesh)

    def stop(self) -> None:
        """Ends what the processes share."""
        if self.mesh is not None:
            # NOTE: threads of gloo give back what the last collective took, for which they want the interpreter. It is
            # theirs while this waits. A group that ends before holds the interpreter and waits for them for ever.
            dist.barrier()
            dist.destroy_process_group()
