"""Several ranks, on ``torch.distributed``: tokens spread over them, heads spread over them, DTensors.

Imported on first use as ``mixed_attention.distributed``. See docs/distributed.md for which scheme is for what.
"""

from mixed_attention.distributed import dtensor as _dtensor  # noqa: F401, says how the operators act on DTensors
from mixed_attention.distributed.context import ContextParallel
from mixed_attention.distributed.heads import HeadParallel
from mixed_attention.distributed.merge import merge
from mixed_attention.distributed.specs import exchange_specs, shard_specs, share_of
from mixed_attention.distributed.tokens import gather, gather_cache, gather_keys, shard
from mixed_attention.spec import ShardedTokenSpec

__all__ = [
    "ContextParallel",
    "HeadParallel",
    "ShardedTokenSpec",
    "exchange_specs",
    "gather",
    "gather_cache",
    "gather_keys",
    "merge",
    "shard",
    "shard_specs",
    "share_of",
]
