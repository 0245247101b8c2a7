"""The processes that train one model together, and all that they tell each other: `torch.distributed`, used
in one place.

Every process (rank) holds the whole model and optimizer. Tensors are summed where they are: by NCCL on GPUs,
by gloo on CPUs. Whatever decides control flow goes over gloo, also beside GPUs: there a rank that died shows
at once, as a closed connection. So no rank may wait for its GPU before all have agreed that they came so far:
NCCL's kernels wait for a dead rank, and nobody can interrupt them.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ant5m import torchrun
from ant5m.errors import PeerLost, UserError, first_line

if TYPE_CHECKING:  # a process by itself, as one that packs text, need not wait for torch
    import torch
    import torch.distributed as dist

TIMEOUT = timedelta(days=1)
"""of one agreement. Long, because the others wait while rank 0 packs text or writes a report; a rank that
died is noticed at once, and torchrun ends the others when a machine that was cut off is back."""
SUM_TIMEOUT = timedelta(minutes=10)
"""of one sum on GPUs, which all ranks begin within a step; then NCCL ends the process"""
MEET_SECONDS = 0.02
"""between two looks of rank 0 for the others"""
_ERROR = "error"


class Ranks:
    """This process among `size` processes; a process by itself is rank 0 of 1, and exchanges nothing.

    Every method but `fail` and `leave` is a collective: all ranks call it, in the same order. Where another
    rank cannot any more, they raise `PeerLost`, or the `UserError` with which that rank ended.

    Args:
        store: what `ticket` counts in, shared by all ranks; None: this process is alone.
        agreements: gloo's group, where sums on GPUs have one of their own; None: there is only one.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: "dist.Store | None" = None,
        agreements: "dist.ProcessGroup | None" = None,
    ):
        self.rank, self.size = rank, size
        self._store, self._agreements = store, agreements
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

        self._exchange(all_reduce, x, group=None if x.is_cuda else self._agreements)

    def most(self, *values: int) -> list[int]:
        """The largest of all ranks' values, place by place."""
        if self.alone:
            return list(values)
        import torch
        from torch.distributed import ReduceOp, all_reduce

        x = torch.tensor(values, dtype=torch.int64)
        self._exchange(all_reduce, x, ReduceOp.MAX, group=self._agreements)
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
        self._exchange(broadcast, length, 0, group=self._agreements)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.is_first:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._exchange(broadcast, data, 0, group=self._agreements)
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
            self._exchange(broadcast, shared[name], 0, group=self._agreements)
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

    def fail(self, error: BaseException) -> None:
        """Break off the exchange before this rank ends with `error`; the others are told of what a user can
        mend.

        In good order (`leave`) NCCL would wait for ranks that wait for this one in an agreement.
        """
        if self._store is None:
            return
        store, self._store = self._store, None
        from torch import distributed

        if isinstance(error, UserError | OSError | MemoryError):
            text = str(error) if isinstance(error, UserError) else f"rank {self.rank}: {first_line(error)}"
            with contextlib.suppress(RuntimeError):  # the store died first
                store.set(_ERROR, text)
        self._close_agreements()  # the others notice, and break off, too
        distributed.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """End the exchange; the other ranks need not have come so far."""
        if self._store is None:
            return
        self._store = None
        from torch import distributed

        self._close_agreements()
        distributed.destroy_process_group()

    def _close_agreements(self) -> None:
        """Where they have a group of their own. Its connections end with the last reference to it."""
        from torch import distributed

        group, self._agreements = self._agreements, None
        if group is not None:
            distributed.destroy_process_group(group)

    def _exchange(self, collective: Any, *arguments: Any, group: "dist.ProcessGroup | None") -> None:
        try:
            collective(*arguments, group=group)
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

    rank, size = torchrun.rank(), torchrun.size()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    gpus = torch.cuda.is_available()
    try:
        tcp = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not agent,
            timeout=TIMEOUT,
            wait_for_workers=False,
        )
        store = dist.PrefixStore(f"ant5m/{_meet(tcp, rank, size)}", tcp)
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=SUM_TIMEOUT if gpus else TIMEOUT,
        )
        agreements = dist.new_group(backend="gloo", timeout=TIMEOUT) if gpus else None
    except (RuntimeError, ValueError) as error:
        raise PeerLost(_explain(error)) from None
    return Ranks(rank, size, store, agreements)


def _meet(store: "dist.Store", rank: int, size: int) -> str:
    """A name that is new in the store, the same for all ranks that are there now.

    torchrun's own store may live over all restarts: without such a prefix, ranks would read the addresses of
    those that died, and wait for them for ever. How often a rank was restarted is no such name: each machine
    counts by itself. So every rank asks under a name of its own, and rank 0 answers until all are there.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"ant5m/asks/{rank}", own)
        common = store.get(f"ant5m/answer/{own}").decode()
        store.set(f"ant5m/{common}/has/{rank}", "")
        return common
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"ant5m/asks/{other}"]):
                asked = store.get(f"ant5m/asks/{other}").decode()
                store.set(f"ant5m/answer/{asked}", own)
            if store.check([f"ant5m/{own}/has/{other}"]):
                missing.remove(other)
        time.sleep(MEET_SECONDS)
    return own


def _explain(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "shm" in text:
        return (
            "NCCL found too little shared memory: start the container with a larger /dev/shm "
            f"(docker run --shm-size=1g), or set NCCL_SHM_DISABLE=1 ({first})"
        )
    if "Duplicate GPU" in text:
        return f"two processes have one GPU, or parts of one (MIG), which NCCL cannot join ({first})"
    return f"another process of this run ended or cannot be reached: {first}"
