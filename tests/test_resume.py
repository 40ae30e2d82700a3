"""Runs that are stopped, killed or out of disk: what is left, and that they end as if nothing had happened."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY, WITHOUT_GPU, run, start

import main
import models
import train
import utils
import visual
from utils import UserError

NAME = "permutated-mnist-generative-replay-r0.3"
FLAGS = ["--sample-log", "--sample-log-interval=2", "--image-log-interval=2", "--checkpoint-interval=0"]


def flags(cwd, small_mnist, *more: str) -> list[str]:
    places = {"result": "results", "checkpoint": "checkpoints", "sample": "samples"}
    places = [f"--{kind}-dir={cwd / place}" for kind, place in places.items()]
    return ["--train", f"--data-dir={small_mnist}", *TINY, *FLAGS, *places, *more]


def run_here(arguments: list[str]) -> str:
    """Run main.py in this process, which saves its start; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.run_training(main.parse(arguments))
    return out.getvalue()


def outcome(cwd) -> dict[str, object]:
    """All files of a finished run, as bytes, times aside."""
    files = {
        str(path.relative_to(cwd)): path.read_bytes()
        for path in sorted(cwd.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".json") and path.name != NAME
    }
    scholar = models.load_checkpoint(cwd / "checkpoints" / NAME)
    weights = {name: value.numpy().tobytes() for name, value in scholar["scholar"].items()}
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
    left, plain = [saves], models.save_checkpoint

    def save(path, **content):
        if path.name.endswith(main.UNFINISHED):
            if left[0] == 0:
                raise Cut
            left[0] -= 1
        plain(path, **content)

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_checkpoint", save)
        with pytest.raises(Cut):
            run_here(arguments)


# 2 tasks of 4 generator and 6 solver iterations, saved after each, at the start and after each task: 23 states.
@pytest.mark.parametrize("saves", [1, 2, 5, 6, 11, 12, 14, 16, 17, 22, 23])
def test_resumed_run_is_the_run_that_was_never_stopped(tmp_path, small_mnist, whole, monkeypatch, saves):
    if saves < 23:
        run_until(monkeypatch, saves, flags(tmp_path, small_mnist))
    else:
        monkeypatch.setattr(train.RunFiles, "write_summary", lambda *_, **__: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            run_here(flags(tmp_path, small_mnist))
        monkeypatch.undo()
    assert "goes on at task" in run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole


@pytest.mark.parametrize(
    "arm",
    [
        ["--replay-mode=none"],
        ["--replay-mode=exact-replay", "--replay-targets=soft"],
        ["--replay-mode=noise-replay"],
        ["--experiment=mnist-chain", "--lr-schedule=linear"],
        ["--experiment=split-mnist", "--generator=vae", "--replay-targets=soft", "--lr-schedule=linear"],
    ],
)
def test_every_arm_resumes(tmp_path, small_mnist, monkeypatch, arm):
    name = main.run_name(main.parse(flags(tmp_path, small_mnist, *arm)))
    monkeypatch.setattr(sys.modules[__name__], "NAME", name)
    run_here(flags(tmp_path / "whole", small_mnist, *arm))
    run_until(monkeypatch, 17, flags(tmp_path / "cut", small_mnist, *arm))
    run_until(monkeypatch, 4, flags(tmp_path / "cut", small_mnist, *arm, "--resume"))
    run_here(flags(tmp_path / "cut", small_mnist, *arm, "--resume"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("graphs", [[], ["--cuda-graphs"]], ids=["eager", "captured"])
def test_a_run_on_a_gpu_is_cut_off_and_goes_on_there(tmp_path, small_mnist, monkeypatch, gpu, graphs):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist, *graphs))
    assert "goes on at task 2" in run_here(flags(tmp_path, small_mnist, *graphs, "--resume"))
    config = json.loads((tmp_path / "results" / NAME / "config.json").read_text())
    assert config["device"] == utils.device_name(gpu) != utils.device_name(torch.device("cpu"))
    main.run_test(main.parse(["--test", *flags(tmp_path, small_mnist)[1:]]))
    assert list((tmp_path / "samples").glob(f"{NAME}*.jpg"))


def test_resume_without_a_run_starts_one_and_leaves_a_finished_one_alone(tmp_path, small_mnist, whole):
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "finished" in run_here(flags(tmp_path, small_mnist, "--resume"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_resume_an_unfinished_run_is_set_aside_whole(tmp_path, small_mnist, monkeypatch, whole):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    left = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir() if path.suffix != ".lock"}
    run_here(flags(tmp_path, small_mnist))
    assert len(left) == 3
    for name, content in left.items():
        assert (tmp_path / "checkpoints" / f"{name}~1").read_bytes() == content
    assert (tmp_path / "results" / f"{NAME}~1" / "metrics.csv").exists()
    assert not (tmp_path / "results" / f"{NAME}~1" / "summary.json").exists()
    for suffix in ("", "~1"):
        pictures = visual.Run(tmp_path / "results" / f"{NAME}{suffix}").kept_samples().values()
        assert pictures and all(path.parent == tmp_path / "samples" / f"{NAME}{suffix}" for path in pictures)


def test_pictures_in_another_directory_after_a_stop_are_found(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    (tmp_path / "samples").rename(tmp_path / "moved")
    run_here(flags(tmp_path, small_mnist, "--resume", f"--sample-dir={tmp_path / 'moved'}"))
    assert len(visual.Run(tmp_path / "results" / NAME).kept_samples()) == 4


def test_resume_with_other_flags_is_refused(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 3, flags(tmp_path, small_mnist))
    with pytest.raises(UserError, match=r"--lr 0\.001, not 0\.5.*same flags"):
        run_here(flags(tmp_path, small_mnist, "--lr=0.5", "--resume"))


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


def test_resume_on_other_data_is_refused(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 3, flags(tmp_path, small_mnist))
    other = shutil.copytree(small_mnist, tmp_path / "other")
    labels = other / "mnist/MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match="other data files"):
        run_here(flags(tmp_path, other, "--resume"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "malicious", "missing"])
def test_damaged_state_is_named_and_the_one_before_it_used(tmp_path, small_mnist, whole, monkeypatch, capfd, damage):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    state = tmp_path / "checkpoints" / f"{NAME}{main.UNFINISHED}"
    harm(state, damage, tmp_path)
    run_here(flags(tmp_path, small_mnist, "--resume"))
    assert outcome(tmp_path) == whole
    assert not (tmp_path / "executed").exists()
    assert damage == "missing" or f"{state} is damaged" in capfd.readouterr().err


def test_two_damaged_states_are_refused(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 14, flags(tmp_path, small_mnist))
    state = tmp_path / "checkpoints" / f"{NAME}{main.UNFINISHED}"
    for path in (state, models.previous(state)):
        harm(path, "truncated", tmp_path)
    with pytest.raises(UserError, match=f"{NAME}.*no good state is left"):
        run_here(flags(tmp_path, small_mnist, "--resume"))
    assert state.exists() and models.previous(state).exists()


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
    elif damage == "malicious":
        torch.save({"format": models.CHECKPOINT_FORMAT, "training": Executed(directory)}, path)
    else:
        path.unlink()


def test_nothing_is_written_over_with_broken_weights(tmp_path, small_mnist, monkeypatch):
    """Losses are looked at seldom, weights before every save."""
    arguments = flags(tmp_path, small_mnist, "--loss-log-interval=1000")
    plain, steps = models.step, []

    def step(optimiser, loss):
        plain(optimiser, loss)
        steps.append(loss)
        if len(steps) == 9:  # the third generator iteration of two critic steps and one of the generator
            with torch.no_grad():
                optimiser.param_groups[0]["params"][0][0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(models, "step", step)
        with pytest.raises(UserError, match=r"diverged.*task 1, generator iteration 3.*--lr.*state is kept"):
            run_here(arguments)
    kept = models.load_checkpoint(tmp_path / "checkpoints" / f"{NAME}{main.UNFINISHED}")
    assert kept["training"]["done"]["generator"] == 2
    assert all(value.isfinite().all() for value in kept["training"]["scholar"].values())


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
    run = visual.Run(tmp_path / "results" / f"{NAME}-own")
    assert len(run.curves["generator", 'a, "b"']) == len(run.curves["generator", "precision-of-all"]) == 4
    plots = visual.LivePlots(run, "localhost", 1)
    plots.close()
    assert visual.loss_figure(visual.arms_of([run])[run.experiment]) is not None


def test_state_that_could_not_be_read_again_is_refused_at_once(own, monkeypatch):
    monkeypatch.setattr(Own, "extra", np.zeros(3))
    with pytest.raises(UserError, match="neither a tensor nor a plain value"):
        run_here(own)


def test_resume_with_a_changed_network_is_one_line(own, monkeypatch):
    run_until(monkeypatch, 14, own)
    monkeypatch.setattr(Own, "more", 1)
    with pytest.raises(UserError, match=r"\.unfinished.* does not fit the networks.*leave out --resume.*mask"):
        run_here([*own, "--resume"])


# ------------------------------------------------------------------------------ signals, kills, two runs at once

LONG = ["--generator-iterations=2000", "--solver-iterations=1000"]


def wait_until(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def start_long_run(cwd, small_mnist) -> subprocess.Popen:
    """A run that would last for minutes, some iterations after its start."""
    process = start("main.py", *flags(cwd, small_mnist, *LONG, "--checkpoint-interval=1000"), cwd=cwd)
    metrics = cwd / "results" / NAME / "metrics.csv"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4, process)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_says_how_to_go_on(tmp_path, small_mnist, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored, by the tests and the run alike
    process = start_long_run(tmp_path, small_mnist)
    signal.signal(number, before)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stopped at task 1, generator iteration" in error.splitlines()[-1] and "--resume" in error.splitlines()[-1]
    kept = models.load_checkpoint(tmp_path / "checkpoints" / f"{NAME}{main.UNFINISHED}")
    iteration = kept["training"]["done"]["generator"]
    assert f"generator iteration {iteration};" in error and iteration > 0


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, small_mnist):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = start_long_run(tmp_path, small_mnist)
    signal.signal(signal.SIGHUP, before)
    metrics = tmp_path / "results" / NAME / "metrics.csv"
    rows = len(metrics.read_text().splitlines())
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(metrics.read_text().splitlines()) > rows + 10, process)
    process.terminate()
    assert "stopped at task" in process.communicate(timeout=30)[1]


def test_resume_overwrites_no_other_run(tmp_path, small_mnist, monkeypatch):
    """A run that goes on in the results' directory of another: what the other left is set aside."""
    other = flags(tmp_path, small_mnist, f"--checkpoint-dir={tmp_path / 'others'}", "--seed=9")
    run_here(other)
    before = outcome_of(tmp_path / "results" / NAME)
    run_until(monkeypatch, 5, flags(tmp_path / "elsewhere", small_mnist))
    here = f"--result-dir={tmp_path / 'results'}"
    assert "goes on at task" in run_here(flags(tmp_path / "elsewhere", small_mnist, here, "--resume"))
    assert outcome_of(tmp_path / "results" / f"{NAME}~1") == before
    assert visual.Run(tmp_path / "results" / NAME).seed != 9


def outcome_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_damaged_state_never_takes_the_place_of_the_one_before(tmp_path, small_mnist, monkeypatch):
    run_until(monkeypatch, 5, flags(tmp_path, small_mnist))
    state = tmp_path / "checkpoints" / f"{NAME}{main.UNFINISHED}"
    assert models.previous(state).exists()
    state.write_bytes(b"damaged")
    good = models.previous(state).read_bytes()
    paths = main.Paths.of(main.parse(flags(tmp_path, small_mnist)))
    main.last_state(paths)
    assert state.exists()  # looking changes nothing
    saved = []
    monkeypatch.setattr(train.Training, "run", lambda training: saved.append(training._save_state()) or end_here())
    with pytest.raises(UserError, match="here"):
        run_here(flags(tmp_path, small_mnist, "--resume"))
    assert saved and models.previous(state).read_bytes() == good and models.load_checkpoint(state)


def end_here():
    raise UserError("here")


def test_numbers_of_what_was_set_aside_only_grow(tmp_path):
    for name in ("a", "a~1", "a~3", "ab~7"):
        (tmp_path / name).touch()
    assert utils.set_aside([tmp_path / "a", tmp_path / "b"]) == [(tmp_path / "a", tmp_path / "a~4")]


def test_one_directory_of_a_run_inside_another_is_set_aside_with_it(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    utils.set_aside([tmp_path / "a", tmp_path / "a/b"])
    assert (tmp_path / "a~1/b~1").is_dir() and [path.name for path in tmp_path.iterdir()] == ["a~1"]


def test_a_signal_that_comes_twice_saves_too(tmp_path, small_mnist):
    """As where a whole group of processes is stopped, and its leader hands the signal on."""
    process = start_long_run(tmp_path, small_mnist)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "--resume goes on" in error


def test_second_signal_leaves_at_once(tmp_path, small_mnist):
    """Even from a save that never ends, here to a pipe that nobody reads."""
    process = start_long_run(tmp_path, small_mnist)
    part = tmp_path / "checkpoints" / f".{NAME}{main.UNFINISHED}.part"
    os.mkfifo(part)
    try:
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None
        for _ in range(30):  # once more where the first one was noticed late
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
                break
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_second_run_of_the_same_name_refuses(tmp_path, small_mnist):
    first = start_long_run(tmp_path, small_mnist)
    try:
        with pytest.raises(UserError, match=f"another run of this name.*{NAME}"):
            run_here(flags(tmp_path, small_mnist))
        with pytest.raises(UserError, match="another run of this name"):
            run_here(flags(tmp_path, small_mnist, f"--result-dir={tmp_path / 'elsewhere'}"))
        with pytest.raises(UserError, match="another run of this name"):  # whose pictures would be mixed with its own
            others = [f"--{kind}-dir={tmp_path / 'elsewhere' / kind}" for kind in ("result", "checkpoint")]
            run_here(flags(tmp_path, small_mnist, *others))
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def kill_and_resume(cwd, small_mnist, seconds: float) -> bool:
    """Kill a run after this time; whether that was before its end. Then resume it to its end."""
    process = start("main.py", *flags(cwd, small_mnist, "--resume"), cwd=cwd)
    try:
        process.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow) for n in range(20)])
def test_killed_at_a_random_moment(tmp_path, small_mnist, whole, seed):
    """Killed three times, at moments of the whole life of a process, and finished in the end as if it never were."""
    moments = random.Random(seed)
    start_up = time.monotonic()
    run("main.py", "--help", cwd=tmp_path)
    start_up = time.monotonic() - start_up
    killed = sum(kill_and_resume(tmp_path, small_mnist, start_up * moments.uniform(0.5, 2.5)) for _ in range(3))
    assert run("main.py", *flags(tmp_path, small_mnist, "--resume"), cwd=tmp_path).returncode == 0
    assert outcome(tmp_path) == whole
    print(f"killed {killed} times of 3")


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
    script = KILLER.format(root=str(main.__file__).rsplit("/", 1)[0], left=9, moment=moment)
    arguments = flags(tmp_path, small_mnist)
    where = {"cwd": tmp_path, "env": {**os.environ, **WITHOUT_GPU}}
    process = subprocess.run([sys.executable, "-c", script, "-", "-", *arguments], capture_output=True, **where)
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
    models.save_checkpoint(tmp_path / "checkpoints/state", keep_previous=True, number=7)
    assert taken and models.load_checkpoint(tmp_path / "checkpoints/state")["number"] == 7
