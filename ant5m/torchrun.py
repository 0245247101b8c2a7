"""What torchrun, or another launcher that sets the same variables, tells a process about itself."""

import os


def is_parent() -> bool:
    """Whether this process was started by such a launcher."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank() -> int:
    """The number of this process in the run; 0 for one that was started by itself."""
    return int(os.environ["RANK"]) if is_parent() else 0


def size() -> int:
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if is_parent() else 1


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_parent() else 0


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_parent() else 1


def restarts() -> int:
    """How often the processes have been started again, because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if is_parent() else 0


def slurm_tasks() -> int:
    """How many processes srun started this one among; 1 where it did not, as in a batch script itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return int(tasks) if tasks.isdigit() else 1
