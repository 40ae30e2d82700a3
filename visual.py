#!/usr/bin/env python3
"""What people look at: progress bars, live plots in visdom, sample grids, figures.

What is drawn after a run needs only its files:

    ./visual.py results                                          the table of all runs in a directory
    ./visual.py results --figures figures --report report.html   all their figures, and a page with everything
    ./visual.py results/A results/B --output figure.png          the precision plots of some, side by side
    ./visual.py results/A --visdom                               what live plots would have shown, on a visdom server
"""

import base64
import contextlib
import csv
import html
import itertools
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from PIL.Image import registered_extensions
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from utils import FREE_TO_CHANGE, Parser, UserError, atomic_write, reason, run_program, warn

# Titles hold names of files, and those may have dollars.
rcParams.update({"text.parse_math": False, "axes.titlesize": "medium", "figure.titlesize": "medium"})

# One colour per task in every figure (Okabe and Ito's, which the colour-blind can tell apart), repeated after seven,
# and in those from files one dash pattern, for prints in grey.
TASK_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
TASK_DASHES = ["-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1))]


def task_colour(task: int) -> str:
    """The colour of task 1, 2, ..."""
    return TASK_COLOURS[(task - 1) % len(TASK_COLOURS)]


def task_dash(task: int) -> Any:
    """The dash pattern of task 1, 2, ..., as matplotlib writes it."""
    return TASK_DASHES[(task - 1) % len(TASK_DASHES)]


PRECISION = re.compile(r"precision-(\d+)")  # among the names of scalars: that on task 1, 2, ...; others are losses


class Observer:
    """Told what happens in a run; does nothing unless a subclass says so. Tasks and iterations count from 1."""

    image_interval: int | None = None  # generator iterations between calls of `images`; None: never

    def begin(self, phase: str, task: int, iterations: int, done: int) -> None:
        """A phase ("generator" or "solver") of a task begins."""

    def step(self, iteration: int) -> None:
        """An iteration of the phase is done."""

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        """Losses, or the precision on each task so far."""

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        """What the generator draws now: (n, channels, height, width) float in [0, 1]."""

    def end(self, phase: str, task: int) -> None:
        """The phase is done."""

    def close(self) -> None:
        """The run is over, for better or worse."""


# ---------------------------------------------------------------------------------------------- progress bars


class Progress(Observer):
    """A bar for each phase on a terminal, a line for each phase elsewhere."""

    def __init__(self, tasks: int):
        self._tasks = tasks
        self._values: dict[str, float] = {}
        self._bar: tqdm | None = None

    def begin(self, phase: str, task: int, iterations: int, done: int) -> None:
        self._title, self._left = f"task {task}/{self._tasks} {phase}", iterations - done
        self._values, self._started = {}, time.monotonic()
        if sys.stderr.isatty():
            bar = {"desc": self._title, "file": sys.stderr, "dynamic_ncols": True}
            self._bar = tqdm(total=iterations, initial=done, **bar)  # whose rate is of what is done here

    def step(self, iteration: int) -> None:
        if self._bar is not None:
            self._bar.update()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        self._values |= values
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(), refresh=False)

    def end(self, phase: str, task: int) -> None:
        if self._bar is not None:
            self.close()
            return
        seconds = time.monotonic() - self._started
        with contextlib.suppress(OSError):  # a terminal that has gone ends no run
            print(f"{self._title}: {self._left} iterations in {seconds:.0f} s, {self._summary()}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _summary(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self._values.items())


# ------------------------------------------------------------------------------------------------ sample grids

IMAGES_PER_ROW = 6
SAMPLES = "samples.png"  # the newest grid, in the directory of a run
SAMPLE_LOG = "sample-log"  # and where a run that is kept for good has those of --sample-log


def save_samples(images: Tensor, path: Path) -> None:
    """Save images (n, channels, height, width) float in [0, 1] as one picture, six a row."""
    with atomic_write(path, "wb") as file:
        save_image(images.cpu(), file, nrow=IMAGES_PER_ROW, format=registered_extensions()[path.suffix])


def kept_sample(directory: Path, task: int, iteration: int) -> Path:
    """Where --sample-log puts a picture."""
    return directory / f"task-{task}-iteration-{iteration}.jpg"


class SamplePictures(Observer):
    """Pictures of samples through training, each where `place(task, iteration)` says."""

    def __init__(self, place: Callable[[int, int], Path], image_interval: int):
        self.place = place
        self.image_interval = image_interval

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        path = self.place(task, iteration)
        try:
            save_samples(images, path)
        except OSError as error:  # a picture is no reason to end training
            warn(f"{path}: {reason(error)}; training goes on without this picture")


# -------------------------------------------------------------------------------------------------- live plots


POST_TIMEOUT = (2.0, 3.0)  # seconds to connect, and to wait for an answer
WINDOW = {"width": 600, "height": 340, "marginright": 20, "margintop": 64, "marginbottom": 76}  # two in 1280 pixels
SAMPLES_WINDOW = {"width": 340, "height": 340}
LABEL_CHARACTERS = 75  # that fit above a plot


def retell(run: "Run", observer: Observer) -> None:
    """Tell an observer what the files of a run hold already."""
    when = ("phase", "task", "iteration")
    for (phase, task, iteration), rows in itertools.groupby(run.rows, key=lambda row: [row[part] for part in when]):
        observer.scalars(phase, int(task), int(iteration), {row["name"]: float(row["value"]) for row in rows})


Post = tuple[str, dict[str, Any]]  # a method of a visdom client, and its arguments


class LivePlots(Observer):
    """Live plots of a run on a visdom server, in the environment of its name. Training never waits for them.

    A window for precision and for each loss, with one curve per task in the task's colour, and a dotted line where each
    task begins. What the files of the run hold already is shown first. A thread of its own posts the newest state of
    each window, whole: a slow server gets fewer updates, one that comes back gets complete plots. The windows that an
    earlier run of the same name left are closed.
    """

    RETRY_SECONDS = 10.0
    CLOSE_SECONDS = 5.0

    def __init__(self, run: "Run", server: str, port: int):
        self.image_interval = run.config["options"]["image_log_interval"]
        self._lengths, self._titles = run.lengths, run.task_titles
        self._address = f"{server}:{port}"
        self._connection = {"server": server, "port": port, "env": run.environment}
        self._curves: dict[str, dict[int, Curve]] = {"precision": {1: {}}}  # of each window, by task
        self._newest: dict[str, Callable[[], Post]] = {}  # what makes the newest state of each window
        self._pending: dict[str, Callable[[], Post]] = {}  # of those that are not posted yet
        self._changed = threading.Condition()
        self._closing = self._warned = self._down = self._cleared = False
        self._show("precision")  # the first window
        retell(run, self)
        with contextlib.suppress(OSError):  # no picture, or not a whole one
            pixels = np.asarray(Image.open(run.directory / SAMPLES).convert("RGB"))  # that of a kept run is grey
            opts = {"title": f"samples of {run.config['name']}"} | SAMPLES_WINDOW
            self._post(samples=lambda: ("image", {"img": pixels.transpose(2, 0, 1), "opts": opts}))
        self._thread = threading.Thread(target=self._post_all, daemon=True)
        self._thread.start()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        if phase not in self._lengths:
            return
        with self._changed:
            for name, value in values.items():
                window, curve = f"{phase} {name}", task
                if found := PRECISION.fullmatch(name):
                    window, curve = "precision", int(found[1])
                at = (task - 1) * self._lengths[phase] + iteration
                self._curves.setdefault(window, {}).setdefault(curve, {})[at] = value
                self._show(window)

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        opts = {"title": f"samples: task {task}, iteration {iteration}"} | SAMPLES_WINDOW
        pixels = (images * 255).byte().cpu().numpy()
        self._post(samples=lambda: ("images", {"tensor": pixels, "nrow": IMAGES_PER_ROW, "opts": opts}))

    @property
    def unsent(self) -> bool:
        """Whether something has not been taken by the server."""
        return self._down or bool(self._pending) or self._thread.is_alive()

    def close(self) -> None:
        """Post what is still to be posted: for a few seconds at most, and not to a server that has not answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=0.1 if self._down else self.CLOSE_SECONDS)

    def _show(self, window: str) -> None:
        """Have the curves of a window posted; they are put together then, not here, where training waits."""
        self._post(**{window: partial(self._line, window)})

    def _post(self, **makers: Callable[[], Post]) -> None:
        with self._changed:
            self._newest |= makers
            self._pending |= makers
            self._changed.notify()

    def _line(self, window: str) -> Post:
        """The curves of a window as columns of one matrix, absent points being NaN."""
        curves, phase = self._curves[window], "solver" if window == "precision" else window.split()[0]
        x = sorted(set().union(*curves.values())) or [0]
        y = np.array([[curve.get(at, np.nan) for curve in curves.values()] for at in x])
        loss = window.removeprefix(f"{phase} ").replace("-", " ")
        title = loss if phase in loss or window == "precision" else f"{phase} {loss}"
        opts: dict[str, Any] = {"title": title, "xlabel": f"{phase} iterations", "ylabel": title, **WINDOW}
        opts["legend"] = [self._titles[task - 1] for task in curves]
        opts["linecolor"] = np.array([list(bytes.fromhex(task_colour(task)[1:])) for task in curves])
        if window == "precision":
            opts |= {"ylabel": "precision (share of test images)", "ytickmin": 0, "ytickmax": 1.01}
            opts |= {"markers": True, "markersize": 4, "markerborderwidth": 0}  # a single point is seen too
        fits = sum(map(len, self._titles)) <= LABEL_CHARACTERS
        line = {"type": "line", "line": {"color": "#808080", "dash": "dot", "width": 1.5}}
        label = {"y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
        shapes, labels = [], []
        for task in range(1, max(curves) + 1):
            at, title = (task - 1) * self._lengths[phase], self._titles[task - 1]
            shapes.append({"yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1} | line)
            font = {"size": 11, "color": task_colour(task)}
            text = title if fits else f"task {task}"
            labels.append({"yref": "paper", "x": at, "text": text, "font": font} | label)
        legend = {"orientation": "h", "y": -0.31, "yanchor": "top"}
        opts["layoutopts"] = {"plotly": {"shapes": shapes, "annotations": labels, "legend": legend}}
        # A single column would be taken for several points of one curve.
        return "line", {"X": np.array(x), "Y": y if y.shape[1] > 1 else y[:, 0], "opts": opts}

    def _post_all(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                window, newest = next(iter(self._pending.items()))
                del self._pending[window]
            try:
                with self._changed:
                    method, arguments = newest()
                client = client or connect(**self._connection)
                # A copy of the options, because visdom takes some out, and what fails is posted again.
                post = partial(getattr(client, method), win=window, **arguments)
                post(opts=dict(arguments["opts"]))
                if not self._cleared:  # after the first post, because only then is the environment sure to exist
                    client.close()
                    post(opts=dict(arguments["opts"]))
                    self._cleared = True
                self._down = False
            except Exception as error:  # Whatever a plot server does, training goes on.
                client, self._down = None, True
                if not self._warned:
                    warn(f"no live plots: visdom at {self._address}: {reason(error)[:200]}; training goes on")
                    self._warned = True
                if isinstance(error, ImportError):
                    return
                with self._changed:
                    self._pending = dict(self._newest)  # all of them: a server that was started anew has none
                    if self._changed.wait_for(lambda: self._closing, timeout=self.RETRY_SECONDS):
                        return


def connect(*, server: str, port: int, env: str) -> Any:
    """A visdom client that gives up after seconds, where visdom's own would wait for ever."""
    import visdom

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            response = self.session.post(url, data=data or {}, timeout=POST_TIMEOUT)
            response.raise_for_status()
            return response.text

    logging.getLogger("visdom").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    server = server if "://" in server else f"http://{server}"
    return Client(server=server, port=port, env=env, use_incoming_socket=False, raise_exceptions=True)


# ------------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard(Observer):
    """The scalars of `metrics.csv`, sample grids and options (as hparams) of a run, for TensorBoard.

    What the files of the run hold already is written anew, and the sample grids that were there are kept: a run that
    goes on after a stop has every point once. Needs the package tensorboard, but not its SummaryWriter, whose thread
    keeps the newest points for itself and leaves a traceback where a disk is full.
    """

    def __init__(self, run: "Run"):
        self.image_interval, self._tasks = run.options["image_log_interval"], len(run.tasks)
        self._lengths = {**run.lengths, "test": run.lengths["solver"]}
        self._directory, self._failed = run.directory / "tensorboard", False
        with self._trying():
            self._start(run)

    def _start(self, run: "Run") -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import RecordWriter, summary

        before = list(self._directory.glob("events.*"))
        events = (event for file in before for event in LegacyEventFileLoader(str(file)).Load())
        grids = {event.step: event for event in events if any(value.tag == "samples" for value in event.summary.value)}
        self._drawn, self._event, self._summary = set(grids), Event, summary
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = (self._directory / f"events.out.tfevents.{time.time():.6f}").open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START))  # what a reader has of earlier files is void
        values = {key: v if isinstance(v, int | float) else str(v) for key, v in run.options.items() if v is not None}
        *about, self._finished = summary.hparams(values, {"average-precision": 0.0})
        for part in about:
            self._write(summary=part)
        for grid in grids.values():
            self._writer.write(grid.SerializeToString())
        retell(run, self)
        for file in before:
            file.unlink()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        at = (task - 1) * self._lengths[phase] + iteration
        with self._trying():
            for name, value in values.items():
                self._write(step=at, summary=self._summary.scalar(f"{phase}/{name}", value))
            if phase == "test" and task == self._tasks:
                average = sum(values.values()) / len(values)
                self._write(step=at, summary=self._summary.scalar("average-precision", average))
                self._write(summary=self._finished)

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        at = (task - 1) * self._lengths["generator"] + iteration
        with self._trying():
            if at not in self._drawn:
                grid = make_grid(images.cpu(), IMAGES_PER_ROW).numpy()
                self._write(step=at, summary=self._summary.image("samples", grid, dataformats="CHW"))

    def close(self) -> None:
        with self._trying():
            self._file.close()

    def _write(self, **content: Any) -> None:
        if not self._failed:
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Warn once if these files can't be written; training goes on."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                warn(f"{self._directory}: {reason(error)}; training goes on, and --resume writes these files anew")
            self._failed = True


# ------------------------------------------------------------------------------------------ figures from files


# The end of training as published, the mean over tasks, read off figures: of the paper, and of the 2017 repository.
# In the order of the paper.
PUBLISHED: dict[tuple[str, str], tuple[str, str]] = {
    ("mnist-chain", "generative-replay"): (".9856", ""),
    ("permutated-mnist", "none"): (".53", ".75 to .79"),
    ("permutated-mnist", "noise-replay"): (".66", ""),
    ("permutated-mnist", "exact-replay"): (".955", ".96 to .97"),
    ("permutated-mnist", "generative-replay"): (".93", ".89 to .91"),
    ("mnist-svhn", "none"): (".843", ".81"),
    ("mnist-svhn", "exact-replay"): (".945", ".935"),
    ("mnist-svhn", "generative-replay"): (".94", ".923"),
    ("svhn-mnist", "none"): (".815", ".815"),
    ("svhn-mnist", "exact-replay"): (".948", ".945"),
    ("svhn-mnist", "generative-replay"): (".943", ".915"),
    ("split-mnist", "none"): (".175", ""),
    ("split-mnist", "noise-replay"): (".20", ""),
    ("split-mnist", "exact-replay"): (".975", ""),
    ("split-mnist", "generative-replay"): (".95", ""),
}
EXPERIMENTS = list(dict.fromkeys(experiment for experiment, _ in PUBLISHED))
# Data of the README's runs that are not the official files, by md5 checksum of the file.
STAND_INS = dict.fromkeys(["d4c8bae1cc7bd94ad847c0aec19ecb15", "c66e0d9c3d22d2b4574b302f80fd1682"], "SVHN-grey")
MODES = ["none", "noise-replay", "exact-replay", "generative-replay"]
# What the runs of one arm may differ in.
WITHIN_AN_ARM = FREE_TO_CHANGE | {"seed", "test_size", "sample_size"}
WITHIN_AN_ARM |= {f"{kind}_log_interval" for kind in ("sample", "image", "eval", "loss")}
SUMMARY_KEYS = ("precision", "average_precision", "forgetting", "seconds")
Curve = dict[int, float]  # values by iterations since the start of the run


def printable(text: str) -> str:
    """Text without what no file or figure can hold: bytes of a file's name that are not UTF-8."""
    return text.encode(errors="replace").decode()


class Run:
    """The files of a run, read back: `config`, `summary` (None if unfinished) and the rows of `metrics.csv`."""

    def __init__(self, directory: Path):
        try:
            self.config = json.loads((directory / "config.json").read_text())
            summary = directory / "summary.json"
            self.summary = json.loads(summary.read_text()) if summary.exists() else None
            for key in SUMMARY_KEYS if self.summary is not None else ():
                self.summary[key]
            with (directory / "metrics.csv").open(newline="") as file:
                self.rows = list(csv.DictReader(file))
            self.tasks, self.options = self.config["tasks"], self.config["options"]
            self.options.setdefault("lr_schedule", "constant")  # of a run from before there was a choice
            names = {name.replace("-", ""): called for name, called in self.unofficial.items()}
            self.tasks = [printable(names.get(title.lower().replace("-", ""), title)) for title in self.tasks]
            self.name, self.seed = self.config["name"], self.options["seed"]
            self.experiment, self.replay_mode = self.options["experiment"], self.options["replay_mode"]
            self.lengths = {phase: self.options.get(f"{phase}_iterations", 1) for phase in ("generator", "solver")}
            self.curves: dict[tuple[str, str], Curve] = {}  # by phase and name
            for row in self.rows:
                if row["phase"] in self.lengths:
                    at = (int(row["task"]) - 1) * self.lengths[row["phase"]] + int(row["iteration"])
                    self.curves.setdefault((row["phase"], row["name"]), {})[at] = float(row["value"])
            self.directory = directory
        except OSError as error:
            raise UserError(f"{error.filename or directory}: {reason(error)}: not the directory of a run") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, csv.Error) as error:
            raise UserError(f"{directory}: not the files of a run ({type(error).__name__}: {reason(error)})") from error

    @property
    def environment(self) -> str:
        """The name of its environment on a visdom server: its own name, and its seed if that is not 0."""
        return self.name.replace("_", "-") + (f"-seed-{self.seed}" if self.seed else "")

    @property
    def learned_with(self) -> dict[str, Any]:
        """The options that what it learns depends on: of two runs of one arm, all are the same.

        `--sample-log` is one where nothing but it has a generator trained, which takes random numbers too.
        """
        free = WITHIN_AN_ARM | ({"sample_log"} if self.replay_mode == "generative-replay" else set())
        return {key: value for key, value in self.options.items() if key not in free}

    @property
    def unofficial(self) -> dict[str, str]:
        """What to call the data sets whose files were not the official ones, by their names."""
        data, names = self.config["data"], {}
        for file in data["unverified"]:
            name = file.split("/")[0]
            names[name] = STAND_INS.get(data["checksums"].get(file), f"unofficial {name.upper()}")
        return names

    @property
    def data_note(self) -> str:
        """A warning for figures and tables if the data were not the official files."""
        return ", ".join(f"{called} in place of {name.upper()}" for name, called in sorted(self.unofficial.items()))

    @property
    def task_titles(self) -> list[str]:
        return [f"task {number}: {title}" for number, title in enumerate(self.tasks, start=1)]

    def precision(self, task: int) -> Curve:
        """Precision on task 1, 2, ... over solver iterations."""
        return self.curves.get(("solver", f"precision-{task}"), {})

    def average_precision(self) -> Curve:
        """The mean of the precisions on all tasks so far, over solver iterations."""
        curves = [self.precision(task) for task in range(1, len(self.tasks) + 1)]
        measured = sorted(set().union(*curves))
        return {x: np.mean([curve[x] for curve in curves if x in curve]) for x in measured}

    def kept_samples(self) -> dict[tuple[int, int], Path]:
        """The pictures of `--sample-log` by task and iteration, in their order."""
        kept = self.directory / SAMPLE_LOG
        aside = re.search(r"(~\d+)?$", self.directory.name)[0]  # with the rest of a run that a later one set aside
        kept = kept if kept.is_dir() else Path(self.options["sample_dir"]) / f"{self.name}{aside}"
        found = {}
        for path in kept.glob("*.jpg"):
            if numbers := re.fullmatch(r"task-(\d+)-iteration-(\d+)", path.stem):
                task, iteration = map(int, numbers.groups())
                if task <= len(self.tasks) and iteration <= self.lengths["generator"]:
                    found[task, iteration] = path
        return dict(sorted(found.items()))


def directories_with_config(path: Path) -> Iterator[Path]:
    """The directories below and behind symbolic links too, each once."""
    seen = set()
    for directory, inside, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            inside.clear()
        elif "config.json" in files:
            yield Path(directory)
        seen.add(real)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories and below, in the order of the paper, of one name the finished ones first.

    Those that a later run set aside are not among them; what can't be read is left out with a warning.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = []
        for directory in sorted(directories_with_config(path)):
            try:
                found.append(Run(directory))
            except UserError as error:
                warn(str(error))
        found = found or [Run(path)]
        newest = [run for run in found if not run.directory.name.startswith(f"{run.name}~")]
        runs |= {run.directory.resolve(): run for run in newest or found[:1]}
    place = {name: number for number, name in enumerate([*EXPERIMENTS, *MODES])}

    def order(run: Run) -> tuple:
        return place.get(run.experiment, 99), place.get(run.replay_mode, 99), run.name, run.summary is None

    return sorted(runs.values(), key=order)


class Arm:
    """Runs that differ in nothing but the seed; `label` says how they differ from the other arms.

    What they came to is taken from those that are `finished`; if none is, curves go as far as all have come.
    """

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.finished = [run for run in runs if run.summary]
        self.shown = self.finished or runs
        self.first = self.shown[0]
        self.label = self.first.replay_mode

    def matrix(self) -> np.ndarray:
        """Mean over seeds of the precision matrix; NaN where nothing was measured."""
        return np.mean([np.array(run.summary["precision"], dtype=float) for run in self.finished], axis=0)

    def curve(self, of: Callable[[Run], Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Iterations, mean and standard deviation over seeds, at the iterations that all runs have measured."""
        curves = [of(run) for run in self.shown]
        xs = sorted(set.intersection(*map(set, curves)))
        ys = np.array([[curve[x] for x in xs] for curve in curves])
        return np.array(xs), ys.mean(axis=0), ys.std(axis=0, ddof=min(1, len(ys) - 1))


def arms_of(runs: Sequence[Run]) -> dict[str, list[Arm]]:
    """The arms of each experiment. Of two runs that are the same, seed included, the first one counts."""
    same: dict[str, dict[int, Run]] = {}
    for run in runs:
        learned = json.dumps([run.learned_with, run.config["data"]["checksums"]], sort_keys=True)
        alike = same.setdefault(learned, {})
        if alike.setdefault(run.seed, run) is not run:
            warn(f"{run.directory} is left out: it is the same run as {alike[run.seed].directory}")
    experiments: dict[str, list[Arm]] = {}
    for alike in same.values():
        arm = Arm(list(alike.values()))
        experiments.setdefault(arm.first.experiment, []).append(arm)
    for arms in experiments.values():
        label(arms)
    return experiments


def label(arms: Sequence[Arm]) -> None:
    """Name arms after their replay modes, and those of one mode by what is not as in most of them too.

    A temperature is said only where targets leave it open.
    """
    for arm in arms:
        rivals = [other.first for other in arms if other.first.replay_mode == arm.first.replay_mode]
        own, unusual = arm.first.learned_with, {}
        for key, value in own.items():
            values = [rival.options.get(key) for rival in rivals]
            if value != max(values, key=values.count):
                unusual[key] = f"{key.replace('_', ' ')} {value}"
        if len({rival.data_note for rival in rivals}) > 1:
            unusual["data"] = arm.first.data_note or "official data"
        alike = [rival for rival in rivals if rival.options.get("replay_targets") == own.get("replay_targets")]
        if "replay_targets" in unusual and len({rival.options.get("temperature") for rival in alike}) == 1:
            unusual.pop("temperature", None)
        arm.label = arm.first.replay_mode + (f" ({', '.join(unusual.values())})" if unusual else "")


def draw_band(axes: Axes, curve: tuple[np.ndarray, np.ndarray, np.ndarray], **style: Any) -> None:
    """A curve, and where it is of several seeds a band of one standard deviation to each side."""
    xs, mean, deviation = curve
    axes.plot(xs, mean, linewidth=1.6, **style)
    if deviation.any():
        axes.fill_between(xs, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)


def draw_task_boundaries(axes: Axes, arms: Sequence[Arm], phase: str = "solver") -> None:
    """A dotted line where each task begins, unless it begins at another place in each arm."""
    lengths = {arm.first.lengths[phase] for arm in arms}
    tasks = max(len(arm.first.tasks) for arm in arms)
    for task in range(tasks if len(lengths) == 1 else 0):
        axes.axvline(task * max(lengths), color="0.6", linestyle=":", linewidth=1, zorder=0)
    end = max(len(arm.first.tasks) * arm.first.lengths[phase] for arm in arms)
    axes.set(xlim=(0, end), xlabel=f"{phase} iterations")
    axes.grid(axis="y", color="0.92")


COLUMNS_OF_PANELS = 4  # what a page has room for


def panels(count: int, title: str, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with so many plots, in as few and as even rows as a page allows."""
    rows = -(-count // COLUMNS_OF_PANELS)
    columns = -(-count // rows)
    figure = Figure(figsize=(0.8 + 3.6 * columns, height * rows), layout="constrained")
    figure.suptitle(title)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def title_of(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(run.experiment for run in runs)
    return " · ".join([", ".join(names), *sorted({run.data_note for run in runs} - {""})])


def legend_below(figure: Figure, all_axes: Sequence[Axes]) -> None:
    """The legend of all plots, from the one that has most, in a row or as many as it takes."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in all_axes), key=lambda found: len(found[0]))
    labels = [textwrap.fill(label, 64) for label in labels]
    lines = [line for label in labels for line in label.split("\n")]
    columns = max(1, int(figure.get_figwidth() / (max(map(len, lines), default=1) * 0.085 + 0.7)))  # inches
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, len(lines) / columns - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)


def precision_figure(arms: Sequence[Arm]) -> Figure:
    """Precision on each task over solver iterations, a panel for each arm."""
    figure, all_axes = panels(len(arms), title_of([arm.first for arm in arms]))
    several = len({arm.first.experiment for arm in arms}) > 1
    titles = [set(at) for at in itertools.zip_longest(*(arm.first.task_titles for arm in arms))]
    for axes, arm in zip(all_axes, arms, strict=True):
        for task, title in enumerate(arm.first.task_titles, start=1):
            curve = arm.curve(lambda run, task=task: run.precision(task))
            name = title if titles[task - 1] <= {title, None} else f"task {task}"  # there is one legend for all
            draw_band(axes, curve, color=task_colour(task), linestyle=task_dash(task), label=name)
        draw_task_boundaries(axes, [arm])
        own = f"{arm.first.experiment}: {arm.label}" if several else arm.label
        axes.set(title=textwrap.fill(own, 38), ylabel="precision", ylim=(0, 1.01))
        if not axes.get_subplotspec().is_first_col():
            axes.set(ylabel="", yticklabels=[])
    legend_below(figure, all_axes)
    return figure


# Of replay modes, and of further arms: Paul Tol's muted colours, none of them a task's.
ARM_COLOURS = ["#882255", "#999933", "#117733", "#332288", "#88CCEE", "#CC6677", "#DDCC77"]


def arm_styles(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Colour, dash pattern and label of each arm; the first of each replay mode has the mode's in every figure."""
    styles, of_modes, further = [], {mode: at for at, mode in enumerate(MODES)}, itertools.count(len(MODES))
    for arm in arms:
        at = of_modes.pop(arm.first.replay_mode, None)
        at = next(further) if at is None else at
        seeds = f", {len(arm.shown)} seeds" if len(arm.shown) > 1 else ""
        colour, dash = ARM_COLOURS[at % len(ARM_COLOURS)], task_dash(len(MODES) - at if at < len(MODES) else at + 1)
        styles.append({"color": colour, "linestyle": dash, "label": arm.label + seeds})
    return styles


def average_figure(arms: Sequence[Arm]) -> Figure:
    """The mean precision on the tasks so far, all arms in one plot."""
    figure, (axes,) = panels(1, title_of([arm.first for arm in arms]), height=4)
    figure.set_figwidth(6.4)
    for arm, style in zip(arms, arm_styles(arms), strict=True):
        draw_band(axes, arm.curve(Run.average_precision), **style)
    draw_task_boundaries(axes, arms)
    axes.set(ylabel="average precision on the tasks so far", ylim=(0, 1.01))
    legend_below(figure, [axes])
    return figure


def matrix_figure(arms: Sequence[Arm]) -> Figure | None:
    """The precision matrix of each arm: on task j after task i, whole test sets; None if no arm is finished."""
    arms = [arm for arm in arms if arm.finished]
    if not arms:
        return None
    figure, all_axes = panels(len(arms), title_of([arm.first for arm in arms]), height=3.6)
    for axes, arm in zip(all_axes, arms, strict=True):
        matrix = arm.matrix()
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        for (row, column), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                dark = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", color=dark)
        ticks = range(len(matrix))
        names = [number + 1 for number in ticks]
        axes.set(title=textwrap.fill(arm.label, 38), xlabel="precision on task", ylabel="after task")
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
    figure.colorbar(image, ax=all_axes, shrink=0.8, aspect=20 * all_axes[0].get_gridspec().nrows, label="precision")
    return figure


def loss_figure(arms: Sequence[Arm]) -> Figure | None:
    """Every loss over its phase's iterations, all arms in each plot; None if none was kept."""
    keys = dict.fromkeys(key for arm in arms for key in arm.first.curves if not PRECISION.fullmatch(key[1]))
    if not keys:
        return None
    figure, all_axes = panels(len(keys), title_of([arm.first for arm in arms]))
    for axes, (phase, name) in zip(all_axes, keys, strict=True):
        for arm, style in zip(arms, arm_styles(arms), strict=True):
            if all((phase, name) in run.curves for run in arm.shown):
                draw_band(axes, arm.curve(lambda run, key=(phase, name): run.curves[key]), **style)
        draw_task_boundaries(axes, [arm for arm in arms if (phase, name) in arm.first.curves], phase)
        axes.set(ylabel=f"{phase} {name}" if name == "loss" else name.replace("-", " "))
    legend_below(figure, all_axes)
    return figure


def samples_figure(arms: Sequence[Arm]) -> Figure | None:
    """What the generator draws from the same noise after each task, a row for each arm that kept it (--sample-log)."""
    shown = [(arm, samples) for arm in arms if (samples := arm.first.kept_samples())]
    if not shown:
        return None
    tasks = max(len(arm.first.tasks) for arm, _ in shown)
    figure = Figure(figsize=(0.4 + 2.2 * tasks, 0.6 + 2.4 * len(shown)), layout="constrained")
    figure.suptitle(f"{title_of([arm.first for arm, _ in shown])}: samples after each task")
    for axes_row, (arm, samples) in zip(figure.subplots(len(shown), tasks, squeeze=False), shown, strict=True):
        end = arm.first.lengths["generator"]
        last = {task: path for (task, iteration), path in samples.items() if iteration == end}
        axes_row[0].set_ylabel(textwrap.fill(arm.label, 32))
        for task, axes in enumerate(axes_row, start=1):
            axes.set(xticks=[], yticks=[], title=f"after task {task}")
            if task in last:
                axes.imshow(np.asarray(Image.open(last[task])))
            elif task > len(arm.first.tasks):
                axes.axis("off")
    return figure


FRAMES = 30  # of an animation, at most


def save_animation(arms: Sequence[Arm], path: Path) -> bool:
    """A GIF of samples through all tasks, the arms that kept them (--sample-log) side by side. Whether there is any."""
    shown = [(arm, samples) for arm in arms if (samples := arm.first.kept_samples())]
    moments = sorted(set.intersection(*(set(samples) for _, samples in shown))) if shown else []
    if not moments:
        return False
    every = -(-len(moments) // FRAMES)
    frames = []
    for task, iteration in moments[::-every][::-1]:  # the last one is among them
        grids = [Image.open(samples[task, iteration]).convert("RGB") for _, samples in shown]
        size = sum(grid.width + 8 for grid in grids), max(grid.height for grid in grids) + 34
        frame = Image.new("RGB", size, "white")
        text, left = ImageDraw.Draw(frame), 4
        for grid, (arm, _) in zip(grids, shown, strict=True):
            text.text((left, 2), arm.label, fill="black")
            text.text((left, 16), f"task {task}, iteration {iteration}", fill="black")
            frame.paste(grid, (left, 32))
            left += grid.width + 8
        frames.append(frame.quantize(64))
    with atomic_write(path, "wb") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0, optimize=True)
    return True


FIGURES: dict[str, Callable[[Sequence[Arm]], Figure | None]] = {
    "precision": precision_figure,
    "average": average_figure,
    "matrix": matrix_figure,
    "losses": loss_figure,
    "samples": samples_figure,
}


def save_figures(runs: Sequence[Run], directory: Path) -> dict[str, list[Path]]:
    """All figures of each experiment, as <experiment>-<kind>.png and .svg and <experiment>.gif; returns paths."""
    made: dict[str, list[Path]] = {}
    for experiment, arms in arms_of(runs).items():
        made[experiment] = []
        for kind, draw in FIGURES.items():
            if (figure := draw(arms)) is not None:
                for suffix in (".png", ".svg") if kind != "samples" else (".png",):
                    write_figure(figure, directory / f"{experiment}-{kind}{suffix}")
                made[experiment].append(directory / f"{experiment}-{kind}.png")
        if save_animation(arms, directory / f"{experiment}.gif"):
            made[experiment].append(directory / f"{experiment}.gif")
    return made


def write_figure(figure: Figure, path: Path) -> None:
    """Save it; the same figure is the same file, whenever it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "dgr", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """The precision plots of these runs side by side."""
    write_figure(precision_figure([arm for arms in arms_of(runs).values() for arm in arms]), path)


# ------------------------------------------------------------------------------------------- tables and report


def spread(values: Sequence[float], digits: int) -> str:
    """The mean of values over seeds, with the standard deviation if there are several."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):z.{digits}f}{deviation}"  # z: no -0.000


def cells(arm: Arm) -> dict[str, str]:
    """An arm as a row of a table."""
    run, summaries = arm.first, [run.summary for run in arm.finished]
    unfinished = len(arm.runs) - len(arm.finished)
    of = f" on {', '.join(name.upper() for name in run.unofficial)}" if run.unofficial else ""
    paper, repository = PUBLISHED.get((run.experiment, run.replay_mode), ("", ""))
    return {
        "experiment": run.experiment + (f" ({run.data_note})" if run.data_note else ""),
        "replay mode": arm.label,
        "seeds": ", ".join(str(run.seed) for run in arm.finished)
        + (f" ({unfinished} not finished)" if unfinished else ""),
        "average precision": spread([summary["average_precision"] for summary in summaries], 3),
        "forgetting": spread([summary["forgetting"] for summary in summaries], 3),
        "seconds": spread([summary["seconds"] for summary in summaries], 0),
        "paper": paper and paper + of,
        "2017 repository": repository and repository + of,
    }


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows of one and the same keys as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(runs: Sequence[Run]) -> str:
    """What the runs came to, means and standard deviations over seeds, beside the published numbers, in Markdown."""
    return markdown([cells(arm) for arms in arms_of(runs).values() for arm in arms])


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: left }
th { border-bottom: 2px solid #222 } td { border-bottom: 1px solid #ccc; font-variant-numeric: tabular-nums }
img { max-width: 100%; margin: .5rem 0 } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
"""

REMARK = (
    "Mean ± standard deviation over seeds. Average precision and forgetting: on whole test sets, after the last task. "
    "Published numbers are read off figures, and of full size: compare them with runs of full size alone."
)


def write_report(runs: Sequence[Run], path: Path) -> None:
    """One HTML page that needs no other file: the table, the figures, and every run's command, place and time."""
    rows = [cells(arm) for arms in arms_of(runs).values() for arm in arms]
    parts = ["<h1>Deep generative replay</h1>", html_table(rows)]
    parts.append(f"<p>{REMARK}</p>")
    with tempfile.TemporaryDirectory() as directory:
        for experiment, pictures in save_figures(runs, Path(directory)).items():
            parts.append(f"<h2>{html.escape(experiment)}</h2>")
            parts += [embedded(picture) for picture in pictures]
    parts.append("<h2>Commands</h2>")
    for run in runs:
        commit, versions = run.config.get("commit") or "unknown", run.config.get("versions", {})
        with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
        place = f"commit {commit}, {run.config.get('device', 'unknown device')}, {with_what}"
        command = printable(shlex.join(run.config.get("command", [])))
        parts.append(f"<p>{html.escape(place)}</p><pre>{html.escape(command)}</pre>")
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Deep generative replay</title><style>{STYLE}'
    with atomic_write(path) as file:
        file.write(f"{head}</style>\n" + "\n".join(parts) + "\n</html>\n")


def html_table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def embedded(picture: Path) -> str:
    """A picture inside the page; of a figure that has one, the drawing that stays sharp at any size."""
    drawing = picture.with_suffix(".svg")
    picture = drawing if drawing.exists() else picture
    kind = {".svg": "svg+xml"}.get(picture.suffix, picture.suffix[1:])
    content = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="{html.escape(picture.stem)}" src="data:image/{kind};base64,{content}">'


def play_back(run: Run, server: str, port: int) -> None:
    """Show a run on a visdom server as it would have been shown live: whole curves, and its newest samples."""
    plots = LivePlots(run, server, port)
    plots.close()
    if plots.unsent:
        raise UserError(f"visdom at {server}:{port} did not take the plots: start one, see README.md, and try again")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        description="Print the table of runs, draw them, write a report on them, or show them on visdom.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, results/NAME, or of many, results"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="their precision plots: .png, .svg or .pdf")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="all figures, as DIR/EXPERIMENT-KIND.png and .svg")
    parser.add_argument("--report", type=Path, metavar="FILE", help="one HTML page with table, figures and commands")
    parser.add_argument("--visdom", action="store_true", help="play the runs back into a visdom server")
    parser.add_argument("--visdom-server", default="localhost", metavar="HOST", help="where (default: localhost)")
    parser.add_argument("--visdom-port", type=int, default=8097, metavar="N", help="its port (default: 8097)")
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --output: {options.output} ends in none of .png, .svg and .pdf")
    arms = [arm for arms in arms_of(find_runs(options.runs)).values() for arm in arms]
    runs = [run for arm in arms for run in arm.runs]  # each once
    print(table(runs))
    if options.visdom:
        for run in runs:
            play_back(run, options.visdom_server, options.visdom_port)
        print(f"visdom: {options.visdom_server}:{options.visdom_port}")
    for flag, make in (("output", save_figure), ("figures", save_figures), ("report", write_report)):
        if path := getattr(options, flag):
            try:
                make(runs, path)
            except (OSError, ValueError) as error:
                raise UserError(f"--{flag} {path}: {reason(error)}") from error
            print(f"{flag}: {path}")


if __name__ == "__main__":
    run_program(main)
