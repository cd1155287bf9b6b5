from collections.abc import Sequence

from torch import Tensor

build_flags: str

def cpu_instruction_set() -> str: ...
def check_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], key_padding_mask: Tensor | None, dropout_p: float
) -> None: ...
