"""The machine a run is on: device, attention kernels, exact CPU products, CUDA graphs, memory."""

from stable_rlhf.hardware import attention, cpu_matmul, cuda_graphs, memory
from stable_rlhf.hardware.attention import SHORT, UNBOUNDED, UNMASKED, attending, attention_span, kernel
from stable_rlhf.hardware.cpu_matmul import exact_products
from stable_rlhf.hardware.device import described, refuse_many_processes, replays_graphs, resolve_device
from stable_rlhf.hardware.memory import LESS, shortage, shortage_named

__all__ = [
    "LESS",
    "SHORT",
    "UNBOUNDED",
    "UNMASKED",
    "attending",
    "attention",
    "attention_span",
    "cpu_matmul",
    "cuda_graphs",
    "described",
    "exact_products",
    "kernel",
    "memory",
    "refuse_many_processes",
    "replays_graphs",
    "resolve_device",
    "shortage",
    "shortage_named",
]
