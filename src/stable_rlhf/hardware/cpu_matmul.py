"""Float32 matrix products on the CPU: the library that computes them in less time, where it is as exact."""

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
    """Inside, float32 matrix products on the CPU are oneDNN's if those are as exact as MKL's, which on an AMD processor
    uses half of its vector width: 240 against 110 GFLOP/s on one core of an EPYC."""
    if device.type != "cpu" or not onednn_is_exact():
        yield
        return
    with _leave_to_narrow():
        yield


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN, allowed to multiply float32 matrices in bfloat16, does not: it has no units for that here.

    PyTorch hands it float32 products only with that leave. Tried on the shapes of a forward, of its gradients and of
    one token; a processor with bfloat16 matrix units (AMX) takes the leave, and keeps MKL.
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
