"""Context parallelism as a style of ``torch.distributed.tensor.parallel``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.sharding import TokenSharding
from mixed_attention.layers import ProjectedAttention


class ContextParallel(ParallelStyle):
    """Spreads the tokens of attention layers over the ranks of a mesh.

    A layer is then called with the tokens of its rank, and returns the outputs of these. Keys and values of the groups
    that somebody attends to are brought together from all ranks; all others stay where they are. Sizes may differ from
    rank to rank. They are known where the specs know them (:func:`shard_specs`, :func:`exchange_specs`) or are promised
    to be even; else every call asks the other ranks, and compares what must be the same on all.

    Parameters are whole on every rank, and their gradients are parts of sums over the ranks: data parallelism over the
    same ranks adds them up. All ranks call forward and backward in the same order, also without tokens.

    Args:
        replicated: Names of groups that every rank holds whole; ``"q"`` and ``"kv"`` are those of a Perceiver layer,
            ``"x"`` that of a dense one.
        even: A promise that every rank holds as many tokens of every group: nothing is exchanged.

    Example:
        One style for a whole model, or for some of its layers by name::

            mesh = init_device_mesh("cuda", (dp, cp), mesh_dim_names=("dp", "cp"))
            parallelize_module(model, mesh["cp"], ma.distributed.ContextParallel())
            parallelize_module(model, mesh["cp"], {"blocks.*": ma.distributed.ContextParallel(replicated=["kv"])})
    """

    def __init__(self, *, replicated: Collection[str] = (), even: bool = False) -> None:
        super().__init__()
        if isinstance(replicated, str) or not all(isinstance(name, str) for name in replicated):
            raise ValueError(f"replicated: expected a list of names of token groups, got {replicated!r}")
        self.replicated = frozenset(replicated)
        self.even = bool(even)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers = [layer for layer in module.modules() if isinstance(layer, ProjectedAttention)]
        if not layers:
            raise ValueError(f"ContextParallel: no attention layer of this package in the {type(module).__name__}")
        ranks = Ranks.of(device_mesh)
        self._compare(ranks, [type(layer).__name__ for layer in layers])
        sharding = TokenSharding(device_mesh, ranks, self.replicated, self.even)
        for layer in layers:
            layer.token_sharding = sharding
        return module

    def _compare(self, ranks: Ranks, layers: list[str]) -> None:
        """Makes sure that all ranks mark the same layers alike, and finds out whether these are of one host."""
        mine: dict[str, Any] = {"layers": layers, "replicated": sorted(self.replicated), "even": self.even}
        every = ranks.all_gather_objects(mine)
        ranks.share_a_host  # noqa: B018
        for name in mine:
            if any(other[name] != every[0][name] for other in every):
                values = ", ".join(f"{other[name]} on rank {rank}" for rank, other in enumerate(every))
                raise ValueError(f"ContextParallel: expected the same {name} on all ranks, got {values}")

    def __repr__(self) -> str:
        return f"ContextParallel(replicated={sorted(self.replicated)}, even={self.even})"
