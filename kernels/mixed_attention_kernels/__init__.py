"""The CUDA kernels of ``mixed_attention`` as one shared library, which that package opens when it is imported."""

from pathlib import Path

library: str = str(Path(__file__).with_name("libmixed_attention_kernels.so"))
"""Path of the library. Its one function, ``mixed_attention_kernels``, is declared in csrc/cuda/interface.h."""
