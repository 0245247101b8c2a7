"""Runs commands of ant5m in processes of their own and lets faults befall them.

A server imports everything once and forks a child for each command, so that one costs tenths of a second. In
the child an audit hook sees every file operation of Python below the working folder, before it happens, and
kills the process (SIGKILL, as a power cut or the OOM killer would) before a chosen one.
"""

import contextlib
import errno
import fcntl
import importlib
import json
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


MODULES = (
    *(
        f"ant5m.cli.{name}"
        for name in ("compare", "data", "doctor", "evaluate", "export", "generate", "tokenizer", "train")
    ),
    *("ant5m.data.packing", "ant5m.export.huggingface", "ant5m.study.experiment", "ant5m.train.pretraining"),
    *("pyarrow.parquet", "torch._dynamo", "matplotlib.pyplot", "torch.utils.tensorboard", "typeguard"),
    *(f"tyro._backends._{name}" for name in ("tyro_backend", "argparse_formatter")),
    *(f"tyro.constructors._struct_spec_{name}" for name in ("dataclass", "attrs", "msgspec", "pydantic")),
)
HANGS = 120
"""seconds, after which a command is taken to hang"""


@dataclass
class Outcome:
    code: int
    """exit code; minus the signal's number"""
    operations: int
    """on files, seen until its end"""
    out: str
    err: str

    @property
    def is_clean(self) -> bool:
        """Ended well, or with one line for the user."""
        errors = [line for line in self.err.splitlines() if line.startswith("error:")]
        well = self.code in (0, 130, 143) or (
            self.code == 2 and (len(errors) == 1 or "full helptext" in self.err)
        )
        return well and "Traceback" not in self.err + self.out and "panicked" not in self.err


class Server:
    """A context in which commands are run: `with Server() as server: server.run(["doctor", "ant-5m"])`."""

    def __enter__(self) -> "Server":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "COLUMNS": "200"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, words, folder=None, **faults) -> Outcome:
        return self.run_all([words], folder, **faults)[0]

    def run_all(self, commands, folder=None, **faults) -> list[Outcome]:
        """Run them at the same time. `faults`: `kill_at`, the file operation before which the process dies;
        `file_size`, the most bytes that a file may have; `refused`, a place where writing is the OSError
        `error`; `memory`, the most bytes of more memory."""
        request = {
            "commands": [list(map(str, words)) for words in commands],
            "folder": str(folder or "/"),
            **faults,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Outcome(**values) for values in json.loads(self._process.stdout.readline())]


def _serve() -> None:
    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_start(words, request) for words in request["commands"]]
        print(json.dumps([_finish(*child) for child in children]), flush=True)


def _start(words, request):
    seen = mmap.mmap(-1, 8)
    # Pipes, which no limit on the size of files concerns, large enough for all that a command says.
    pipes = [os.pipe() for _ in range(2)]
    for _, end in pipes:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1 << 20)
    child = os.fork()
    if child:
        for _, end in pipes:
            os.close(end)
        return child, seen, [beginning for beginning, _ in pipes]
    for (_, end), descriptor in zip(pipes, (1, 2), strict=True):
        os.dup2(end, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    code = 70
    try:
        _arrange(request, seen)
        from ant5m.cli import call

        code = call(words)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 2
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def _arrange(request, seen) -> None:
    folder, kill_at = request["folder"], request.get("kill_at")
    os.chdir(folder if os.path.isdir(folder) else "/")
    if (size := request.get("file_size")) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if (more := request.get("memory")) is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))

    def count(path) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not os.path.abspath(name).startswith(folder + "/"):
            return
        number = struct.unpack("q", seen[:8])[0]
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[:8] = struct.pack("q", number + 1)

    refused = os.path.join(folder, request["refused"]) if "refused" in request else None

    def hook(event, arguments) -> None:
        if (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING) or event in EVENTS:
            count(arguments[0])
            for path in arguments[: 2 if event == "os.rename" else 1]:
                if refused is not None and _is_about(path, refused):
                    code = getattr(errno, request["error"])
                    raise OSError(code, os.strerror(code), path)

    def fsync(descriptor) -> None:
        # Counted and left out: what a process has written outlives it in the page cache.
        count(os.readlink(f"/proc/self/fd/{descriptor}"))

    os.fsync = fsync
    sys.addaudithook(hook)


def _is_about(path, place) -> bool:
    """Whether it is `place`, inside it, or what is written aside in its stead."""
    if not isinstance(path, str | os.PathLike):
        return False
    path, (parent, name) = os.path.abspath(path), os.path.split(place)
    return path == place or path.startswith((place + "/", f"{parent}/.{name}."))


def _finish(child, seen, streams):
    ends = time.monotonic() + HANGS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(child, signal.SIGABRT)
        time.sleep(0.005)
    status = ended[1]
    texts = []
    for stream in streams:
        with open(stream, "rb") as file:
            texts.append(re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode("utf-8", "replace")))
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "operations": struct.unpack("q", seen[:8])[0], "out": texts[0], "err": texts[1]}


if __name__ == "__main__":
    _serve()
