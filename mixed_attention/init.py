"""The initial weights of the layers."""

from __future__ import annotations

from torch import nn


def init_weights(module: nn.Module, mode: str) -> None:
    """Fills the weights and biases of a layer, in the order in which they were constructed.

    Seeded runs are compared, so the random numbers are drawn as upstream draws them: one truncated normal per weight.

    Args:
        module: A layer; its output projection is ``module.proj``.
        mode: See :class:`mixed_attention.spec.DotProductAttentionConfig`.

    Raises:
        NotImplementedError: If the mode is known but no module implements it.
    """
    if mode == "torch":
        return
    if mode not in ("truncnormal", "truncnormal002", "truncnormal002-identity"):
        raise NotImplementedError(f"init_weights {mode!r} is not implemented")
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)
    if mode == "truncnormal002-identity":  # drawn all the same
        nn.init.zeros_(module.get_parameter("proj.weight"))
