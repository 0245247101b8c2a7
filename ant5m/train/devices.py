"""Which device each of the processes takes that train one model."""

import torch

from ant5m import torchrun
from ant5m.device import choose_device, choose_precision
from ant5m.errors import UserError
from ant5m.ranks import Ranks


def take_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank, from what `--device` says: of GPUs the one of its number, or the only one that
    it can see. A collective.

    Raises `UserError` where two ranks would have the same GPU, or unlike devices.
    """
    device = choose_device(name, torchrun.local_rank())
    if device.type == "cuda" and device.index is not None:
        # Whatever asks the current device, as the check of the kernels does, means this one.
        torch.cuda.set_device(device)
    if ranks.size == 1:
        return device
    if device.type == "mps" or ":" in name:
        raise UserError(
            f"--device {name} is one device, and {ranks.size} processes train: take --device auto"
        )
    kind = device.type
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        kind = gpu.name
        if any(ranks.most(ranks.ticket(f"GPU {gpu.uuid}"))):
            raise UserError(
                f"two of the {ranks.size} processes have the same {kind}: start one for each GPU, and let "
                "each see all of them, or only its own (CUDA_VISIBLE_DEVICES)"
            )
    first = ranks.share(kind)
    if any(ranks.most(kind != first)):
        raise UserError(
            f"the devices differ, and all would wait for the slowest (rank 0 has {first}, another one does "
            "not): start processes on equal ones"
        )
    return device


def take_precision(name: str, device: torch.device, ranks: Ranks) -> str:
    """As `choose_precision`. A collective; raises `UserError` where the ranks would train in unlike ones, as
    processors of different kinds do."""
    precision = choose_precision(name, device)
    first = ranks.share(precision)
    if any(ranks.most(precision != first)):
        raise UserError(
            f"the processes would train in unlike precisions ({first} on rank 0): --precision fp32"
        )
    return precision
