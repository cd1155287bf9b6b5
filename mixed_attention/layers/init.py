"""The initial weights of the layers."""

from __future__ import annotations

from functools import partial

from torch import nn


def init_weights(module: nn.Module, mode: str) -> None:
    """Fills the weights and biases of a layer, in the order in which they were constructed.

    Seeded runs are compared, so the random numbers are drawn as upstream draws them: one truncated normal per weight.

    Args:
        module: A layer; its output projection is ``module.proj``.
        mode: See :class:`mixed_attention.config.DotProductAttentionConfig`.

    Raises:
        NotImplementedError: If the mode is known but no module implements it.
    """
    if mode == "torch":
        return
    if mode not in ("truncnormal", "truncnormal002", "truncnormal002-identity"):
        raise NotImplementedError(f"init_weights {mode!r} is not implemented")
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        is_zero = mode == "truncnormal002-identity" and name == "proj"
        _fill(child, is_zero)
        # NOTE: deferred initialisation calls the reset_parameters of every module, parents first, or those of modules
        # with parameters of their own alone. So that of a projection has to know the mode. It is set on the object,
        # because projections are to be nn.Linear itself, as adapters and quantisation expect.
        child.reset_parameters = partial(_fill, child, is_zero)  # type: ignore[assignment]


def _fill(projection: nn.Module, is_zero: bool) -> None:
    """Draws weights of standard deviation 0.02 and zeroes biases; weights that shall be zero are drawn all the same."""
    for parameter in projection.parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
            if is_zero:
                nn.init.zeros_(parameter)
        else:
            nn.init.zeros_(parameter)
