"""What has no better home: errors that speak to the user, files that are never half written, where to compute."""

import argparse
import contextlib
import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

# Options of main.py that say how a run is made, and not what it learns: --resume may change them.
FREE_TO_CHANGE = {
    *("train", "test", "quick", "resume", "checkpoint_interval", "no_gpus", "cuda_graphs"),
    *("data_dir", "unverified_data", "result_dir", "checkpoint_dir", "sample_dir"),
    *("visdom_server", "visdom_port", "no_visdom", "tensorboard"),
}

# Environment variable with the commit of a copy of this program that lies outside git.
COMMIT = "DGR_COMMIT"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on standard error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


class UserError(Exception):
    """Something a user can put right. The message is one line: what is wrong, where, and what to do."""


# What PyTorch says when it is, on CPUs and GPUs; of its exceptions, only some say it by their type.
OUT_OF_MEMORY = re.compile("out of memory|allocate|alloc_failed|size calculation overflow", re.IGNORECASE)


def run_program(main: Callable[[], None]) -> None:
    """Run a script's main function; what a user can put right ends in one line on standard error and exit status 1."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # None where the caller has closed them
    # For a terminal that has no ±; and a line is there when it is printed, in a log too.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        end(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(messages(error)):
            raise
        end(
            "error: out of memory: try a smaller --batch-size, --solver-channel-size or --generator-c-channel-size and "
            "--generator-g-channel-size, or --precision=bf16"
        )
    except BrokenPipeError:  # whoever read what is printed has enough, as `head` has
        give_up_output()
        sys.exit(1)
    except OSError as error:  # a disk that is full, a directory that has gone
        give_up_output()
        end(f"error: {error.filename or 'files'}: {reason(error)}")
    except KeyboardInterrupt:
        end("stopped")


def messages(error: BaseException | None) -> str:
    """What an error says, and those it came of: out of memory, a capture of updates ends in an error of its own."""
    return "" if error is None else f"{error} {messages(error.__context__)}"


def give_up_output() -> None:
    """Let go of what can't be printed, which Python would try again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end(message: str) -> NoReturn:
    """Leave with exit status 1 and one line on standard error."""
    sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}")


def warn(message: str) -> None:
    """One line on standard error, where there still is one: a terminal may have gone."""
    with contextlib.suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """An exception as a few words on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0]) if isinstance(error, OSError) and error.args else str(error)  # without a file's name
    return " ".join(text.split()) or type(error).__name__


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", keep_as: Path | None = None) -> Iterator[IO[Any]]:
    """Open a file that appears at `path` whole or not at all; what was there before stays until then.

    keep_as: where what was there before is kept afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write does not know what it writes to
        raise


@contextlib.contextmanager
def reading(path: Path, wrong: str) -> Iterator[None]:
    """Make a UserError of what goes wrong while a file is read, but of a lack of memory; `wrong`: of what it holds."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{error.filename or path}: {reason(error)}") from error
    except Exception as error:  # readers fail in many ways on a file that is not what it says
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(f"{wrong}: {reason(error)[:200]}") from error


def not_writable(directory: Path) -> str | None:
    """Why no file can be made in a directory, which need not exist yet; None if nothing speaks against it."""
    existing = directory
    try:
        existing = next((path for path in (directory, *directory.parents) if path.exists()), directory)
        if not existing.is_dir():
            return f"{existing} is not a directory"
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{str(existing)[:200]} is not writable ({reason(error)})"


def set_aside(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Rename those of the paths that exist, all with one suffix: ~1, ~2, ... (the highest is the newest).

    Returns the old and the new names.
    """
    beside = [(path, other.name) for path in paths if path.parent.is_dir() for other in path.parent.iterdir()]
    taken = (re.fullmatch(rf"{re.escape(path.name)}~(\d+)", name) for path, name in beside)
    number = 1 + max((int(found[1]) for found in taken if found), default=0)
    moves = [(path, path.with_name(f"{path.name}~{number}")) for path in paths if path.exists()]
    for path, aside in sorted(moves, key=lambda move: len(move[0].parts), reverse=True):  # what is inside goes first
        path.rename(aside)
    return moves


def without_flags(words: Sequence[str], pattern: str) -> list[str]:
    """A command line without the flags that match a pattern, dashes and all, and without their values."""
    named = [i for i, word in enumerate(words) if re.fullmatch(pattern, word.split("=")[0])]
    gone = {*named, *(i + 1 for i in named if "=" not in words[i])}
    return [word for i, word in enumerate(words) if i not in gone]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file beside a path, which the operating system frees whatever becomes of this process."""
    path = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # for writing: NFS locks no other
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run of this name is under way ({path} is locked): wait for it, or give other directories"
            ) from error
        except OSError as error:  # a file system without locks
            warn(f"{path} can't be locked ({reason(error)}): start no other run of this name before this one ends")
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Make the first SIGINT, SIGTERM or SIGHUP a request, which the function given here reports; a later one ends it.

    One within a second does not: a request may come twice, from what stops a group of processes and from its leader.
    SIGHUP is sent by a terminal that closes.
    """
    requests: list[float] = []

    def request(number: int, _frame: object) -> None:
        requests.append(time.monotonic())
        if requests[-1] - requests[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():  # one who was asked to stop is about to end, and need not hear it again
            signal.signal(number, signal.SIG_IGN if requests else handler)


def choose_device(*, gpus: bool = True) -> torch.device:
    return torch.device("cuda" if gpus and torch.cuda.is_available() else "cpu")


def cpu_is_faster_in_bf16() -> bool:
    """Whether it has AMX, or is AMD's and has AVX512-BF16. Intel's with that alone was slower: benchmarks/README.md.

    Known by its kind instead of measured anew: on one machine, a seed comes to the same results every time.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version that is supported
    amd = capabilities.get("cpu_name", "").startswith("AMD")
    return amx or (amd and capabilities.get("avx512_bf16", False))


def choose_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """What networks compute in: bfloat16, or None for float32 (of a GPU perhaps tf32, which is set here).

    "auto" is bf16 where that is the faster one.
    """
    if precision == "auto":
        if device.type == "cuda":
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            faster = cpu_is_faster_in_bf16()
        precision = "bf16" if faster else "fp32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        raise UserError("--precision tf32 is of GPUs, and this run is on a CPU: give fp32, bf16 or auto")
    return torch.bfloat16 if precision == "bf16" else None


class Captured:
    """A function of tensors as a CUDA graph: its hundreds of kernels are launched at once, without waiting for Python.

    function: gives tensors by name, and may change parameters where they are. It is recorded when it has been called
    `warm_up` times, and again when the shape of a tensor or any other argument changes. What it does to anything but
    tensors, it does only while it is recorded.
    """

    warm_up = 3  # calls, made as they are, in which libraries and optimisers set up what they keep

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function = function
        self._signature: tuple[Any, ...] | None = None
        # Recorded in this stream, and warmed up there: autograd and the libraries keep state for each stream.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        signature = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments)
        if signature != self._signature:
            self._signature, self._calls, self._replay = signature, 0, None
        self._calls += 1
        if self._calls <= self.warm_up:
            return self._aside(lambda: self.function(*arguments))
        if self._replay is None:
            self._arguments = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            self._replay = self._record(lambda: self.function(*self._arguments))
        for kept, given in zip(self._arguments, arguments, strict=True):
            if isinstance(given, Tensor):
                kept.copy_(given)
        return {name: value.clone() for name, value in self._replay().items()}

    def _aside(self, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Work in the stream that will be recorded."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # an optimiser's, of steps that are not recorded
            values = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return values

    def _record(self, work: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        """Record work without doing it. Gives what does it, and returns tensors that every call writes anew."""
        gc.collect()  # a graph that is given up while another is recorded breaks that one
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: a loader's, which pins memory, would break the recording otherwise.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            values = work()

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return values

        return replay


def images_at_once(device: torch.device) -> int:
    """How many images are best answered or drawn together, where nothing is learned: what fits the CPU's cache."""
    return 512 if device.type == "cuda" else 64


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit this program was started from, "-dirty" appended if files were changed since; None outside git."""
    if COMMIT in os.environ:
        return os.environ[COMMIT] or None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]  # no tags
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
