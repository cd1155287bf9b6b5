"""A batch of samples of different sizes through our layer: as one sequence, and padded with a mask.

The largest sample has the size of its case, and the others are smaller, so that 60 % of the padded batch are tokens.
Small batches take the host longer than the GPU, whichever form they have: both are replayed from CUDA graphs, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import mixed_attention as ma
from bench import check
from bench.cases import Case
from bench.layer import CALLS_A_SAMPLE, FORWARD, TRAINING, peak_bytes
from bench.rows import Row, dtype_of, in_precision, timing_row
from bench.timing import Calls, graphed, take_turns

SMALLEST = 0.2  # of the largest sample; sizes grow evenly, so that their mean is 0.6 of it
_SELF = ((("sa",), ("sa",)), (("va",), ("va",)))
_ANCHOR_QUERY = ((("sa", "sq"), ("sa",)), (("va", "vq"), ("va",)))
_JOINT = ((("sa", "sq", "va", "vq"), ("sa", "va")),)
GPU_CASES = (
    Case("8 of 2 x 8192", 8, 3, 64, {"sa": 8192, "va": 8192}, _SELF),
    Case("8 of 2 x (2048 + 4096)", 8, 3, 64, {"sa": 2048, "sq": 4096, "va": 2048, "vq": 4096}, _ANCHOR_QUERY),
    Case("8 of 2 x (2048 + 4096), joint", 8, 3, 64, {"sa": 2048, "sq": 4096, "va": 2048, "vq": 4096}, _JOINT),
    Case("32 of 2 x 1024", 32, 3, 64, {"sa": 1024, "va": 1024}, _SELF),
)
CPU_CASES = (
    Case("4 of 2 x 1024", 4, 3, 64, {"sa": 1024, "va": 1024}, _SELF),
    Case("4 of 2 x (256 + 512)", 4, 3, 64, {"sa": 256, "sq": 512, "va": 256, "vq": 512}, _ANCHOR_QUERY),
)


@dataclass(frozen=True)
class Problem:
    """A case, and the sizes of its samples.

    Attributes:
        case: Has the sizes of the largest sample, and the number of samples as its batch size.
        sizes: Those of the groups of each sample.
    """

    case: Case
    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, case: Case) -> Problem:
        """Sizes that grow evenly from `SMALLEST` of the case's up to these."""
        count = case.batch_size
        shares = [SMALLEST + (1 - SMALLEST) * i / (count - 1) for i in range(count)]
        return cls(case, tuple(tuple(round(share * size) for size in case.groups.values()) for share in shares))

    @property
    def fill(self) -> float:
        """How much of the padded batch are tokens."""
        return sum(map(sum, self.sizes)) / (self.case.batch_size * self.case.num_tokens)

    def flops(self, *, backward: bool) -> int:
        """Operations of attention between tokens, whoever computes more than that."""
        batch = ma.ragged.batch(self.case.specs, self.case.attention_patterns, self.sizes)
        plan = ma.AttentionPlan.compile(batch.token_specs, batch.attention_patterns)
        forward = plan.flops(self.case.num_heads, self.case.head_dim)
        return forward + (forward * 5 // 2 if backward else 0)

    def padded(self, samples: list[Tensor]) -> Tensor:
        """``(B, N, ...)``, in which every group of a sample is followed by zeros."""
        whole = samples[0].new_zeros(len(samples), self.case.num_tokens, *samples[0].shape[1:])
        for row, sample, sizes in zip(whole, samples, self.sizes):
            for place, piece in zip(row.split([*self.case.groups.values()]), sample.split(sizes)):
                place[: len(piece)] = piece
        return whole

    def mask(self, device: torch.device) -> Tensor:
        """The key padding mask of the padded batch."""
        return self.padded([torch.ones(sum(sizes), dtype=torch.bool, device=device) for sizes in self.sizes])


class OneSequence:
    """Our layer over a ragged batch."""

    def __init__(self, problem: Problem, tokens: list[Tensor], freqs: list[Tensor], douts: list[Tensor]) -> None:
        self.batch = ma.ragged.batch(problem.case.specs, problem.case.attention_patterns, problem.sizes)
        self.x, self.freqs, self.dout = (self.batch.pack(each) for each in (tokens, freqs, douts))
        self.x.requires_grad_()

    def __call__(self, layer: nn.Module) -> Tensor:
        return layer(self.x, self.batch.token_specs, self.batch.attention_patterns, freqs=self.freqs)

    def tokens(self, tensor: Tensor) -> Tensor:
        """The tokens of all samples, one after the other."""
        return tensor[0]


class Padded:
    """Our layer over the padded batch and its mask."""

    def __init__(self, problem: Problem, tokens: list[Tensor], freqs: list[Tensor], douts: list[Tensor]) -> None:
        self.specs, self.patterns = problem.case.specs, problem.case.attention_patterns
        self.x, self.freqs, self.dout = (problem.padded(each) for each in (tokens, freqs, douts))
        self.x.requires_grad_()
        self.mask = problem.mask(self.x.device)

    def __call__(self, layer: nn.Module) -> Tensor:
        return layer(self.x, self.specs, self.patterns, freqs=self.freqs, key_padding_mask=self.mask)

    def tokens(self, tensor: Tensor) -> Tensor:
        """The tokens of all samples, one after the other."""
        return tensor[self.mask]


Form = OneSequence | Padded


def make_forms(problem: Problem, device: torch.device) -> dict[str, Form]:
    """Both forms of a batch of fresh random tokens."""
    case = problem.case
    counts = [sum(sizes) for sizes in problem.sizes]
    rope = ma.RopeFrequency(case.head_dim, 3).to(device)
    tokens, douts = ([torch.randn(n, case.dim, device=device) for n in counts] for _ in range(2))
    freqs = [rope(torch.rand(1, n, 3, device=device) * 1000)[0] for n in counts]
    return {"ours": OneSequence(problem, tokens, freqs, douts), "padded": Padded(problem, tokens, freqs, douts)}


def step(layer: nn.Module, form: Form, dtype: torch.dtype, passed: str) -> Tensor:
    """A forward as in evaluation, or forward and backward down to the gradients of weights and tokens."""
    with (
        torch.set_grad_enabled(passed == TRAINING),
        torch.autocast(form.x.device.type, dtype, enabled=dtype != torch.float32),
    ):
        out = form(layer)
    if passed == TRAINING:
        layer.zero_grad()
        form.x.grad = None
        out.backward(form.dout.to(out.dtype))
    return out


def measure(device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Forward, and forward with backward, of both forms."""
    dtype, is_gpu = dtype_of(precision), device.type == "cuda"
    for case in GPU_CASES if is_gpu else CPU_CASES:
        problem = Problem.of(case)
        layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True))
        layer = layer.to(device)
        for parameter in layer.parameters():  # of the size that trained weights have, so that softmax is not flat
            nn.init.normal_(parameter, std=case.dim**-0.5)
        with in_precision(precision):
            forms = make_forms(problem, device)
            difference = _difference(layer, forms, dtype)
            for passed in (FORWARD, TRAINING):
                calls: dict[tuple[str, str], Callable[[], object]] = {
                    (name, "eager"): partial(step, layer, form, dtype, passed) for name, form in forms.items()
                }
                peaks = {key: peak_bytes(call, device) for key, call in calls.items()}
                for name, form in forms.items() if is_gpu else ():
                    calls[name, "graph"] = graphed(partial(_on_own_leaves, layer, form, dtype, passed))
                count = CALLS_A_SAMPLE if is_gpu else 1
                samples = {key: Calls(partial(_repeat, call, count), count) for key, call in calls.items()}
                flops = problem.flops(backward=passed == TRAINING)
                for (name, mode), timing in take_turns(samples, device, rounds).items():
                    facts = {"pass": passed, "dtype": precision, "mode": mode, "fill": problem.fill}
                    facts |= {"gflops_per_second": flops / timing.median / 1e6, "difference": difference}
                    yield timing_row("ragged", case.name, name, timing, **facts, **peaks.get((name, mode), {}))


def _on_own_leaves(layer: nn.Module, form: Form, dtype: torch.dtype, passed: str) -> Callable[[], object]:
    """A step as a graph can capture it: autograd delivers a gradient on the stream that its leaf was first used on."""
    own = copy.copy(form)
    own.x = form.x.detach().requires_grad_()
    return partial(step, copy.deepcopy(layer), own, dtype, passed)


def _difference(layer: nn.Module, forms: dict[str, Form], dtype: torch.dtype) -> float:
    """The largest relative difference between the forms, of the outputs and of the gradients of tokens."""
    found = []
    for form in forms.values():
        out = step(layer, form, dtype, TRAINING)
        assert form.x.grad is not None
        found.append([form.tokens(tensor).detach() for tensor in (out, form.x.grad)])
    return max(check.relative_error(*pair) for pair in zip(*found))


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()
