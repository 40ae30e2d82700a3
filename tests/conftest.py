"""What tests share: small data sets in the official formats, and starting scripts as a user does."""

import contextlib
import copy
import io
import os
import runpy
import struct
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dgr  # noqa: E402
import models  # noqa: E402

torch.set_num_threads(1)  # as in the processes that tests start: sums over threads differ in their rounding

# Only the CPU repeats a run bit for bit, so tests see no GPU unless they take `gpu`.
choose_device = models.choose_device
models.choose_device = lambda *, gpus=True: torch.device("cpu")
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # for processes that tests start

# A scholar small enough for unit tests; no number is at its default, so that none can be ignored unnoticed.
SMALL = models.ScholarOptions(
    generator_z_size=5,
    generator_c_channel_size=2,
    generator_g_channel_size=2,
    generator_c_updates_per_g_update=1,
    generator_lambda=7.0,
    solver_depth=3,
    solver_reducing_layers=2,
    solver_channel_size=8,
    lr=1e-3,
    beta1=0.4,
    beta2=0.8,
    weight_decay=1e-4,
)


def small_scholar(**changes) -> dgr.Scholar:
    return models.make_scholar(1, 10, replace(SMALL, **changes))


class Constant:
    """A source whose images all have one value and one label."""

    def __init__(self, value: float, label: int):
        self.value, self.label = value, label

    def sample(self, n: int) -> dgr.Pairs:
        return torch.full((n, 1, 32, 32), self.value), torch.full((n,), self.label)

    def inputs(self, n: int) -> torch.Tensor:
        return self.sample(n)[0]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name


def relative_error(ours, theirs) -> float:
    """The length of the difference of two tensors, or of two lists of them, over the length of the second."""
    ours, theirs = (torch.cat([part.flatten().double() for part in each]) for each in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


# Sizes at which a run takes seconds.
TINY = [
    *("--mnist-permutation-number=2", "--no-visdom", "--unverified-data"),
    *("--generator-z-size=8", "--generator-c-channel-size=2", "--generator-g-channel-size=2"),
    *("--generator-c-updates-per-g-update=2", "--generator-iterations=4", "--solver-iterations=6"),
    *("--solver-channel-size=16", "--batch-size=8", "--lr=1e-3"),
    *("--test-size=50", "--sample-size=7", "--eval-log-interval=3", "--loss-log-interval=2"),
]


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array in MNIST's IDX format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">I", 0x0800 | array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def small_digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and labels (n,): a bright bar in noise; its height is the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    images = random.integers(0, 60, (n, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 7, 4:24] += 180
    return images, labels


def write_small_mnist(data_dir: Path) -> Path:
    raw = data_dir / "mnist" / "MNIST" / "raw"
    for part, n, seed in (("train", 200, 1), ("t10k", 100, 2)):
        images, labels = small_digits(n, seed)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return data_dir


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory) -> Path:
    """A data directory with a small unofficial MNIST."""
    return write_small_mnist(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The data directory with the real MNIST, or skip the test."""
    directory = Path(os.environ.get("DGR_DATA_DIR") or ROOT / "datasets")
    if not (directory / "mnist/MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip(f"no real MNIST in {directory} (set DGR_DATA_DIR to use another one)")
    return directory


def start(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a script as a user does, in the directory cwd."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as few users have it
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env={**usual, **WITHOUT_GPU, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Start a script as a user does, and wait until it ends."""
    with start(script, *arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script in this process, which has imported everything already: that saves seconds."""
    arguments = [str(ROOT / script), *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    status = 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", arguments),
    ):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except Exception:
            traceback.print_exc()
            status = 1
        finally:
            torch.set_flush_denormal(False)  # which utils.run_program sets for its process
    for stream in (out, err):
        stream.flush()
    return subprocess.CompletedProcess(arguments, status, *(s.buffer.getvalue().decode() for s in (out, err)))


def assert_one_line_error(process: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """The run ended with this exit status and one line on standard error that has these words in it."""
    assert process.returncode == status, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "error: " in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # which an example, or what else runs in this process, may have set


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph: keeps the operations of some work, and every number in them as it was."""

    def __init__(self):
        super().__init__()
        self.operations, self.fresh = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Do it all again into the same memory; not the first time, as recording was doing it too."""
        for func, args, kwargs, out in () if self.fresh else self.operations:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():  # no view
                    kept.copy_(new)
        self.fresh = False


@pytest.fixture
def recordings(monkeypatch):
    """Let --cuda-graphs work on the CPU; the list of what it records."""
    made = []

    def record(_captured, work):
        with Recording() as recording:
            values = work()
        made.append(recording)

        def replay():
            with torch.no_grad():
                recording.replay()
            return values

        return replay

    monkeypatch.setattr(models.Captured, "_aside", lambda _captured, work: work())
    monkeypatch.setattr(models.Captured, "_record", record)
    return made


@pytest.fixture
def gpu(monkeypatch):
    """Let the program use the GPU of this machine; skip the test if there is none."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    monkeypatch.setattr(models, "choose_device", choose_device)
    return choose_device()
