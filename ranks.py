"""torchrun: several processes train one model. You may skip this file.

    torchrun --nproc-per-node 2 grpo.py --out RUN --data FILE

Each process, called a rank, holds the whole model. It rolls out its share of a step's questions.
Then each rank gets the traces of all ranks, so all of them compute the same advantages and weights.
Each adds the gradient of its share of the traces. The gradients are summed, and all ranks take the
same optimizer step. sft.py shares conversations in the same way. Rank 0 alone writes.
"""
import atexit
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod
from io import StringIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import InputError


def join(device: str, checkpoint: bool) -> str:
    """Meet the other ranks that torchrun has started -> the device of this rank, its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if not checkpoint:
        raise InputError("torchrun: the miniature needs one process; start it with python")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    gpu = torch.device(device) if device.startswith("cuda") else None
    if not dist.is_initialized():
        patience = timedelta(hours=2)  # the others wait while rank 0 writes a checkpoint
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=patience)
        atexit.register(dist.destroy_process_group)
    if rank() > 0:  # errors of all ranks are shown, all else only of rank 0
        sys.stdout = StringIO()
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def rank0_first() -> Iterator[None]:
    """Rank 0 runs the body first, then all others do."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def share(items: list) -> list:
    """This rank's part of a list: every world_size()-th entry."""
    return items[rank()::world_size()]


def all_gather(value) -> list:
    """The value of each rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather(own: list, group: int = 1) -> list:
    """The lists of all ranks as one list, in the order of one process. `group` consecutive entries
    belong to one item that share() gave.
    """
    parts = all_gather([own[i:i + group] for i in range(0, len(own), group)])
    merged: list = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        merged[number::world_size()] = part
    return sum(merged, [])


def exchange(items: list, name: str) -> None:
    """Give all ranks an attribute of all items that each rank has set for its share."""
    values = gather([getattr(item, name) for item in share(items)])
    for item, value in zip(items, values, strict=True):
        setattr(item, name, value)


def add_up(values: dict[str, float]) -> dict[str, float]:
    """The sums of the values of all ranks."""
    sums: dict[str, float] = defaultdict(float)
    for part in all_gather(dict(values)):
        for name, value in part.items():
            sums[name] += value
    return sums


def sum_gradients(model: torch.nn.Module) -> None:
    """Replace each gradient by its sum over the ranks. A rank without a share adds zeros."""
    if world_size() == 1:
        return
    for weight in model.parameters():
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
