"""Runs that are stopped, killed or out of disk: what is left, and that they end as if nothing had happened."""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, WITHOUT_GPU, run, start

import dgr
import main
import models
import train
import utils
import visual
from utils import Run, UserError

NAME = "permutated-mnist-generative-replay-r0.3"
FLAGS = ["--sample-log", "--sample-log-interval=2", "--image-log-interval=2", "--checkpoint-interval=0"]


def flags(cwd, small_mnist, *more: str) -> list[str]:
    places = [f"--{kind}-dir={cwd / kind}s" for kind in ("result", "checkpoint", "sample")]
    return ["--train", f"--data-dir={small_mnist}", *TINY, *FLAGS, *places, *more]


def run_here(arguments: list[str]) -> str:
    """Run main.py in this process, which saves its start; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.run_training(main.parse(arguments))
    return out.getvalue()


def state_of(cwd) -> Path:
    return cwd / "checkpoints" / f"{NAME}.unfinished"


def outcome(cwd) -> dict[str, object]:
    """All files of a finished run, as bytes, times aside."""
    files = {
        str(path.relative_to(cwd)): path.read_bytes()
        for path in sorted(cwd.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".json") and path.name != NAME
    }
    scholar = utils.load_checkpoint(cwd / "checkpoints" / NAME)
    weights = {
        name: getattr(value, "numpy", lambda v=value: np.array(v))().tobytes()
        for name, value in scholar["scholar"].items()
    }
    lines = (cwd / "results" / NAME / "summary.json").read_text().splitlines()
    return files | weights | {"summary": [line for line in lines if '"seconds"' not in line]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_mnist):
    """What a run leaves that is never stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    run_here(flags(cwd, small_mnist))
    return outcome(cwd)


class Cut(Exception):
    """Ends a run at once, as a kill would."""


def run_until(monkeypatch, saves: int, arguments: list[str]) -> None:
    """Run until the state has been saved so often, and end just before it would be saved again."""
    left, plain = [saves], utils.save_checkpoint

    def save(path, **content):
        if path.suffix == ".unfinished":
            if left[0] == 0:
                raise Cut
            left[0] -= 1
        plain(path, **content)

    with monkeypatch.context() as patch:
        patch.setattr(utils, "save_checkpoint", save)
        with pytest.raises(Cut):
            run_here(arguments)


# 2 tasks of 4 generator and 6 solver iterations, saved after each, at the start and after each task: 23 states.
@pytest.mark.parametrize("saves", [1, 2, 5, 6, 11, 12, 14, 16, 17, 22, 23])
def test_resumed_run_is_the_run_that_was_never_stopped(tmp_path, small_mnist, whole, monkeypatch, saves):
    if saves < 23:
        run_until(monkeypatch, saves, flags(tmp_path, small_mnist))
    else:
        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(utils.RunFiles, "write_summary", lambda *_, **__: (_ for _ in ()).throw(Cut()))
            run_here(flags(tmp_path, small_mnist))
    assert f"{NAME} continues at task" in run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize(
    "setting",
    [
        ["--replay-mode=none"],
        ["--replay-mode=exact-replay", "--replay-targets=soft", "--solver-distortion=1", "--validation=0.2"],
        ["--replay-mode=noise-replay", "--solver-distortion=1"],
        ["--experiment=mnist-chain", "--lr-schedule=linear"],
        ["--measure-generator", "--measured-images=100"],
        ["--experiment=split-mnist", "--recipe=vae", "--lr-schedule=linear"],
        ["--replay-mode=lwf", "--heads=task", "--penalty=ewc"],
        ["--replay-mode=joint"],
        ["--generator-conditional", "--replay-targets=own", "--heads=one"],
        ["--generator=flow", "--replay-pool=100"],
        ["--generator=conv-flow", "--replay-pool=100", "--replay-distortion=1", "--replay-elastic=1"],
    ],
)
def test_every_setting_resumes(tmp_path, small_mnist, monkeypatch, setting):
    monkeypatch.setattr(sys.modules[__name__], "NAME", main.parse(["--train", *setting]).name)
    monkeypatch.setattr(dgr.EWC, "images", 20)
    run_here(flags(tmp_path / "whole", small_mnist, *setting))
    run_until(monkeypatch, 17, flags(tmp_path / "cut", small_mnist, *setting))
    run_until(monkeypatch, 4, flags(tmp_path / "cut", small_mnist, *setting, "--resume"))
    run_here(flags(tmp_path / "cut", small_mnist, *setting, "--resume"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_falling_rate_reaches_graphs_recorded_before_and_after_a_resume(
    tmp_path, small_mnist, monkeypatch, recordings
):
    """A run with graphs, cut off, continued without and again with them, ends as the eager one, bit for bit."""
    settings = ["--lr-schedule=linear", "--generator-iterations=8", "--solver-iterations=8", f"--lr={2**-10}"]
    settings += ["--image-log-interval=8", "--sample-log-interval=8"]
    run_here(flags(tmp_path / "whole", small_mnist, *settings))
    assert not recordings
    cut = flags(tmp_path / "cut", small_mnist, *settings)
    run_until(monkeypatch, 13, [*cut, "--cuda-graphs"])
    recorded = len(recordings)
    run_until(monkeypatch, 10, [*cut, "--resume"])
    assert len(recordings) == recorded == 3  # critic, generator, solver
    run_here([*cut, "--resume", "--cuda-graphs"])
    assert len(recordings) > 3 and outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("graphs", [[], ["--cuda-graphs", "--lr-schedule=linear"]], ids=["eager", "captured"])
def test_a_run_on_a_gpu_is_cut_off_and_continues_there(tmp_path, small_mnist, monkeypatch, gpu, graphs):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist, *graphs))
    assert "continues at task 2" in run_here(flags(tmp_path, small_mnist, *graphs, "--resume"))
    config = json.loads((tmp_path / "results" / NAME / "config.json").read_text())
    assert config["device"] == models.device_name(gpu) != models.device_name(torch.device("cpu"))
    main.run_test(main.parse(["--test", *flags(tmp_path, small_mnist)[1:]]))
    assert list((tmp_path / "samples").glob(f"{NAME}*.jpg"))


def test_resume_without_a_run_starts_one_and_leaves_a_finished_one_alone(tmp_path, small_mnist, whole):
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "is finished: nothing to resume" in run_here(flags(tmp_path, small_mnist, "--resume"))
    with pytest.raises(UserError, match=r"holds a run with --lr 0\.001, not 0\.5: without --resume"):
        run_here(flags(tmp_path, small_mnist, "--lr=0.5", "--resume"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_resume_an_unfinished_run_is_renamed_whole(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    left = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir() if path.suffix != ".lock"}
    run_here(flags(tmp_path, small_mnist))
    assert len(left) == 3
    for name, content in left.items():
        assert (tmp_path / "checkpoints" / f"{name}~1").read_bytes() == content
    assert (tmp_path / "results" / f"{NAME}~1" / "metrics.csv").exists()
    assert not (tmp_path / "results" / f"{NAME}~1" / "summary.json").exists()
    for suffix in ("", "~1"):
        pictures = Run.read(tmp_path / "results" / f"{NAME}{suffix}").kept_samples().values()
        assert pictures and all(path.parent == tmp_path / "samples" / f"{NAME}{suffix}" for path in pictures)


def test_pictures_in_another_directory_after_a_stop_are_found(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    (tmp_path / "samples").rename(tmp_path / "moved")
    run_here(flags(tmp_path, small_mnist, "--resume", f"--sample-dir={tmp_path / 'moved'}"))
    assert len(Run.read(tmp_path / "results" / NAME).kept_samples()) == 4


def test_resume_with_other_flags_or_data_is_refused(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 3, flags(tmp_path, small_mnist))
    with pytest.raises(UserError, match=r"belongs to a run with --lr 0\.001, not 0\.5: use the same flags"):
        run_here(flags(tmp_path, small_mnist, "--lr=0.5", "--resume"))
    other = shutil.copytree(small_mnist, tmp_path / "other")
    labels = other / "mnist/MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match="other data files"):
        run_here(flags(tmp_path, other, "--resume"))


def test_a_run_goes_on_with_the_same_data_at_another_path(tmp_path, small_mnist, monkeypatch):
    """A finished one is left alone with them. Other data of the same name are refused by both."""
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8), np.arange(20) % 3
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a/own.npz", x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[10:])
    first = flags(tmp_path, small_mnist, "--tasks", str(tmp_path / "a/own.npz"), "mnist")
    run_until(monkeypatch, 14, first)
    (tmp_path / "a").rename(tmp_path / "b")
    mnist = shutil.copytree(small_mnist / "mnist/MNIST/raw", tmp_path / "raw")
    monkeypatch.chdir(tmp_path / "b")
    moved = flags(tmp_path, mnist, "--resume", "--tasks", "./own.npz", "mnist")
    other = tmp_path / "c/own.npz"
    other.parent.mkdir()
    np.savez(other, x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[9:19])
    elsewhere = flags(tmp_path, small_mnist, "--resume", "--tasks", str(other), "mnist")
    with pytest.raises(UserError, match="unfinished belongs to a run on other data files"):
        run_here(elsewhere)
    assert "continues at task 2" in run_here(moved)
    assert "is finished: nothing to resume" in run_here(moved)
    with pytest.raises(UserError, match="holds a run with other data in --tasks: without --resume"):
        run_here(elsewhere)


def test_a_run_of_an_earlier_version_lacks_options_that_are_new(tmp_path, small_mnist):
    """They count as their defaults."""
    run_here(flags(tmp_path, small_mnist))
    file = tmp_path / "results" / NAME / "config.json"
    config = json.loads(file.read_text())
    del config["options"]["image_size"]
    file.write_text(json.dumps(config))
    assert "nothing to resume" in run_here(flags(tmp_path, small_mnist, "--resume"))


def test_resume_may_change_what_decides_nothing(tmp_path, small_mnist, whole, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    run_here(flags(tmp_path, small_mnist, "--resume", "--checkpoint-interval=1000", "--visdom-port=9"))
    assert outcome(tmp_path) == whole


def test_resume_may_change_what_has_no_effect(tmp_path, small_mnist, monkeypatch):
    vae = ["--generator=vae", "--loss-log-interval=3"]
    run_until(monkeypatch, 3, flags(tmp_path, small_mnist, *vae))
    run_here(flags(tmp_path, small_mnist, "--generator=vae", "--generator-lambda=3", "--resume"))
    again = flags(tmp_path, small_mnist, "--generator=vae", "--mnist-split-number=2", "--resume")
    assert "nothing to resume" in run_here(again)


def test_a_run_from_a_kept_scholar_resumes_from_the_same_one(tmp_path, small_mnist, monkeypatch):
    run_here(flags(tmp_path / "kept", small_mnist, "--experiment=split-mnist", "--mnist-split-number=1"))
    (scholar,) = (tmp_path / "kept/checkpoints").glob("split*0.3")
    kept = f"--continue-from={scholar}"
    run_here(flags(tmp_path / "whole", small_mnist, kept))
    run_until(monkeypatch, 5, flags(tmp_path / "cut", small_mnist, kept))
    with scholar.open("ab") as file, pytest.raises(UserError, match="continues from another scholar"):
        file.write(b"x")
        file.flush()
        run_here(flags(tmp_path / "cut", small_mnist, kept, "--resume"))
    os.truncate(scholar, scholar.stat().st_size - 1)
    run_here(flags(tmp_path / "cut", small_mnist, kept, "--resume"))
    monkeypatch.setattr(sys.modules[__name__], "NAME", f"{NAME}-continued")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "function, picture",
    [("matplotlib.figure.Figure.savefig", "precision.png"), ("torchvision.utils.save_image", f"{NAME}-sample.jpg")],
)
def test_a_disk_that_is_full_at_the_last_picture_leaves_a_whole_run(
    tmp_path, small_mnist, whole, monkeypatch, function, picture
):
    plain = pkgutil.resolve_name(function)

    def full(*to, **how):
        if picture in to[-1].name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(*to, **how)

    with monkeypatch.context() as patch:
        patch.setattr(function, full)
        with pytest.raises(UserError, match=rf"{tmp_path}/.*{picture}: No space left.*results and scholar are whole"):
            run_here(flags(tmp_path, small_mnist))
    assert Run.read(tmp_path / "results" / NAME).summary and (tmp_path / "checkpoints" / NAME).exists()
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    next(tmp_path.rglob(picture)).unlink()  # by mistake
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole


def test_a_resumed_run_says_what_it_began_with(tmp_path, small_mnist, monkeypatch, capfd):
    """What differs from its beginning, not from the last time it was resumed."""
    for commit, saves, said in (("one", 2, ""), ("two", 2, "began with commit one"), ("one", 2, "")):
        monkeypatch.setenv(utils.COMMIT, commit)
        run_until(monkeypatch, saves, flags(tmp_path, small_mnist, "--resume"))
        errors = capfd.readouterr().err
        assert said in errors and ("began with" in errors) == bool(said)


def test_the_commit_of_a_tag_is_not_the_tags_name(tmp_path, monkeypatch):
    monkeypatch.delenv(utils.COMMIT, raising=False)
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init"], ["commit", "--allow-empty", "-m", "one"], ["tag", "-a", "v1", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert utils.commit() == head


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "malicious", "missing"])
def test_damaged_state_is_named_and_the_one_before_it_used(tmp_path, small_mnist, whole, monkeypatch, capfd, damage):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    state = state_of(tmp_path)
    harm(state, damage, tmp_path)
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    assert not (tmp_path / "executed").exists()
    assert damage == "missing" or f"{state} is damaged" in capfd.readouterr().err


def test_two_damaged_states_are_refused(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    states = state_of(tmp_path), utils.previous(state_of(tmp_path))
    for path in states:
        harm(path, "truncated", tmp_path)
    with pytest.raises(UserError, match=f"{NAME}.*no good state is left"):
        run_here(flags(tmp_path, small_mnist, "--resume"))
    assert all(path.exists() for path in states)


class Executed:
    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.system, (f"touch {self.directory}/executed",)


def harm(path, damage: str, directory) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        with zipfile.ZipFile(path) as archive:  # one bit within the largest tensor
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[largest.header_offset + 500] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "other format":
        torch.save({**torch.load(path, weights_only=True), "format": 0}, path)
    elif damage == "malicious":
        torch.save({"format": utils.CHECKPOINT_FORMAT, "training": Executed(directory)}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Executed(directory)))
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()


def test_a_state_is_not_taken_for_a_scholar(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 5, flags(tmp_path, small_mnist))
    with pytest.raises(UserError, match="state of an unfinished run, no scholar"):
        models.load_scholar(state_of(tmp_path), main.parse(flags(tmp_path, small_mnist)))


def test_a_damaged_state_never_takes_the_place_of_the_one_before(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 5, flags(tmp_path, small_mnist))
    state = state_of(tmp_path)
    state.write_bytes(b"damaged")
    good = utils.previous(state).read_bytes()
    main.parse(flags(tmp_path, small_mnist)).paths.last_state()
    assert state.exists()  # looking changes nothing

    def save_and_end(training):
        training.keep_state()
        raise Cut

    monkeypatch.setattr(train.Training, "run", save_and_end)
    with pytest.raises(Cut):
        run_here(flags(tmp_path, small_mnist, "--resume"))
    assert utils.previous(state).read_bytes() == good and utils.load_checkpoint(state)


def test_nothing_is_written_over_with_broken_weights(tmp_path, small_mnist, monkeypatch):
    """Losses are looked at seldom, weights before every save."""
    plain, steps = models.WGAN.generator_step, []

    def generator_step(self, *arguments):
        steps.append(plain(self, *arguments))
        if len(steps) == 3:
            with torch.no_grad():
                next(self.net.parameters())[0] = float("nan")
        return steps[-1]

    monkeypatch.setattr(models.WGAN, "generator_step", generator_step)
    with pytest.raises(UserError, match=r"diverged.*task 1, generator iteration 3.*--lr.*state is kept"):
        run_here(flags(tmp_path, small_mnist, "--loss-log-interval=1000"))
    kept = utils.load_checkpoint(state_of(tmp_path))["training"]
    assert kept["done"]["generator"] == 2
    assert all(value.isfinite().all() for value in kept["scholar"].values())


class Own(models.VAE):
    """A generator as somebody may write it: a buffer that is infinite, losses of any name, state of any kind."""

    extra: object = 1.5
    more = 0

    def __init__(self, image_channels, options):
        super().__init__(image_channels, options)
        self.register_buffer("mask", torch.full((2 + self.more, 2), -torch.inf).triu(1))

    def update(self, inputs):
        losses = super().update(inputs)
        return {'a, "b"': losses["reconstruction"], "precision-of-all": losses["divergence"]}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.fixture
def own(tmp_path, small_mnist, monkeypatch) -> list[str]:
    monkeypatch.setitem(models.GENERATORS, "own", Own)
    return flags(tmp_path, small_mnist, "--generator=own")


def test_losses_of_any_name_and_infinite_buffers_are_kept(own, tmp_path, monkeypatch):
    run_until(monkeypatch, 14, own)
    run_here([*own, "--resume"])
    run = Run.read(tmp_path / "results" / f"{NAME}-own")
    assert len(run.curves["generator", 'a, "b"']) == len(run.curves["generator", "precision-of-all"]) == 4
    visual.LivePlots(run, visual.VisdomOptions(visdom_port=1)).close()


def test_state_that_could_not_be_read_again_is_refused_at_once(own, monkeypatch):
    monkeypatch.setattr(Own, "extra", np.zeros(3))
    with pytest.raises(UserError, match="neither a tensor nor a plain value"):
        run_here(own)


def test_resume_with_a_changed_network_is_one_line(own, monkeypatch):
    run_until(monkeypatch, 14, own)
    monkeypatch.setattr(Own, "more", 1)
    with pytest.raises(UserError, match=r"\.unfinished.* does not fit the networks.*leave out --resume.*mask"):
        run_here([*own, "--resume"])


def test_resume_overwrites_no_other_run(tmp_path, small_mnist, monkeypatch):
    """A run that continues in the result directory of another, begun in the same second: what it left is renamed."""
    monkeypatch.setattr(utils.time, "strftime", lambda form: "2024-02-29T12:00:00+0000")

    def content(directory):
        return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}

    run_here(flags(tmp_path, small_mnist, f"--checkpoint-dir={tmp_path / 'others'}", "--seed=9"))
    before = content(tmp_path / "results" / NAME)
    run_until(monkeypatch, 5, flags(tmp_path / "elsewhere", small_mnist))
    here = f"--result-dir={tmp_path / 'results'}"
    assert "continues at task" in run_here(flags(tmp_path / "elsewhere", small_mnist, here, "--resume"))
    assert content(tmp_path / "results" / f"{NAME}~1") == before
    assert Run.read(tmp_path / "results" / NAME).seed == 0


def test_numbers_of_what_was_renamed_only_grow(tmp_path):
    """And one directory of a run inside another is renamed with it."""
    for name in ("a/b", "a~1", "a~3", "ab~7"):
        (tmp_path / name).mkdir(parents=True)
    paths = utils.RunPaths("x", utils.FileOptions())
    paths.rename_earlier(tmp_path / "a", tmp_path / "a/b", tmp_path / "c")
    assert (tmp_path / "a~4/b~4").is_dir() and len(list(tmp_path.iterdir())) == 4


# ------------------------------------------------------------------------------ signals, kills, two runs at once


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    """Wait for something to happen while a process, if any, is running."""
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def rows(cwd) -> int:
    metrics = cwd / "results" / NAME / "metrics.csv"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@contextlib.contextmanager
def long_run(cwd, small_mnist):
    """A run that would last for minutes, some iterations after its start."""
    sizes = ["--generator-iterations=2000", "--solver-iterations=1000", "--checkpoint-interval=1000"]
    process = start("main.py", *flags(cwd, small_mnist, *sizes), cwd=cwd)
    try:
        wait_until(lambda: rows(cwd) > 4, process)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def hangup():
    """Sets what a terminal's end does to this process and to those that it starts: nohup has it ignored."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_signal_saves_and_says_how_to_continue(tmp_path, small_mnist, hangup, number):
    """What people and schedulers send; for SIGTERM, SIGUSR2 and SIGXCPU see below."""
    hangup(signal.SIG_DFL)
    number = signal.Signals[number]
    with long_run(tmp_path, small_mnist) as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    iteration = utils.load_checkpoint(state_of(tmp_path))["training"]["done"]["generator"]
    assert f"stopped at task 1, generator iteration {iteration};" in error.splitlines()[-1] and iteration > 0
    assert "run the same command with --resume to continue" in error.splitlines()[-1]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, small_mnist, hangup):
    hangup(signal.SIG_IGN)
    with long_run(tmp_path, small_mnist) as process:
        before = rows(tmp_path)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: rows(tmp_path) > before + 10, process)
        process.terminate()
        assert "stopped at task" in process.communicate(timeout=30)[1]


def test_a_signal_that_comes_twice_saves_too(tmp_path, small_mnist):
    """As where a whole group of processes is stopped, and its leader hands the signal on."""
    with long_run(tmp_path, small_mnist) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "--resume to continue" in error


def test_warnings_of_schedulers_that_are_repeated_do_not_cut_a_save_short(monkeypatch):
    clock = itertools.count(step=10)
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    with utils.stop_requests() as stopping:
        assert not stopping()
        for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
            signal.raise_signal(number)
        assert stopping() == signal.SIGXCPU
    for number in utils.WARNINGS:
        signal.signal(number, signal.SIG_DFL)


def test_a_run_in_a_thread_with_other_output_is_a_run(tmp_path, small_mnist, whole, monkeypatch):
    """As in notebooks and web services, where signals go to the main thread."""

    class Written:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Written())
        patch.setattr(sys, "stderr", Written())
        patch.setattr(sys, "argv", ["main.py"])
        arguments = flags(tmp_path, small_mnist)
        thread = threading.Thread(target=utils.run_program, args=[lambda: main.main(arguments)])
        thread.start()
        thread.join()
        assert "average precision" in sys.stdout.text and "task 2/2 solver" in sys.stderr.text
    assert outcome(tmp_path) == whole


def test_second_signal_leaves_at_once(tmp_path, small_mnist):
    """Even from a save that never ends, here to a pipe that nobody reads."""
    with long_run(tmp_path, small_mnist) as process:
        os.mkfifo(tmp_path / "checkpoints" / f".{NAME}.unfinished.part")
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        for _ in range(30):  # once more where the first one was noticed late
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
                break
        assert process.returncode == -signal.SIGINT


def test_second_run_of_the_same_name_refuses(tmp_path, small_mnist):
    elsewhere = {kind: f"--{kind}-dir={tmp_path / 'elsewhere' / kind}" for kind in ("result", "checkpoint")}
    with long_run(tmp_path, small_mnist) as first:
        # Whatever they share: everything, scholar and pictures, or pictures alone.
        for others in ([], [elsewhere["result"]], elsewhere.values()):
            with pytest.raises(UserError, match=f"another run of this name.*{NAME}"):
                run_here(flags(tmp_path, small_mnist, *others))
        assert first.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(tmp_path, small_mnist, whole, seed):
    """Killed three times, at moments of the whole life of a process, and finished in the end as if it never were."""
    moments = random.Random(seed)
    start_up = time.monotonic()
    run("main.py", "--help", cwd=tmp_path)
    start_up = time.monotonic() - start_up
    for _ in range(3):
        with start("main.py", *flags(tmp_path, small_mnist, "--resume"), cwd=tmp_path) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=start_up * moments.uniform(0.5, 2.5))
            process.kill()
    assert run("main.py", *flags(tmp_path, small_mnist, "--resume"), cwd=tmp_path).returncode == 0
    assert outcome(tmp_path) == whole


KILLER = """
import os, random, signal, sys
sys.argv = ["main.py", *sys.argv[3:]]
sys.path.insert(0, {root!r})
import main, utils
left, moment = int({left}), {moment!r}
plain = {{"write": os.fsync, "keep": os.replace, "rename": os.replace}}[moment]
def deadly(*arguments):
    global left
    at = moment == "write" or arguments[1].name.endswith(".previous") == (moment == "keep")
    left -= at
    if at and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
setattr(os, plain.__name__, deadly)
utils.run_program(main.main)
"""


@pytest.mark.parametrize("moment", ["write", "keep", "rename"])
def test_killed_within_a_checkpoint_write(tmp_path, small_mnist, whole, moment):
    """Before the file is flushed, before the old one is moved away, and between that and the new one's coming."""
    script = KILLER.format(root=str(ROOT), left=9, moment=moment)
    where = {"cwd": tmp_path, "env": {**os.environ, **WITHOUT_GPU}}
    command = [sys.executable, "-c", script, "-", "-", *flags(tmp_path, small_mnist)]
    process = subprocess.run(command, capture_output=True, **where)
    assert process.returncode == -signal.SIGKILL, process.stderr
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    assert not list(tmp_path.rglob("*.part"))


def test_a_directory_that_vanishes_while_a_state_is_written_is_made_again(tmp_path, monkeypatch):
    fsync, taken = os.fsync, []

    def vanish(descriptor):
        fsync(descriptor)
        if not taken:
            taken.append(shutil.rmtree(tmp_path / "checkpoints"))

    monkeypatch.setattr(os, "fsync", vanish)
    utils.save_checkpoint(tmp_path / "checkpoints/state", keep_previous=True, number=7)
    assert taken and utils.load_checkpoint(tmp_path / "checkpoints/state")["number"] == 7
