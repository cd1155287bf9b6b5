"""What must work in an environment where the package was just installed: ``python release_smoke.py VERSION``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mixed_attention as ma


def main(version: str) -> None:
    """Compares a forward and a backward of the compiled kernels with the reference; raises where something is wrong."""
    package = Path(ma.__file__).parent
    assert Path(sys.prefix) in package.parents, f"{package} is not the package installed in {sys.prefix}"
    assert ma.__version__ == version, f"installed {ma.__version__}, expected {version}"
    assert (package / "py.typed").exists(), "py.typed is missing: type checkers would ignore the package"
    assert ma.ops.has_kernels("cpu", torch.float64), "the compiled part is missing"

    specs = [ma.TokenSpec("anchors", 40), ma.TokenSpec("queries", 25)]
    plan = ma.AttentionPlan.compile(specs, [ma.AttentionPattern(["anchors", "queries"], ["anchors"])])
    q, k, v = leaves = [torch.randn(2, 65, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = ma.attention(q, k, v, plan)
    expected = ma.reference.attention(q, k, v, plan)
    dout = torch.randn_like(out)
    got, wanted = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)
    for ours, theirs in zip((out, *got), (expected, *wanted)):
        torch.testing.assert_close(ours, theirs)

    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=48, num_heads=3))
    layer(torch.randn(1, 65, 48), specs, [ma.AttentionPattern(["anchors", "queries"], ["anchors"])]).sum().backward()
    print(f"mixed_attention {version} in {sys.prefix}: works")


if __name__ == "__main__":
    main(sys.argv[1])
