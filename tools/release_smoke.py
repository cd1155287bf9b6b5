"""What must work in an environment where the package was just installed: ``python release_smoke.py VERSION``.

With its wheel of CUDA kernels or without it; what those compute is tested on GPUs.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import torch

import mixed_attention as ma


def check_distribution(name: str, package: Path, version: str) -> None:
    """Checks where a distribution is, and what belongs to it beside modules."""
    assert Path(sys.prefix) in package.parents, f"{package} is not the package installed in {sys.prefix}"
    assert metadata.version(name) == version, f"{name}: installed {metadata.version(name)}, expected {version}"
    assert metadata.metadata(name)["License-Expression"] == "BSD-3-Clause", f"{name}: no licence is named"
    files = {file.name for file in metadata.files(name) or ()}
    assert "LICENSE" in files, f"{name}: the licence is missing"
    assert "py.typed" in files, f"{name}: py.typed is missing, type checkers would ignore the package"


def check_kernels(version: str) -> None:
    """Checks that the CUDA kernels are those of their wheel, or that their lack is told."""
    try:
        metadata.version("mixed-attention-kernels")
    except metadata.PackageNotFoundError:
        assert not ma.ops.has_kernels("cuda", torch.float32)
        assert f"install mixed-attention-kernels=={version}" in ma.ops.why_no_cuda_kernels()
        return
    assert ma.ops.has_kernels("cuda", torch.float32), ma.ops.why_no_cuda_kernels()
    check_distribution("mixed-attention-kernels", Path(ma.ops.where_cuda_kernels_are()), version)


def main(version: str) -> None:
    """Compares a forward and a backward of the compiled kernels with the reference; raises where something is wrong."""
    check_distribution("mixed_attention", Path(ma.__file__), version)
    check_kernels(version)
    assert ma.__version__ == version, f"ma.__version__: expected {version}, got {ma.__version__}"
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
