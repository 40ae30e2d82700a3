"""Options, one-line errors, and the files of a run: their names, writing, reading, checkpoints, locks.

A run leaves `config.json`, `metrics.csv` and `summary.json` in its result directory, its scholar in the checkpoint
directory, and pictures in the sample directory; docs/running.md describes them. Every file appears whole or not at all.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# Environment variable with the commit of a copy of this program that is outside git.
COMMIT = "DGR_COMMIT"


def option(default: Any, help: str, changes: str | None = "learning", **settings: Any) -> Any:
    """A field of a dataclass that is also a command-line option: everything about it is declared here.

    default: its value, or a function that returns it.
    changes: what another value changes: "networks" (their shapes), "learning" (what they learn), or None (neither). A
        bool that changes one can be switched off, too (see `flag`), as a recipe may have switched it on.
    settings: low, high, above, below (limits of a number), choices (or a function that returns them), parse (reads the
        text, and also what is not among the choices), exclusive (options with the same value exclude each other),
        group (a title in --help, also for the options that follow), and settings of `add_argument`.
    """
    value = {"default_factory": default} if callable(default) else {"default": default}
    return field(**value, metadata={"help": help, "changes": changes, **settings})


def default_of(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def flag(key: str, value: Any = True) -> str:
    """An option as it stands on a command line, with its value if that is not True; False is a no- before its name."""
    name = key.replace("_", "-")
    return f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"


def to_path(text: str) -> Path:
    """A path from the command line or the environment; shells do not expand ~ in --result-dir=~/results."""
    return Path(os.path.expanduser(text))


def number(
    low: float, high: float = 2**31 - 1, *, kind: type = float, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """A function that reads a number from low (or above it) to high (or below it)."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((low < value if above else low <= value) and (value < high if below else value <= high)):
            limits = f"{'above' if above else 'of at least'} {low:g}"
            limits += f" and {'below' if below else 'at most'} {high:.10g}" if high < 2**31 - 1 or value > high else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limits}")
        return value

    return parse


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    group, exclusive = parser, {}
    for f in fields(options):
        settings, default = dict(f.metadata), default_of(f)
        if not settings:  # filled in by the program
            continue
        if title := settings.pop("group", None):
            group = parser.add_argument_group(title)
        help, choices, name, changes = (settings.pop(key, None) for key in ("help", "choices", "exclusive", "changes"))
        limits = {key: settings.pop(key) for key in ("low", "high", "above", "below") if key in settings}
        if name and name not in exclusive:
            exclusive[name] = group.add_mutually_exclusive_group(required=name == "required")
        target = exclusive.get(name, group)
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction if changes else "store_true"  # recipes may set it
        elif choices is not None:
            choices = list(choices() if callable(choices) else choices)
            settings |= {} if "parse" in settings else {"choices": choices, "type": type(choices[0])}
        elif isinstance(default, Path):
            settings |= {"type": to_path, "metavar": "DIR"}
        elif limits:
            kind = int if isinstance(default, int) else float
            settings = {"metavar": "N" if kind is int else "X"} | settings | {"type": number(**limits, kind=kind)}
        if "parse" in settings:
            settings["type"] = settings.pop("parse")
        if default is not None and default is not False:
            help += f" (default: {default})"
        argument = target.add_argument(flag(f.name), default=default, **settings)
        argument.help = help.replace("%", "%%")  # to the constructor, BooleanOptionalAction would add a default


ADDRESS = re.compile(r"(?:(https?)://)?([\w.-]+|\[[\da-fA-F:.]+\])(?::(\d{1,5}))?(/[^\s?#@]*)?")  # of a visdom server
LOGIN = "a login is read from the environment variables VISDOM_USERNAME and VISDOM_PASSWORD"


def address(text: str) -> str:
    """Check an address. What can't be one is not printed: it may hold a password."""
    if not ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(f"it takes host, host:8097 or https://host/path; {LOGIN}")
    return text


def server_of(text: str, port: int) -> dict[str, Any]:
    """The server, port and path of an address, by the names of visdom's arguments. port: if the address has none."""
    scheme, host, own_port, path = ADDRESS.fullmatch(text).groups(default="")
    own_port = own_port or (443 if scheme == "https" and port == 8097 else port)
    return {"server": f"{scheme or 'http'}://{host}", "port": int(own_port), "base_url": path.rstrip("/")}


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    seed: int = option(0, "random seed of everything but the permutations", low=0, group="seed and files")
    resume: bool = option(False, "continue the unfinished run of this name, or start one", None)
    result_dir: Path = option(Path("./results"), "results go to DIR/NAME/", None)
    checkpoint_dir: Path = option(Path("./checkpoints"), "trained scholars go to DIR/NAME", None)
    keep_scholars: bool = option(False, "keep each task's scholar too, in DIR/after-task-N/NAME", None)
    continue_from: Path | None = option(None, "go on from the scholar in FILE", None, parse=to_path, metavar="FILE")
    sample_dir: Path = option(Path("./samples"), "sample grids go to DIR/NAME-sample.jpg", None)


DIRECTORIES = ("result_dir", "checkpoint_dir", "sample_dir")  # that a run writes to


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on standard error, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see --help\n")


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do.

    status: the program's exit status.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def run_program(main: Callable[[], None]) -> None:
    """Run a script's main function; what the user can put right ends as one line on standard error, exit status 1."""
    # Weights that nothing but weight decay moves (those that see only black) end as denormal numbers, which CPUs
    # multiply many times slower. Set before PyTorch starts threads, which take it over.
    torch.set_flush_denormal(True)
    devnull = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or devnull, sys.stderr or devnull  # None where the caller has closed them
    if hasattr(sys.stdout, "reconfigure"):  # notebooks, for one, put something simpler in its place
        # For terminals without ±; and lines must appear as they are printed, in a log too.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        getattr(sys.stdout, "flush", bool)()
    except UserError as error:
        fail(f"error: {error}", error.status)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        smaller = "--batch-size, --solver-channel-size or --generator-c-channel-size and --generator-g-channel-size"
        fail(f"error: out of memory: try a smaller {smaller}, or --dtype=bfloat16")
    except OSError as error:  # a full disk, a directory that has gone
        try:  # Python would try to print again, as it exits, what can't be printed
            getattr(sys.stdout, "flush", bool)()
        except OSError:
            with contextlib.suppress(OSError, AttributeError):  # what stands in its place may have no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has had enough, as `head` has
            sys.exit(1)
        fail(f"error: {error.filename or 'files'}: {reason(error)}")
    except KeyboardInterrupt:
        fail("stopped", 128 + signal.SIGINT)


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and those behind it: CUDA graphs hide a lack of memory behind their own error."""
    return [] if error is None else [error, *causes(error.__context__)]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory is short, by this error or one behind it; only some of PyTorch's say so by their type."""
    words = "out of memory|allocate|alloc_failed|size calculation overflow"
    return any(isinstance(cause, MemoryError) or re.search(words, str(cause), re.I) for cause in causes(error))


def fail(message: str, status: int = 1) -> NoReturn:
    """Exit with this status and one line on standard error."""
    message = f"{Path(sys.argv[0]).name}: {' '.join(message.split())}"
    if status != 1:
        print(message, file=sys.stderr)
    sys.exit(message if status == 1 else status)


def warn(message: str) -> None:
    """Print one line on standard error, if it is still there: a terminal may have gone."""
    with contextlib.suppress(OSError):
        tqdm.write(f"warning: {message}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """An exception as a few words on one line."""
    if isinstance(error, FileExistsError) and error.filename and (lost := lost_link(Path(error.filename))):
        return lost
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0]) if isinstance(error, OSError) and error.args else str(error)  # without a file's name
    return "".join(filter(str.isprintable, " ".join(text.split()))) or type(error).__name__


@contextlib.contextmanager
def reading(path: Path, wrong: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a UserError, with `wrong` if its content is at fault."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {reason(error)}") from error
    except Exception as error:  # readers fail in many ways on a file that is not what it claims
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{wrong}: {reason(error)[:400]}") from error


# What schedulers send some time before they kill, perhaps again and again: SLURM, LSF, Grid Engine.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turn the first signal to stop into a request, which this function reports by the signal's number (else 0).

    These are SIGINT, SIGTERM, SIGHUP (a closed terminal) and `WARNINGS`. Another one, warnings aside, ends the program
    at once, unless it comes within a second: a process group may get each one twice. Threads but the main one hear of
    no signal.
    """
    requests: list[int] = []
    orders: list[float] = []  # when those that are no warning came

    def request(number: int, _frame: object) -> None:
        requests.append(number)
        if number not in WARNINGS:
            orders.append(time.monotonic())
            if orders[-1] - orders[0] > 1:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    elif signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: requests[0] if requests else 0
    finally:
        ending = requests and not hasattr(sys, "ps1")  # a notebook or an interactive session goes on
        for number, handler in before.items():  # after a request the program is about to end: ignore further ones
            signal.signal(number, signal.SIG_IGN if ending else handler)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", keep_as: Path | None = None) -> Iterator[IO[Any]]:
    """Open a file that appears at `path` whole or not at all; the old one stays until then, or moves to keep_as."""
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
        if isinstance(error, OSError):  # that of a failed write names no file
            error.filename = error.filename or str(path)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def lost_link(path: Path) -> str | None:
    """What is wrong with a path that is a link to nowhere; None if it is not."""
    lost = path.is_symlink() and not path.exists()
    return f"{path} is a link to {os.readlink(path)}, which does not exist" if lost else None


def not_writable(directory: Path) -> str | None:
    """Why no file can be made in a directory, which need not exist yet; None if nothing speaks against it."""
    existing = directory
    try:
        above = (directory, *directory.parents)
        existing = next((path for path in above if path.exists() or path.is_symlink()), directory)
        if lost := lost_link(existing):
            return lost
        if not existing.is_dir():
            return f"{existing} is not a directory"
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{str(existing)[:200]} is not writable ({reason(error)})"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file beside a path; the operating system frees it, whatever becomes of this process."""
    path = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # open for writing: NFS locks no other file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            wait = "wait for it, or use other directories"
            raise UserError(f"another run of this name is under way ({path} is locked): {wait}") from error
        except OSError as error:  # a file system without locks
            warn(f"{path} can't be locked ({reason(error)}): start no other run of this name before this one ends")
        yield


@contextlib.contextmanager
def own_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed, and leave training's random streams as they are."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)  # of all devices
        yield


CHECKPOINT_FORMAT = 7


def save_checkpoint(path: Path, *, keep_previous: bool = False, **content: Any) -> None:
    """Write tensors and plain values; the file appears whole or not at all, and the old one stays until then."""
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without a reason
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    buffer.seek(0)
    with reading(path, f"{path}: a get_extra_state returns something that is neither a tensor nor a plain value"):
        torch.load(buffer, map_location="meta", weights_only=True)  # its structure alone

    def write() -> None:
        with atomic_write(path, "wb", keep_as=previous(path) if keep_previous else None) as file:
            file.write(buffer.getbuffer())

    try:
        write()
    except FileNotFoundError:  # the directory vanished at this very moment: make it again
        write()


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU, without executing anything in it."""
    if not path.exists():
        raise UserError(f"no scholar at {path}: train one first, with --train and the same flags")
    with reading(path, f"{path} is damaged or not a checkpoint of this program; only --train can make it again"):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on files of other programs
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = int(checkpoint["format"])
    if found != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has format {found}, and this version of the program reads {CHECKPOINT_FORMAT}")
    return checkpoint


class RunPaths:
    """Where a run of this name has its files.

    results and sample_log are directories; `drawn` is a picture of what the generator draws in the end, `state`
    everything that an unfinished run needs to continue, `figure` the last file that a run writes.
    """

    def __init__(self, name: str, options: FileOptions):
        self.results, self.scholar, self.sample_log = (getattr(options, key) / name for key in DIRECTORIES)
        kept = re.fullmatch(r"after-task-\d+", options.checkpoint_dir.name)  # see `scholar_after`
        self.tested = f"{name}-{kept[0]}" if kept else name  # what --test names its files after
        self.drawn = options.sample_dir / f"{self.tested}-sample.jpg"
        self.state = options.checkpoint_dir / f"{name}.unfinished"
        self.figure = self.results / "precision.png"

    def scholar_after(self, task: int) -> Path:
        """Where --keep-scholars keeps the scholar of a task."""
        return self.scholar.parent / f"after-task-{task}" / self.scholar.name

    def answers(self, on: str) -> Path:
        """Where --on writes what the scholar answers."""
        return self.drawn.with_name(f"{self.tested}-on-{on}.csv")

    @property
    def resumable(self) -> bool:
        return self.state.exists() or previous(self.state).exists()

    @property
    def has_results(self) -> bool:
        """Whether the run has left whole results that can be read, and nothing to resume."""
        try:
            return bool(Run.read(self.results).summary) and not self.state.exists()
        except UserError:
            return False

    @property
    def finished(self) -> bool:
        """Whether the run has left results and the scholar they belong to."""
        return self.has_results and self.scholar.exists()

    def need(self, scholar: Path) -> None:
        """Raise a UserError, with the way out, if this scholar of the run is missing."""
        if not scholar.exists() and self.resumable and not self.has_results:
            raise UserError(f"no scholar at {scholar} yet: finish the run, with --train, --resume and the same flags")
        if not scholar.exists() and self.has_results:
            again = f"train it again, without --resume or after renaming {self.results}"
            raise UserError(f"no scholar at {scholar}, though {self.results} is finished: put it back, or {again}")

    def stored_config(self) -> dict[str, Any] | None:
        """The config.json of the results, or else of the unfinished state; None if there is neither."""
        try:
            return Run.read(self.results).config
        except UserError:
            return self.last_state()[1]["files"]["config"] if self.resumable else None

    def rename_earlier(self, *these: Path) -> None:
        """Give the files of an earlier run, or these of them, one suffix, and say so: ~1, ~2, ... (the newest)."""
        # States first: without them, nothing takes the rest for an unfinished run.
        everything = [self.state, previous(self.state), self.results, self.scholar, self.sample_log, self.drawn]
        everything += [kept / self.scholar.name for kept in self.scholar.parent.glob("after-task-*")]
        for of_test in ("on-*.csv", "after-task-*-on-*.csv", "after-task-*-sample.jpg"):
            everything += self.drawn.parent.glob(f"{self.tested}-{of_test}")
        paths = these or everything
        beside = [(path, other.name) for path in paths if path.parent.is_dir() for other in path.parent.iterdir()]
        taken = (re.fullmatch(rf"{re.escape(path.name)}~(\d+)", name) for path, name in beside)
        number = 1 + max((int(found[1]) for found in taken if found), default=0)
        for path in sorted(paths, key=lambda path: len(path.parts), reverse=True):  # what is inside goes first
            if path.exists():
                new = path.rename(path.with_name(f"{path.name}~{number}"))
                print(f"{path} of an earlier run is kept as {new}")

    def last_state(self) -> tuple[Path, dict[str, Any]]:
        """The last good state and its file; if the newest is damaged, warn and use the one before it."""
        for candidate in (self.state, previous(self.state)):
            if candidate.exists():
                try:
                    return candidate, load_checkpoint(candidate)
                except UserError as error:
                    warn(str(error))
        raise UserError(f"{self.state}: no good state is left; leave out --resume to start again")

    def read_state(self, config: dict[str, Any], keys: list[str], defaults: dict[str, Any]) -> dict[str, Any] | None:
        """The last good state of an unfinished run, or None; raises UserError if its options or data differ.

        config: the run's. keys: the options that have to be the same. defaults: of options that an earlier version
        did not have. Results in the run's directory that belong to another run are renamed.
        """
        if not self.resumable:
            return None
        file, state = self.last_state()
        begun = state["files"]["config"]
        if changes := differences(defaults | begun["options"], config["options"], keys):
            raise UserError(f"{file} belongs to a run with {changes}: use the same flags, or leave out --resume")
        if data_of(begun) != data_of(config):
            raise UserError(f"{file} belongs to a run on other data files: use the same ones, or leave out --resume")
        if begun["data"].get("scholar") != config["data"].get("scholar"):
            raise UserError(f"{file} continues from another scholar: use the same one, or leave out --resume")
        if file != self.state:  # or the next save would make the damaged state the previous one
            self.state.unlink(missing_ok=True)
        begun["options"]["sample_dir"] = config["options"]["sample_dir"]  # where pictures go from now on
        stored, marks = self.stored_config() or {}, ("started", "seed", "command")  # two may start in one second
        if self.results.exists() and any(stored.get(key) != begun.get(key) for key in marks):  # another run's
            self.rename_earlier(self.results)
        for key in ("versions", "commit", "device", "dtype"):
            if begun[key] != config[key]:
                warn(f"the run began with {key} {begun[key]}: the rest of it may differ a little")
        return state


def differences(before: dict[str, Any], now: dict[str, Any], keys: Iterable[str]) -> str:
    """How the options of two runs differ, for the user to read; empty if they do not."""
    return ", ".join(f"{flag(key)} {before.get(key)}, not {now[key]}" for key in keys if before.get(key) != now[key])


def data_of(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The data of a run, wherever its files were: the checksum or name of each of its own tasks, and all checksums."""
    checksums = config["data"]["checksums"]
    tasks = config["options"].get("tasks") or []
    return [checksums.get(str(Path(task)), task) for task in tasks], sorted(checksums.values())


def commit() -> str | None:
    """The commit this program runs from, with "-dirty" if files were changed since; None outside git."""
    if COMMIT in os.environ:
        return os.environ[COMMIT] or None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]  # no tags
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        if Path(__file__).with_name(".git").exists():  # as in a checkout of another owner
            said = " ".join((getattr(error, "stderr", None) or reason(error)).split())
            warn(f"the commit is not recorded: {said}; or put it into {COMMIT}")
        return None


def is_this_machine(host: str) -> bool:
    """Whether a host is the machine this runs on: a socket can have only its addresses."""
    with contextlib.suppress(OSError), socket.socket() as one:
        one.bind((host, 0))
        return True
    return host == "::1"


def plain(options: Any) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}


def describe_run(options: Any, tasks: Sequence[str], device: str, dtype: str) -> dict[str, Any]:
    """What it takes to repeat a run, besides its data: the content of its config.json."""
    import torchvision  # which has read the data by now

    versions = {module.__name__: str(module.__version__) for module in (torch, torchvision, np)}
    return {
        "name": options.name,
        "command": sys.argv,
        **{key: getattr(options, key) for key in ("experiment", "replay_mode", "recipe", "flags", "seed")},
        "options": plain(options) | {"sample_dir": str(options.sample_dir.resolve())},
        "tasks": list(tasks),
        "data": {},
        "device": device,
        "dtype": dtype,
        "versions": {"python": platform.python_version(), "cudnn": str(torch.backends.cudnn.version())} | versions,
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def print_summary(title: str, tasks: Sequence[str], summary: dict[str, Any], images: str) -> None:
    print(f"\n{title}: precision on each task's {images} after the last task")
    for number, name in enumerate(tasks):
        # The last measurement: a chain measures each scholar once.
        value = next(row[number] for row in reversed(summary["precision"]) if row[number] is not None)
        print(f"  task {number + 1}, {name}: {value:.4f}")
    print("average precision {average_precision:.4f}, forgetting {forgetting:.4f}, {seconds:.0f} s".format(**summary))


class Observer:
    """Hears what happens in a run, and by default does nothing.

    Tasks and iterations count from 1; a phase is "generator" or "solver". begin: a phase begins, with `done` of its
    iterations done before. step: an iteration is done. scalars: losses, or the precision on each task so far (in phase
    "test" on whole test sets, or measures of the generator). images: what the generator draws now, (n, channels,
    height, width) float in [0, 1]. end: the phase is done. close: the run is over, for better or worse.
    """

    image_interval: int | None = None  # generator iterations between calls of `images`; None: never

    def begin(self, phase: str, task: int, iterations: int, done: int) -> None: ...
    def step(self, iteration: int) -> None: ...
    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None: ...
    def images(self, task: int, iteration: int, images: Tensor) -> None: ...
    def end(self, phase: str, task: int) -> None: ...
    def close(self) -> None: ...


class RunFiles(Observer):
    """Writes the files in the result directory of a run. state: an unfinished run's `state_dict`, to continue them."""

    def __init__(self, directory: Path, config: dict[str, Any], state: dict[str, Any] | None = None):
        self.directory = directory
        self._file = directory / "metrics.csv"
        state = state or {"config": config, "metrics": "phase,task,iteration,name,value\n", "seconds": 0.0}
        self._config, self._metrics = state["config"], state["metrics"]
        self._started = time.monotonic() - state["seconds"]
        self._complete = self._warned = False  # whether the files hold everything; whether the user knows if not
        self._write_metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"config": self._config, "metrics": self._metrics, "seconds": time.monotonic() - self._started}

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        rows = io.StringIO()
        lines = ([phase, task, iteration, name, repr(value)] for name, value in values.items())
        csv.writer(rows, lineterminator="\n").writerows(lines)
        self._metrics += rows.getvalue()
        self._write_metrics(rows.getvalue())

    def _write_metrics(self, new: str = "") -> None:
        """Append what is new. If that fails, training continues, and the next call writes everything."""
        try:
            if self._complete:
                with self._file.open("r+") as file:  # fails if the file has gone
                    file.seek(0, io.SEEK_END)
                    file.write(new)
            else:
                write_json(self.directory / "config.json", self._config)
                with atomic_write(self._file) as file:
                    file.write(self._metrics)
            self._complete = True
        except OSError as error:
            self._complete = False
            if not self._warned:
                warn(f"{self._file}: {reason(error)}; training goes on and tries again")
                self._warned = True

    def write_summary(self, **content: Any) -> dict[str, Any]:
        """Write and return the outcome of the run: the content given, and how long the run took."""
        summary = {**content, "seconds": round(time.monotonic() - self._started, 1)}
        self._write_metrics()
        if not self._complete:
            raise UserError(f"{self._file} could not be written; put that right and --resume to finish the run")
        write_json(self.directory / "summary.json", summary)
        return summary


Curve = dict[int, float]  # values by iterations since the start of the run
PRECISION = re.compile(r"precision-(\d+)")  # the name of a scalar: precision on task 1, 2, ...; all others are losses
SAMPLES = "samples.png"  # the newest sample grid, in the result directory
MEASURES = ("backward_transfer", "forward_transfer", "incremental_average", "task_incremental")  # of later versions
SUMMARY_KEYS = ("precision", "average_precision", "forgetting", "seconds")
CONFIG = {"name": str, "experiment": str, "replay_mode": str, "recipe": str, "seed": int, "flags": list, "tasks": list}


class Run:
    """A run read back from its files: `config`, `summary` (None if unfinished) and `rows` (of metrics.csv).

    directory: its result directory. Raises UserError if the files are not those of a run.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], summary: dict[str, Any] | None, rows: Sequence[dict[str, str]]
    ):
        with reading(directory, f"{directory}: not the files of a run"):
            self.directory, self.config, self.summary, self.rows = directory, config, summary, rows
            for key, kind in CONFIG.items():
                if not isinstance(config[key], kind):
                    raise TypeError(f"config.json: {key} is {config[key]!r}")
            self.options = config["options"]
            self.name, self.seed, self.recipe, self.flags = (config[key] for key in ("name", "seed", "recipe", "flags"))
            self.experiment, self.replay_mode = config["experiment"], config["replay_mode"]
            names = {file.split("/")[0] for file in config["data"]["unverified"]}
            # What to call data sets whose files were not the official ones.
            unofficial = {name: config["data"].get(name, f"unofficial {name.upper()}") for name in sorted(names)}
            titles = {name.replace("-", ""): title for name, title in unofficial.items()}
            tasks = [titles.get(task.lower().replace("-", ""), task) for task in config["tasks"]]
            self.tasks = [task.encode(errors="replace").decode() for task in tasks]  # file names may not be UTF-8
            self.task_titles = [f"task {number}: {title}" for number, title in enumerate(self.tasks, start=1)]
            self.held_out = any(flag.startswith("--validation=") for flag in self.flags)  # no test images were used
            places = [(title, name.upper()) for name, title in unofficial.items()]
            places += [("held-out training images", "test images")] if self.held_out else []
            self.data_note = ", ".join(f"{one} in place of {other}" for one, other in places)  # for figures and tables
            # What runs of different seeds must share to be averaged.
            self.lengths = {p: int(self.options.get(f"{p}_iterations", 1)) for p in ("generator", "solver")}
            self.setting = self.experiment, self.replay_mode, self.recipe, tuple(self.flags), str(data_of(config))
            self.setting += tuple(self.lengths.values())  # which a recipe may not always have set the same
            hash((self.setting, " ".join(self.flags)))  # which read the rest of config.json
            for key in SUMMARY_KEYS if summary is not None else ():
                values = list(itertools.chain(*summary[key])) if key == "precision" else [summary[key]]
                if not all(isinstance(v, int | float) or (v is None and key == "precision") for v in values):
                    raise TypeError(f"summary.json: {key} is {summary[key]!r}")
            for key in MEASURES:
                if not isinstance(self.measure(key), int | float | None):
                    raise TypeError(f"summary.json: {key} is {summary[key]!r}")
            self.curves: dict[tuple[str, str], Curve] = {}  # by phase and name
            try:
                for line, row in enumerate(rows, start=2):  # noqa: B007
                    task, iteration, value = int(row["task"]), int(row["iteration"]), float(row["value"])
                    if length := self.lengths.get(row["phase"]):
                        self.curves.setdefault((row["phase"], row["name"]), {})[(task - 1) * length + iteration] = value
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"metrics.csv: line {line} is {dict(row)}") from error

    @classmethod
    def read(cls, directory: Path) -> "Run":
        with reading(directory, f"{directory}: not the files of a run"):
            config, summary = json.loads((directory / "config.json").read_bytes()), directory / "summary.json"
            outcome = json.loads(summary.read_bytes()) if summary.exists() else None
            metrics = (directory / "metrics.csv").read_text(encoding="utf-8-sig")  # a spreadsheet adds a mark
            metrics = metrics if outcome else metrics[: metrics.rfind("\n") + 1]  # a line may be under way
            rows = csv.DictReader(io.StringIO(metrics), delimiter=";" if ";" in metrics[:30] else ",")
            return cls(directory, config, outcome, list(rows))

    def precision(self, task: int) -> Curve:
        """Precision on task 1, 2, ... over solver iterations."""
        return self.curves.get(("solver", f"precision-{task}"), {})

    def average_precision(self) -> Curve:
        """The mean of the precisions on all tasks so far, over solver iterations."""
        curves = [self.precision(task) for task in range(1, len(self.tasks) + 1)]
        values = {x: [curve[x] for curve in curves if x in curve] for x in sorted(set().union(*curves))}
        return {x: sum(ys) / len(ys) for x, ys in values.items()}

    def replay(self, observer: Observer) -> None:
        """Report to an observer what was measured."""
        for (phase, task, iteration, _), rows in itertools.groupby(
            self.rows, key=lambda row: (*list(row.values())[:3], bool(PRECISION.fullmatch(row["name"])))
        ):
            observer.scalars(phase, int(task), int(iteration), {row["name"]: float(row["value"]) for row in rows})

    def measure(self, name: str) -> float | None:
        """A number of the summary, or None; of the task-incremental matrix, the average after the last task."""
        value = (self.summary or {}).get(name)
        last = [precision for precision in value[-1] if precision is not None] if isinstance(value, list) else None
        return sum(last) / len(last) if last else value

    def generator_measure(self, name: str) -> Curve:
        """A measure of the generator over tasks, from --measure-generator; empty if there is none."""
        measured = enumerate((self.summary or {}).get("generator", []), start=1)
        return {task: measures[name] for task, measures in measured if measures}

    def kept_samples(self) -> dict[tuple[int, int], Path]:
        """The pictures of --sample-log by task and iteration, in order."""
        renamed = re.search(r"(~\d+)?$", self.directory.name)[0]  # with the rest of the run, when a later one began
        paths = (Path(str(self.options.get("sample_dir", ""))) / f"{self.name}{renamed}").glob("*.jpg")
        numbers = ((re.fullmatch(r"task-(\d+)-iteration-(\d+)", path.stem), path) for path in paths)
        found = {(int(found[1]), int(found[2])): path for found, path in numbers if found}
        tasks, length = len(self.tasks), self.lengths["generator"]
        return {(task, i): found[task, i] for task, i in sorted(found) if task <= tasks and i <= length}


MODES = ["none", "noise-replay", "exact-replay", "generative-replay", "lwf", "joint"]
IN_ORDER = ["mnist-chain", "permutated-mnist", "mnist-svhn", "svhn-mnist", "split-mnist", "split-svhn", *MODES]


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories and below, behind symbolic links too.

    Leaves out runs that a later one has renamed, and with a warning those that can't be read.
    """
    runs, broken = {}, []
    for path in paths:
        found, unread, seen = [], [], set()
        for directory, inside, files in os.walk(path, followlinks=True):
            inside.sort()
            if (real := os.path.realpath(directory)) in seen:
                inside.clear()
            elif "config.json" in files:
                try:
                    found.append(Run.read(Path(directory)))
                except UserError as error:
                    unread.append(error)
            seen.add(real)
        found = found or ([] if unread else [Run.read(path)])  # which says what is wrong
        broken += unread
        newest = [run for run in found if not run.directory.name.startswith(f"{run.name}~")]
        runs |= {run.directory.resolve(): run for run in newest or found[:1]}
    for error in broken[not runs :]:
        warn(str(error))
    if not runs:
        raise broken[0]
    return list(runs.values())


class Setting:
    """Runs that differ in nothing but the seed. `label` tells a setting from the others of its figure.

    Results are those of the `finished` runs; if there are none, curves go as far as all runs have come.
    """

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.finished = [run for run in runs if run.summary]
        self.shown = self.finished or runs
        self.first = self.shown[0]
        self.label = self.first.replay_mode
        self.measures_generator = all(run.generator_measure("frechet_distance") for run in self.shown)

    def matrix(self) -> np.ndarray:
        """The precision matrix, averaged over seeds; NaN where nothing was measured."""
        return np.mean([np.array(run.summary["precision"], dtype=float) for run in self.finished], axis=0)

    def curve(self, of: Callable[[Run], Curve], ends: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Iterations, mean and standard deviation over seeds, wherever all runs were measured, or at ends of tasks."""
        curves, every = [of(run) for run in self.shown], self.first.lengths["solver"] if ends else 1
        xs = sorted(x for x in set.intersection(*map(set, curves)) if x % every == 0)
        ys = np.array([[curve[x] for x in xs] for curve in curves])
        return np.array(xs), ys.mean(axis=0), ys.std(axis=0, ddof=min(1, len(ys) - 1))


def group_runs(runs: Sequence[Run]) -> dict[str, list[Setting]]:
    """The settings of each experiment, in the order of the paper.

    Of two runs with the same setting and seed, a finished one counts, else the first.
    """
    rank = {name: number for number, name in enumerate(IN_ORDER)}
    same: dict[Any, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda r: (rank.get(r.experiment, 99), rank.get(r.replay_mode, 99), not r.summary)):
        seeds = same.setdefault((run.setting, len(run.tasks)), {})
        if seeds.setdefault(run.seed, run) is not run:
            warn(f"{run.directory} is left out: it is the same run as {seeds[run.seed].directory}")
    experiments: dict[str, list[Setting]] = {}
    for seeds in same.values():
        setting = Setting(list(seeds.values()))
        experiments.setdefault(setting.first.experiment, []).append(setting)
    for settings in experiments.values():
        label(settings)
    return experiments


def label(settings: Sequence[Setting]) -> None:
    """Label settings with the replay mode, and with recipe, flags and data where those of one mode differ in them."""
    for setting in settings:
        run = setting.first
        rivals = [other.first for other in settings if other.first.replay_mode == run.replay_mode]
        parts = [run.recipe] if len({rival.recipe for rival in rivals}) > 1 else []
        parts += [flag for flag in run.flags if not all(flag in rival.flags for rival in rivals)]
        alike = [rival for rival in rivals if (rival.recipe, rival.flags) == (run.recipe, run.flags)]
        if len({str(rival.lengths) for rival in alike}) > 1:  # a recipe that has changed since
            parts.append(f"{' and '.join(map(str, run.lengths.values()))} iterations")
        if len({rival.data_note for rival in rivals}) > 1:
            parts.append(run.data_note or "official data")
        setting.label = run.replay_mode + (f" ({', '.join(parts)})" if parts else "")
