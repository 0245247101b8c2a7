"""What the kernels take for granted about memory: kinds of numbers, and how many can be read at once."""

import math

import torch

DTYPES = (torch.float16, torch.float32)


def bits(dtype: torch.dtype) -> int:
    """16 or 32: the kernels' two kinds of numbers, fp16 and fp32."""
    if dtype not in DTYPES:
        raise ValueError(f"CUDA kernels take fp16 or fp32, not {str(dtype).removeprefix('torch.')}")
    return dtype.itemsize * 8


def vector(size: int, *tensors: torch.Tensor) -> int:
    """8, 4, 2 or 1: so many neighbors of a row of `size` can be read at once everywhere in these tensors."""
    common = math.gcd(8, size)
    for x in tensors:
        strides = [stride for stride, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1]
        common = math.gcd(common, x.data_ptr() // x.itemsize, *strides)
    return common
