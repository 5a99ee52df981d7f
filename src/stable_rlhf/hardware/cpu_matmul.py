"""Float32 matrix products on the CPU, by the faster library where it is as exact as the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT = 1e-6
"""Largest relative error of a product of 256 terms that counts as float32: its rounding stays below 4e-7, bfloat16's is
above 1e-3."""


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Uses oneDNN instead of MKL for float32 matrix products on the CPU, inside the context, where it is as exact.

    On AMD processors MKL uses half of the vector width: on one core of an EPYC oneDNN has 240 GFLOP/s and MKL 110.
    """
    if device.type != "cpu" or not onednn_is_exact():
        yield
        return
    with _leave_to_narrow():
        yield


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN keeps float32 products exact although it is permitted to use bfloat16.

    PyTorch gives it float32 products only with that permission. It is tried on the shapes of a forward, of its
    gradients and of one token. A processor with bfloat16 matrix units (AMX) uses the permission; MKL is then kept.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    with _leave_to_narrow():
        for rows, inner, columns in ((640, 256, 640), (640, 640, 256), (256, 512, 640), (8, 256, 4096)):
            a, b = (torch.randn(*shape, generator=generator) for shape in ((rows, inner), (columns, inner)))
            exact = a.double() @ b.double().T
            if ((a @ b.T).double() - exact).norm() > EXACT * exact.norm():
                return False
    return True


@contextmanager
def _leave_to_narrow() -> Iterator[None]:
    setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
