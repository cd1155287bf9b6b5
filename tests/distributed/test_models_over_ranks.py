"""Models of these layers in what torch has for several processes: DDP, FSDP2, distributed checkpoints."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layers import Scene, make_layer, make_x
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import mixed_attention as ma

SCENE = Scene({"a": 12, "b": 7}, [(["a", "b"], ["a"])])
LAYOUTS = {"fused": ma.MixedAttention, "separate": ma.noether.MixedAttention}
DDP = nn.parallel.DistributedDataParallel


class Model(nn.Module):
    """Two layers, of which a call may leave out the second."""

    def __init__(self, layout: str = "fused", scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layer(LAYOUTS[layout]) for _ in range(2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(scale)

    def forward(self, x: torch.Tensor, scene: Scene = SCENE, count: int = 2) -> torch.Tensor:
        for layer in self.layers[:count]:
            out = layer(x, scene.specs, scene.patterns)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def sharded(model: Model, mesh) -> Model:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ------------------------------------------------------------------------------------------ data parallelism

OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "view": {"gradient_as_bucket_view": True},
    "static view": {"static_graph": True, "gradient_as_bucket_view": True},
}


def samples_over_ranks(mesh, options: str) -> None:
    """Ranks of other token counts, one of an empty group, and a layer that nobody uses on the last rank."""
    skips = "find_unused_parameters" in OPTIONS[options]
    scenes = [Scene({"a": 5 + 3 * rank, "b": 2 * rank}, SCENE.attends) for rank in range(mesh.size())]
    counts = [1 if skips and rank == mesh.size() - 1 else 2 for rank in range(mesh.size())]
    alone = Model()
    losses = [alone(make_x(scene), scene, count).square().mean() for scene, count in zip(scenes, counts)]
    expected = torch.autograd.grad(sum(losses) / mesh.size(), list(alone.parameters()))
    model = Model()
    wrapped, rank = DDP(model, process_group=mesh.get_group(), **OPTIONS[options]), mesh.get_local_rank()
    for steps in (1, 2):  # the second in two halves, of which the first is not averaged yet
        model.zero_grad()
        for step in range(steps):
            keeps = step < steps - 1 and options != "static"
            with wrapped.no_sync() if keeps else contextlib.nullcontext():
                (wrapped(make_x(scenes[rank]), scenes[rank], counts[rank]).square().mean() / steps).backward()
        if options == "static":
            break
        for parameter, wanted in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_over_ranks(ranks, options):
    ranks.run(2, samples_over_ranks, options)


# ------------------------------------------------------------------------------------------ second derivatives


def second_derivative_in_shards(mesh) -> str:
    """The message of torch, which frees the weights of shards after the first backward."""
    x = make_x(SCENE).detach().requires_grad_()
    try:
        (grad,) = torch.autograd.grad(sharded(Model(), mesh)(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing"


def test_second_derivatives_in_shards(ranks):
    for message in ranks.run(2, second_derivative_in_shards):
        assert "storage" in message


# ------------------------------------------------------------------------------------------ checkpoints


def checkpoints(mesh, folder: str) -> list[str]:
    group, x = mesh.get_group(), make_x(SCENE)
    source = Model()
    expected = source(x)
    dcp.save(get_model_state_dict(sharded(Model(), mesh)), checkpoint_id=folder, process_group=group)
    for target in (Model(scale=0.5), sharded(Model(scale=0.5), mesh)):
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_model_state_dict(target, state)
        assert torch.equal(target(x), expected)
    # Shards of one layout go into the other, and so does a whole state dict that was converted.
    for layout, other in (("fused", "separate"), ("separate", "fused")):
        given, target = Model(layout), sharded(Model(other, scale=0.5), mesh)
        given.load_state_dict(source.state_dict())
        target.load_state_dict(sharded(given, mesh).state_dict())
        torch.testing.assert_close(target(x), expected, rtol=0, atol=1e-12)
    target = sharded(Model("separate", scale=0.5), mesh)
    converted = ma.checkpoint.convert_state_dict(source.state_dict(), layout="separate")
    set_model_state_dict(target, converted, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(target(x), expected, rtol=0, atol=1e-12)
    # torch looks at names before anybody can adapt them.
    messages = []
    target = sharded(Model("separate"), mesh)
    for load in (
        lambda: dcp.load(get_model_state_dict(target), checkpoint_id=folder, process_group=group),
        lambda: set_model_state_dict(target, dict(source.state_dict()), options=StateDictOptions(full_state_dict=True)),
    ):
        try:
            load()
        except (CheckpointException, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_checkpoints_between_layouts_and_shards(ranks, tmp_path):
    for messages in ranks.run(2, checkpoints, str(tmp_path)):
        of_load, of_set = messages
        assert "Missing key" in of_load and "key(s) in state_dict" in of_set, messages
