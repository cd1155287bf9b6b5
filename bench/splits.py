"""Emulates fp32 attention on tensor cores that multiply shorter numbers: `python -m bench.splits`, on any machine.

Every factor is split into a few short numbers, some of their products are taken, exactly, and added up in fp32. What
does not fit into an fp32 sum is cut off, as tensor cores do, once in every instruction. The truth is fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.check import RESULTS, relative_error

NUM_TOKENS, HEAD_DIM = 2048, 64
BLOCK = 64  # terms of a sum in the fast memory at a time
DATA = ("normal", "student-t3")


@dataclass(frozen=True)
class Arithmetic:
    """A way to multiply fp32 matrices.

    Attributes:
        shorten: Rounds to the numbers that are multiplied.
        products: Which parts of the two factors are, the smallest products first; part 0 is the largest.
        depth: Terms that one instruction adds.
        scaled: Whether factors are first multiplied by a power of two, one for a whole matrix, into the range.
    """

    shorten: Callable[[Tensor], Tensor]
    products: tuple[tuple[int, int], ...]
    depth: int
    scaled: bool = False

    def matmul(self, left: Tensor, right: Tensor, *, anew: bool) -> Tensor:
        """The product of fp32 matrices, in fp32.

        Args:
            left: ``(..., m, k)``.
            right: ``(..., k, n)``.
            anew: Whether sums begin anew in every block, and those of blocks are added up by instructions that round.
        """
        lefts, rights = self._parts(left), self._parts(right)
        total, depth = 0.0, left.shape[-1]
        cut = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float64)
        for start in range(0, depth, self.depth):
            rows = slice(start, start + self.depth)
            for i, j in self.products:
                cut = _cut_off(cut + lefts[i][..., rows] @ rights[j][..., rows, :])
            if anew and rows.stop % BLOCK == 0:
                total, cut = total + cut.float(), torch.zeros_like(cut)
        return (total + cut.float()) / (self._scale(left) * self._scale(right))

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        parts, rest = [], matrix * self._scale(matrix)
        for _ in range(1 + max(max(pair) for pair in self.products)):
            parts.append(self.shorten(rest).double())
            rest = rest - parts[-1].float()
        return parts

    def _scale(self, matrix: Tensor) -> float:
        """The power of two by which the largest entry comes to lie just below 2^15."""
        return 2.0 ** (15 - torch.frexp(matrix.abs().max()).exponent.item()) if self.scaled else 1.0


def _cut_off(sums: Tensor) -> Tensor:
    """fp64 towards zero to the 24 significant bits of fp32."""
    return (sums.view(torch.int64) & -(1 << 29)).view(torch.float64)


def _tf32(x: Tensor) -> Tensor:
    """To 11 significant bits: half a unit is added, then the lower bits are masked."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


TWO_PARTS = ((1, 0), (0, 1), (0, 0))
THREE_PARTS = ((2, 0), (1, 1), (0, 2), *TWO_PARTS)
ARITHMETICS = {
    "TF32": Arithmetic(_tf32, ((0, 0),), depth=8),
    "3 products of TF32": Arithmetic(_tf32, TWO_PARTS, depth=8),
    "3 products of bf16": Arithmetic(Tensor.bfloat16, TWO_PARTS, depth=16),
    "6 products of bf16": Arithmetic(Tensor.bfloat16, THREE_PARTS, depth=16),
    "fp16, scaled": Arithmetic(Tensor.half, ((0, 0),), depth=16, scaled=True),
    "3 products of fp16, scaled": Arithmetic(Tensor.half, TWO_PARTS, depth=16, scaled=True),
}

Matmul = Callable[[Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, matmul: Matmul) -> list[Tensor]:
    """Output and gradients ``(N, D)`` by the formulas of the kernels; all but the products in the inputs' dtype."""
    scale = q.shape[-1] ** -0.5
    scores = matmul(q, k.mT) * scale
    largest = scores.max(-1, keepdim=True).values
    weights = (scores - largest).exp()
    sums = weights.sum(-1, keepdim=True)
    out = matmul(weights, v) / sums
    p = (scores - (largest + sums.log())).exp()
    ds = p * (matmul(dout, v.mT) - (dout * out).sum(-1, keepdim=True))
    return [out, matmul(ds, k) * scale, matmul(ds.mT, q) * scale, matmul(p.mT, dout)]


def make_inputs(data: str) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    torch.manual_seed(0)
    shape = (NUM_TOKENS, HEAD_DIM)
    if data == "student-t3":
        return [torch.distributions.StudentT(3.0).sample(shape) for _ in range(3)] + [torch.randn(shape)]
    return [torch.randn(shape) for _ in range(4)]


def main() -> None:
    """Prints errors, as Frobenius norms relative to the exact results."""
    print("| data | products | sums |", " | ".join(RESULTS), "|\n|---|---|---|" + "---|" * len(RESULTS))
    for data in DATA:
        inputs = make_inputs(data)
        exact = attention(*(t.double() for t in inputs), torch.matmul)
        ways: dict[tuple[str, str], Matmul] = {("fp32", "rounded"): torch.matmul}
        for name, arithmetic in ARITHMETICS.items():
            ways[name, "carried on"] = lambda a, b, by=arithmetic: by.matmul(a, b, anew=False)
            ways[name, "begun anew"] = lambda a, b, by=arithmetic: by.matmul(a, b, anew=True)
        for (name, sums), matmul in ways.items():
            found = [relative_error(*pair) for pair in zip(attention(*inputs, matmul), exact)]
            print(f"| {data} | {name} | {sums} |", " | ".join(f"{error:.1e}" for error in found), "|", flush=True)


if __name__ == "__main__":
    main()
