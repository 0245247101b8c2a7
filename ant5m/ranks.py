"""The processes that train one model together, and all that they tell each other: `torch.distributed`, used
in one place.

Every process (rank) holds the whole model and optimizer. Tensors are summed where they are: by NCCL on GPUs,
by gloo on CPUs. Whatever decides control flow goes over gloo, also beside GPUs: there a rank that died shows
at once, as a closed connection.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ant5m import torchrun
from ant5m.errors import PeerLost, UserError

if TYPE_CHECKING:  # a process by itself, as one that packs text, need not wait for torch
    import torch
    import torch.distributed as dist

TIMEOUT = timedelta(days=1)
"""of one exchange. Long, because the others wait while rank 0 packs text or writes a report; a rank that
died is noticed at once, and torchrun ends the others when a machine is cut off."""
_ERROR = "error"


class Ranks:
    """This process among `size` processes; a process by itself is rank 0 of 1, and exchanges nothing.

    Every method but `fail` and `leave` is a collective: all ranks call it, in the same order. Where another
    rank cannot any more, they raise `PeerLost`, or the `UserError` with which that rank ended.

    Args:
        store: what `ticket` counts in, shared by all ranks; None: this process is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: "dist.Store | None" = None):
        self.rank, self.size = rank, size
        self._store = store
        self._tickets: dict[str, int] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self._store is None

    def sum(self, x: "torch.Tensor") -> None:
        """Replace x by the sum of all ranks' x. All ranks get the same bits."""
        if self.alone:
            return
        from torch.distributed import all_reduce

        self._exchange(all_reduce, x)

    def most(self, *values: int) -> list[int]:
        """The largest of all ranks' values, place by place."""
        if self.alone:
            return list(values)
        import torch
        from torch.distributed import ReduceOp, all_reduce

        x = torch.tensor(values, dtype=torch.int64)
        self._exchange(all_reduce, x, ReduceOp.MAX)
        return x.tolist()

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same value."""
        high, low = self.most(value, -value)
        return high == -low

    def share(self, value: Any = None) -> Any:
        """Rank 0's `value`, plain values for JSON; what the others give does not count."""
        if self.alone:
            return value
        import torch
        from torch.distributed import broadcast

        text = json.dumps(value).encode() if self.is_first else b""
        length = torch.tensor([len(text)])
        self._exchange(broadcast, length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._exchange(broadcast, data, 0)
        return json.loads(data.numpy().tobytes())

    def share_tensors(self, tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Rank 0's tensors, on the CPU; what the others give does not count."""
        if self.alone:
            return tensors
        import torch
        from torch.distributed import broadcast

        kinds = {name: [str(x.dtype).removeprefix("torch."), x.shape] for name, x in tensors.items()}
        shared = {}
        for name, (dtype, shape) in self.share(kinds).items():
            x = (
                tensors[name].detach().cpu()
                if self.is_first
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            shared[name] = x.contiguous()
            self._exchange(broadcast, shared[name], 0)
        return shared

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, the only one that calls it: plain values for JSON. A `UserError`
        there is raised on all ranks."""
        if self.alone:
            return make()
        made, error = None, None
        if self.is_first:
            try:
                made = make()
            except UserError as raised:
                error = str(raised)
        made, error = self.share([made, error])
        if error is not None:
            raise UserError(error)
        return made

    def ticket(self, name: str) -> int:
        """A number from 0 on that no rank was given before under this `name`."""
        if self._store is not None:
            return self._store.add(f"ticket/{name}", 1) - 1
        self._tickets[name] = self._tickets.get(name, -1) + 1
        return self._tickets[name]

    def fail(self, error: UserError) -> None:
        """Let the others know with what this rank ends, before it does."""
        if self._store is not None:
            self._store.set(_ERROR, str(error))

    def leave(self) -> None:
        """End the exchange; the other ranks need not have come so far."""
        if not self.alone:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()
        self._store = None

    def _exchange(self, collective: Any, *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            if (told := self._told()) is not None:
                raise UserError(told) from None
            raise PeerLost(_explain(error)) from None

    def _told(self) -> str | None:
        """The error with which another rank ended, if it said so."""
        try:
            assert self._store is not None
            return self._store.get(_ERROR).decode() if self._store.check([_ERROR]) else None
        except RuntimeError:  # the store died with it
            return None


def join() -> Ranks:
    """Meet the other processes that torchrun started with this one; a process by itself is alone.

    Raises `PeerLost` when they cannot be reached.
    """
    if torchrun.size() == 1:
        return Ranks()
    import torch
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        tcp = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=torchrun.rank() == 0 and not agent,
            timeout=TIMEOUT,
            wait_for_workers=False,
        )
        # torchrun's own store lives over all restarts: without a prefix for each, ranks would read the
        # addresses of those that died, and wait for them for ever. A store of rank 0's dies with it.
        store = dist.PrefixStore(f"ant5m/{torchrun.restarts()}", tcp) if agent else tcp
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=torchrun.rank(), world_size=torchrun.size(), timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLost(_explain(error)) from None
    return Ranks(torchrun.rank(), torchrun.size(), store)


def _explain(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "shm" in text:
        return (
            "NCCL found too little shared memory: start the container with a larger /dev/shm "
            f"(docker run --shm-size=1g), or set NCCL_SHM_DISABLE=1 ({first})"
        )
    return f"another process of this run ended or cannot be reached: {first}"
