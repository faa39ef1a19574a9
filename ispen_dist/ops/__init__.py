"""The one door to operations that have more than one implementation.

What callers get is always the same function with the same derivatives; which code computes it
depends on the device, the type, the derivatives that are needed, and what it was told.
"""

from ispen_dist.ops.attention import attention
from ispen_dist.ops.choice import KERNELS, chosen, set_kernels, using_kernels
from ispen_dist.ops.linear import constant_linear

__all__ = [
    "KERNELS",
    "attention",
    "chosen",
    "constant_linear",
    "set_kernels",
    "using_kernels",
]
