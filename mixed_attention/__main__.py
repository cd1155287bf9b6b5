"""``python -m mixed_attention``: versions, build, and which kernels this machine will use, or why it will not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from mixed_attention import ops
from mixed_attention.plan import AttentionPlan
from mixed_attention.spec import AttentionPattern, TokenSpec
from mixed_attention.tested import TESTED, is_tested

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HEAD_DIMS = (16, 32, 48, 64, 96, 128, 192, 256)


def report() -> str:
    """What this installation is and what it will run, as text."""
    return "\n".join([*_versions(), *_cpu(), *_cuda()])


def _versions() -> Iterator[str]:
    try:
        package = version("mixed_attention")
    except PackageNotFoundError:
        package = "(not installed, run from a checkout)"
    yield f"mixed_attention  {package}"
    yield f"python           {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch            {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if not is_tested(torch.__version__, platform.python_version()):
        pairs = ", ".join(f"{python} with torch {of_torch}" for of_torch, python in TESTED)
        yield f"  untested       the tests were not run with these releases, but with Python {pairs}"
    yield f"compiled part    {ops.describe_build()}"
    yield f"CUDA kernels     {ops.where_cuda_kernels_are() or f'none: {ops.why_no_cuda_kernels()}'}"


def _cpu() -> Iterator[str]:
    if not ops.has_kernels("cpu", torch.float32):
        yield "CPU              none: the compiled part is missing"
        return
    chosen = ops.cpu_instruction_set()
    yield f"CPU              {chosen} kernels, {torch.get_num_threads()} threads"
    better = ("AMX", "AVX512_BF16", "AVX512", "AVX2")
    for name in better[: better.index(chosen)] if chosen in better else better:
        yield f"  {name:14s} not used: this machine does not offer it"
    yield from _serves(torch.device("cpu"))


def _cuda() -> Iterator[str]:
    if torch.version.cuda is None:
        yield "CUDA             not used: this torch was built without CUDA"
    elif not torch.cuda.is_available():
        yield "CUDA             not used: torch finds no GPU"
    elif not ops.has_kernels("cuda", torch.float32):
        yield f"CUDA             not used: {ops.why_no_cuda_kernels()}"
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"CUDA {index}           {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
            yield from _serves(torch.device("cuda", index))


def _serves(device: torch.device) -> Iterator[str]:
    """Tries every dtype on a problem of a few tokens, forward and backward."""
    for dtype in _DTYPES:
        yield f"  {str(dtype).removeprefix('torch.'):14s} {_try(device, dtype)}"
        if device.type == "cuda" and ops.has_kernels("cuda", dtype):
            yield from _cuda_kernels(device, dtype)


def _cuda_kernels(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Names the kernels of a dtype, and for one head_dim of each the reason why it is not a faster one."""
    for backward in (False, True):
        head_dims: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        for head_dim in _HEAD_DIMS:
            family, why = ops.cuda_kernel(dtype, head_dim, device, backward=backward)
            head_dims.setdefault(family, []).append(head_dim)
            reasons.setdefault(family, why)
        for family, served in head_dims.items():
            why = f" ({reasons[family]})" if reasons[family] else ""
            direction = "backward" if backward else "forward"
            yield f"    {direction:12s} {family} for head_dim {', '.join(map(str, served))}{why}"


def _try(device: torch.device, dtype: torch.dtype) -> str:
    plan = AttentionPlan.compile([TokenSpec("tokens", 4)], [AttentionPattern(["tokens"], ["tokens"])])
    q = torch.ones(1, 4, 1, 64, dtype=dtype, device=device, requires_grad=True)
    try:
        ops.attention(q, q, q, plan).sum().backward()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "forward, backward"


def main() -> int:
    """Prints the report; returns an exit code, 1 where nothing was compiled or the environment asks in vain."""
    try:
        ops.check_environment()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(report())
    return 0 if ops.is_compiled() else 1


if __name__ == "__main__":
    sys.exit(main())
