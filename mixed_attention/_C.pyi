from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor, dtype

build_flags: str
torch_internals: ModuleType

def has_cuda_kernels() -> bool: ...
def open_kernels(path: str) -> None: ...
def why_no_kernels() -> str: ...
def set_why_no_kernels(why: str) -> None: ...
def cpu_instruction_set() -> str: ...
def check_environment() -> None: ...
def cuda_kernel(
    dtype: dtype, head_dim: int, head_dim_v: int, device: int, backward: bool, tangents: bool = False
) -> tuple[str, str]: ...
def cuda_launch(
    dtype: dtype,
    shape: tuple[int, int, int, int, int, int],
    segments: Sequence[int],
    device: int,
    backward: bool,
    tangents: bool = False,
) -> tuple[str, str, int, int, int, int, int, int]: ...
def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None: ...
def check_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    grads: Sequence[Tensor],
) -> None: ...
def forward_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def backward_jvp(
    dout_dot: Tensor,
    dlse_dot: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    out_dot: Tensor,
    lse_dot: Tensor,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    wants_dq_dot: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def check_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
) -> None: ...
def check_backward_jvp(
    dout_dot: Tensor,
    dlse_dot: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    out_dot: Tensor,
    lse_dot: Tensor,
    wants_dq_dot: bool,
) -> None: ...
def check_dense(name: str, tensor: Tensor) -> None: ...
def check_rope(x: Tensor, freqs: Tensor, out: Tensor) -> None: ...

class ProjectedPart:
    def __init__(self, row_begin: int, row_end: int, tokens: Sequence[tuple[int, int]] | None) -> None: ...

def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[ProjectedPart], dtype: dtype
) -> list[Tensor]: ...

class FlatPlan:
    def __init__(self, numbers: Sequence[int]) -> None: ...

class AttentionCall:
    @property
    def segments(self) -> list[int]: ...
    @property
    def softmax_scale(self) -> float: ...
    @property
    def dropout_p(self) -> float: ...

def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: FlatPlan | list[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def set_attention_composite(composite: Callable[..., list[Tensor | None]]) -> None: ...

class PackedCall(AttentionCall):
    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        rotated: Sequence[int],
        tokens: Sequence[Sequence[tuple[int, int]] | None],
        plan: FlatPlan | list[int],
        softmax_scale: float,
        dropout_p: float,
        normalised: Sequence[int] | None = None,
    ) -> None: ...
    @property
    def shapes(self) -> list[list[int]]: ...
    @property
    def normalised(self) -> list[int]: ...
    @property
    def rotated(self) -> list[int]: ...
    @property
    def tokens(self) -> list[list[tuple[int, int]] | None]: ...

def attend_in_place(
    buffers: Sequence[Tensor],
    freqs: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    dropout_seed: Tensor | None,
    call: PackedCall,
) -> list[Tensor]: ...
def set_backward_composite(composite: Callable[..., list[Tensor | None]]) -> None: ...

class LayerCall:
    def __init__(self, parts: Sequence[ProjectedPart], attention: PackedCall) -> None: ...

def run_layer(
    x: Tensor,
    maps: Sequence[tuple[Tensor, Tensor | None]],
    freqs: Tensor | None,
    key_padding_mask: Tensor | None,
    call: LayerCall,
) -> list[Tensor] | None: ...

class Shards:
    def __init__(self, group: str, rank: int, share_a_host: bool, sizes: Sequence[Sequence[int]]) -> None: ...
    @property
    def group(self) -> str: ...
    @property
    def sizes(self) -> list[list[int]]: ...

class InFlight: ...

def start_gather(rows: Tensor, shards: Shards) -> InFlight: ...
def finish_gather(gather: InFlight, shards: Shards) -> Tensor: ...
def start_sums(rows: Tensor, shards: Shards) -> InFlight: ...
def finish_sums(sums: InFlight, shards: Shards) -> Tensor: ...
def gather_tokens(
    parts: Sequence[Tensor], tokens: Sequence[tuple[int, int]] | None, shards: Shards
) -> list[Tensor]: ...
def set_sums_composite(composite: Callable[..., list[Tensor]]) -> None: ...
def set_spread_composite(composite: Callable[..., list[Tensor]]) -> None: ...

class SpreadCall:
    here: PackedCall
    attention: PackedCall
    shards: Shards
    def __init__(self, here: PackedCall, attention: PackedCall, shards: Shards) -> None: ...

class SpreadLayerCall:
    def __init__(self, parts: Sequence[ProjectedPart], attention: SpreadCall) -> None: ...

def fits_layer(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], freqs: Tensor | None, num_heads: int, head_dim: int
) -> bool: ...
def run_layer_over_ranks(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], freqs: Tensor | None, call: SpreadLayerCall
) -> list[Tensor] | None: ...
