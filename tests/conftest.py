"""What the tests share: small data sets in the official formats, and starting main.py as a user does."""

import contextlib
import io
import os
import runpy
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import utils  # noqa: E402

torch.set_num_threads(1)  # as in the processes that tests start: sums over threads differ in their rounding

# Only the CPU repeats a run bit for bit. Tests see no GPU, but those that take `gpu`.
choose_device = utils.choose_device
utils.choose_device = lambda *, gpus=True: torch.device("cpu")
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # for processes that tests start

# A scholar small enough for unit tests, with nothing at its default that could be ignored.
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

# Sizes at which a run takes seconds.
TINY = [
    "--mnist-permutation-number=2",
    "--generator-z-size=8",
    "--generator-c-channel-size=2",
    "--generator-g-channel-size=2",
    "--generator-c-updates-per-g-update=2",
    "--generator-iterations=4",
    "--solver-channel-size=16",
    "--solver-iterations=6",
    "--batch-size=8",
    "--test-size=50",
    "--sample-size=7",
    "--eval-log-interval=3",
    "--loss-log-interval=2",
    "--lr=1e-3",
    "--no-visdom",
    "--unverified-data",
]


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array in the IDX format of the MNIST files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">I", 0x0800 | array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def small_digits(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and labels (n,): a bright bar whose place is the class, in noise."""
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
    """The data directory with the real MNIST, where there is one."""
    directory = Path(os.environ.get("DGR_DATA_DIR") or ROOT / "datasets")
    if not (directory / "mnist/MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip(f"no real MNIST in {directory} (DGR_DATA_DIR names another place)")
    return directory


def start(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a script as a user does, in an empty directory of its own."""
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
    """Start a script as a user does, and wait for its end."""
    with start(script, *arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same in this process, which has imported everything: seconds less for what is no matter of processes."""
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
    for stream in (out, err):
        stream.flush()
    return subprocess.CompletedProcess(arguments, status, *(s.buffer.getvalue().decode() for s in (out, err)))


def assert_one_line_error(process: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """The run ended as an error must: its exit status, and one line on standard error with these words in it."""
    assert process.returncode == status, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "error: " in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def gpu(monkeypatch):
    """What the program does on the GPU of this machine; skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    monkeypatch.setattr(utils, "choose_device", choose_device)
    return choose_device()
