"""Who takes part: the ranks of a mesh, and whether they share a host."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mixed_attention import ops, torch_internals


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of one process group, seen from this one.

    Attributes:
        group: The process group.
        name: Its name, by which compiled code finds it.
        rank: The place of this process in it.
        size: How many ranks there are.
    """

    group: Any
    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: Any) -> Ranks:
        """The ranks of a mesh of one dimension or of a process group; None stands for all processes.

        Raises:
            RuntimeError: If torch.distributed is not initialised.
            TypeError: If it is neither of these.
            ValueError: If the mesh has several dimensions.
        """
        if isinstance(mesh, DeviceMesh):
            if mesh.ndim != 1:
                names = mesh.mesh_dim_names or ("dp", "cp")
                raise ValueError(
                    f"mesh: expected one dimension, got {mesh.ndim}; take that of the tokens, as mesh[{names[-1]!r}]"
                )
            group: Any = mesh.get_group()
        elif mesh is None or isinstance(mesh, dist.ProcessGroup):
            if not dist.is_initialized():
                raise RuntimeError("torch.distributed is not initialised: call init_process_group, or run by torchrun")
            group = dist.group.WORLD if mesh is None else mesh
        else:
            raise TypeError(f"mesh: expected a DeviceMesh or a process group, got {type(mesh).__name__}")
        return cls(group, group.group_name, group.rank(), group.size())

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a copy of a model is spread over the same ranks

    def all_gather_objects(self, value: Any) -> list[Any]:
        """What every rank passed, in the order of the ranks."""
        every: list[Any] = [None] * self.size
        with torch_internals.without_transforms():
            dist.all_gather_object(every, value, group=self.group)
        return every

    @property
    def kept(self) -> dict[Any, Any]:
        """What was derived from the arguments of calls over these ranks, to look it up again."""
        found = _KEPT.get(self.group)
        if found is None:
            found = _KEPT[self.group] = {}
        return found

    def native(self, sizes: Sequence[Sequence[int]]) -> Any:
        """Where the rows of some groups lie, as C++ takes it; of every group its rows on each rank."""
        return ops.shards(self.name, self.rank, self.share_a_host, sizes)

    @property
    def share_a_host(self) -> bool:
        """Whether all ranks run on one host. The first to ask for a group asks all its ranks, so all must ask."""
        known = _SHARE_A_HOST.get(self.group)
        if known is None:
            known = len(set(self.all_gather_objects(socket.gethostname()))) == 1
            _SHARE_A_HOST[self.group] = known
        return known

    def device_of_words(self) -> torch.device:
        """Where small numbers are exchanged: on the CPU if the group has a backend for it, so that no GPU waits."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        if "cpu" in backends:
            return torch.device("cpu")
        device_type = next(iter(backends))
        return torch.device(device_type, torch.get_device_module(device_type).current_device())


_KEPT: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_SHARE_A_HOST: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
