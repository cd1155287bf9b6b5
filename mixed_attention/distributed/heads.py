"""Tensor parallelism of attention layers: heads spread over ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from mixed_attention.distributed.ranks import Ranks
from mixed_attention.eager.projection import is_plain
from mixed_attention.layers import ProjectedAttention, init


class HeadParallel(ParallelStyle):
    """Spreads the heads of attention layers over the ranks of a mesh, whatever their parameter layout.

    Packed projections are split into separate ones, in place: a plain shard of their rows would cut across q, k and v.
    Then q, k and v become ``ColwiseParallel`` and the output projection ``RowwiseParallel``, as torch has them. Tokens
    go in whole on every rank, and come out so. Checkpoints of either layout still load; make optimisers afterwards.

    Example::

        parallelize_module(model, mesh["tp"], {"blocks.*.attention": ma.distributed.HeadParallel()})
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers = [layer for layer in module.modules() if isinstance(layer, ProjectedAttention)]
        if not layers:
            raise ValueError(f"HeadParallel: no attention layer of this package in the {type(module).__name__}")
        size = Ranks.of(device_mesh).size
        for layer in layers:
            _check(layer, size)
        for layer in layers:
            _split_projections(layer)
            plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in layer.projections}
            parallelize_module(layer, device_mesh, {**plan, "proj": RowwiseParallel()})
        return module


def _check(layer: ProjectedAttention, size: int) -> None:
    kind = type(layer).__name__
    if layer.num_heads % size:
        raise ValueError(
            f"HeadParallel: {layer.num_heads} heads of a {kind} cannot be shared equally by {size} ranks; use a mesh "
            "whose size divides them, or spread tokens with ContextParallel"
        )
    if layer.qk_norm == "affine" and size > 1:
        raise NotImplementedError(
            f"HeadParallel: a {kind} with qk_norm='affine' has weights that all heads share, whose gradients no rank "
            "has whole; use qk_norm=True, or spread tokens with ContextParallel"
        )
    for name in (*layer.projections, "proj"):
        if not is_plain(getattr(layer, name)):
            raise ValueError(
                f"HeadParallel: {name} of a {kind} is more than a weight and a bias (hooks, adapters, per-domain or "
                "sharded weights), and cannot be split"
            )


def _split_projections(layer: Any) -> None:
    """Replaces packed projections by one for each slot, with the same rows."""
    split: dict[str, nn.Module] = {}
    for name in layer.projections:
        packed = getattr(layer, name)
        split.update({name: packed} if len(name) == 1 else zip(name, _rows_of_slots(packed, len(name))))
        del layer._modules[name]
    layer._modules = {**split, **layer._modules}
    layer.projections = tuple(split)


def _rows_of_slots(packed: Any, count: int) -> list[nn.Linear]:
    """Linear layers of equal shares of the rows."""
    layers = []
    biases = [None] * count if packed.bias is None else packed.bias.detach().chunk(count)
    for weight, bias in zip(packed.weight.detach().chunk(count), biases):
        rows, columns = weight.shape
        layer: Any = torch.nn.utils.skip_init(nn.Linear, columns, rows, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.clone(), packed.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), packed.bias.requires_grad)
        if "reset_parameters" in vars(packed):
            layer.reset_parameters = partial(init._fill, layer, False)
        layers.append(layer.train(packed.training))
    return layers
