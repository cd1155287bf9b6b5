from collections.abc import Sequence

from torch import Tensor, dtype

build_flags: str

def cpu_instruction_set() -> str: ...
def cuda_kernel(dtype: dtype, head_dim: int, head_dim_v: int, device: int, backward: bool) -> tuple[str, str]: ...
def check_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], key_padding_mask: Tensor | None, dropout_p: float
) -> None: ...
