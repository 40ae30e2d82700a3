#!/usr/bin/env python3
"""What people look at: progress bars, live plots, sample grids, figures and tables.

Everything that is drawn after a run needs its files alone:

    ./visual.py results                                    the table of all runs in a directory
    ./visual.py results --figures figures                  all their figures
    ./visual.py results/A results/B --output figure.png    precision plots of some runs, side by side
    ./visual.py results/A --visdom                         what live plots would have shown, on a visdom server
"""

import contextlib
import importlib
import itertools
import logging
import os
import re
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import utils
from utils import MODES, PRECISION, Curve, Observer, Run, Setting, UserError, atomic_write, option, reason, warn

if TYPE_CHECKING:  # these take a second or two, so they are imported when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CJK = re.compile("CJK|Han Sans|Hei|Gothic|Nanum|Hiragino|PingFang|Unifont")  # fonts with what matplotlib's own lacks
warn_once = cache(warn)
for name in ("visdom", "urllib3", "matplotlib.font_manager"):  # which say what warnings here say better
    logging.getLogger(name).setLevel(logging.ERROR)

# Colours of a few tasks (Okabe and Ito's, which colour-blind readers can tell apart), and dashes, for prints in grey.
# More tasks go from dark to light, with an average curve; many have no legend. Colours of settings are Paul Tol's.
TASK_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1))]
FEW, NUMBERS, MANY = len(TASK_COLOURS), 12, 20  # tasks; a matrix has room for the numbers of twelve
IMAGES_PER_ROW, FRAMES, LABEL_CHARACTERS = 6, 30, 75  # in a grid; in an animation, at most; that fit above a plot
SERVER = f"visdom server: host, host:port or https://host/path; {utils.LOGIN}"
SETTING_COLOURS = ["#882255", "#999933", "#117733", "#332288", "#88CCEE", "#CC6677", "#DDCC77", "#44AA99", "#AA4499"]
COLOUR_OF_MODE = dict(zip(MODES, (0, 1, 2, 3, 7, 8), strict=True))


def task_colours(tasks: int) -> list[str]:
    """The colours of task 1, 2, ..., the same in every figure."""
    if tasks <= FEW:
        return TASK_COLOURS
    set_up_matplotlib()
    from matplotlib import colormaps, colors

    return list(map(colors.to_hex, colormaps["viridis"](np.linspace(0, 0.93, tasks))))


@dataclass(frozen=True, kw_only=True)
class VisdomOptions:
    visdom_server: str = option("localhost", SERVER, None, parse=utils.address, metavar="ADDRESS", group="live plots")
    visdom_port: int = option(8097, "port of the visdom server, if its address has none", None, low=1, high=65535)
    visdom_env: str | None = option(None, "environment for live plots (default: the run's own)", None, metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class PlotOptions(VisdomOptions):
    no_visdom: bool = option(False, "no live plots", None)
    tensorboard: bool = option(False, "write files for TensorBoard too (pip install tensorboard)", None)


class Progress(Observer):
    """A bar for each phase on a terminal; a line for each phase elsewhere."""

    def __init__(self, tasks: int):
        self._tasks, self._bar, self._values = tasks, tqdm(disable=True), {}

    def begin(self, phase: str, task: int, iterations: int, done: int) -> None:
        self._title, self._left = f"task {task}/{self._tasks} {phase}", iterations - done
        self._values, self._summary, self._started = {}, "", time.monotonic()
        how = {"file": sys.stderr, "dynamic_ncols": True, "disable": not getattr(sys.stderr, "isatty", bool)()}
        how["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}"  # values have room in 80 columns
        self._bar = tqdm(desc=self._title, total=iterations, initial=done, **how)

    def step(self, iteration: int) -> None:
        self._bar.update()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        if len(values) > 3 and "precision-1" in values:
            values = {"average precision": sum(values.values()) / len(values)}
        self._values |= values
        self._summary = ", ".join(f"{name} {value:.3f}" for name, value in self._values.items())
        self._bar.set_postfix_str(self._summary, refresh=False)

    def end(self, phase: str, task: int) -> None:
        if self._bar.disable:
            seconds = time.monotonic() - self._started
            with contextlib.suppress(OSError):  # the terminal may have gone
                print(f"{self._title}: {self._left} iterations in {seconds:.0f} s, {self._summary}", file=sys.stderr)
        self.close()

    def close(self) -> None:
        self._bar.close()


def save_samples(images: Tensor, path: Path) -> None:
    """Save images (n, channels, height, width) float in [0, 1] as one picture, six per row."""
    from torchvision.utils import save_image

    with atomic_write(path, "wb") as file:
        save_image(images.cpu(), file, nrow=IMAGES_PER_ROW, format=Image.registered_extensions()[path.suffix])


def kept_sample(directory: Path, task: int, iteration: int) -> Path:
    """Where a picture of --sample-log goes."""
    return directory / f"task-{task}-iteration-{iteration}.jpg"


class SamplePictures(Observer):
    """Saves pictures of samples through training, each where `place(task, iteration)` says."""

    def __init__(self, place: Callable[[int, int], Path], image_interval: int):
        self.place, self.image_interval = place, image_interval

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        path = self.place(task, iteration)
        try:
            save_samples(images, path)
        except OSError as error:  # no reason to end training
            warn(f"{path}: {reason(error)}; training goes on without this picture")


POST_TIMEOUT = (2.0, 3.0)  # seconds to connect, and to wait for an answer
WINDOW = {"width": 600, "height": 340, "marginright": 20, "margintop": 64, "marginbottom": 76}  # two in 1280 pixels
SAMPLES_WINDOW = {"width": 340, "height": 340}
HINTS = {302: "a page to log in?", 400: utils.LOGIN, 401: utils.LOGIN, 404: "is visdom below another path?"}


class LivePlots(Observer):
    """Live plots of a run on a visdom server, in an environment named after the run. Training never waits for them.

    A window for precision and one for each loss, with a curve per task in its colour and a dotted line where it begins;
    many tasks share one curve per loss. A separate thread posts the newest state of each window, always whole: a slow
    server gets fewer updates, one that comes back complete plots. Windows of an earlier run of this name are closed.
    """

    RETRY_SECONDS, CLOSE_SECONDS = 10.0, 5.0

    def __init__(self, run: Run, options: VisdomOptions):
        self.image_interval = run.options.get("image_log_interval")
        self._lengths, self._titles, self._many = run.lengths, run.task_titles, len(run.tasks) > FEW
        short = [f"task {task}" if len(run.tasks) <= 10 else str(task) for task in range(1, len(run.tasks) + 1)]
        self._labels = self._titles if sum(map(len, self._titles)) <= LABEL_CHARACTERS else short
        self._colours = ["#000000", *task_colours(len(run.tasks))]  # at 0, of an average or of all tasks
        name = run.name.replace("_", "-") + (f"-seed-{run.seed}" if run.seed else "")
        self._before = f"{name}: " if options.visdom_env else ""  # a title: others may use that environment too
        self._connection = utils.server_of(options.visdom_server, options.visdom_port)
        self.address = "{server}:{port}{base_url}".format(**self._connection)
        self._connection["env"] = options.visdom_env or name
        self._curves: dict[str, dict[int, Curve]] = {"precision": {0 if self._many else 1: {}}}  # of each window
        self._newest: dict[str, Callable] = {}  # functions that make the newest state of each window
        self._pending: dict[str, Callable] = {}  # those of them that are not posted yet
        self._changed = threading.Condition()
        self._closing = self._warned = self._down = self._cleared = False
        self._post(precision=partial(self._line, "precision"))  # the first window
        run.replay(self)
        with contextlib.suppress(OSError):  # no picture, or not a whole one
            pixels = np.asarray(Image.open(run.directory / utils.SAMPLES).convert("RGB"))
            arguments = {"img": pixels.transpose(2, 0, 1), "opts": {"title": f"samples of {run.name}"} | SAMPLES_WINDOW}
            self._post(samples=lambda: ("image", arguments))
        self._thread = threading.Thread(target=self._post_all, daemon=True)
        self._thread.start()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        with self._changed:
            mean, at = sum(values.values()) / max(1, len(values)), (task - 1) * self._lengths.get(phase, 0) + iteration
            for name, value in values.items() if phase in self._lengths else ():
                window, curve = f"{phase} {name}", 0 if self._many else task
                if found := PRECISION.fullmatch(name):
                    window, curve = "precision", int(found[1])
                    self._curves[window].get(0, {})[at] = mean  # if there is an average
                self._curves.setdefault(window, {}).setdefault(curve, {})[at] = value
                self._post(**{window: partial(self._line, window)})

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        opts = {"title": f"samples: task {task}, iteration {iteration}"} | SAMPLES_WINDOW
        pixels = (images * 255).byte().cpu().numpy()
        self._post(samples=lambda: ("images", {"tensor": pixels, "nrow": IMAGES_PER_ROW, "opts": opts}))

    def close(self) -> bool:
        """Post the rest, for a few seconds at most, unless the server does not answer. True if all is posted."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=0.1 if self._down else self.CLOSE_SECONDS)
        return not (self._down or self._pending or self._thread.is_alive())

    def _post(self, **makers: Callable) -> None:
        """Have windows posted; they are put together then, not here, where training would wait."""
        with self._changed:
            self._newest |= makers
            self._pending |= makers
            self._changed.notify()

    def _line(self, window: str) -> tuple[str, dict[str, Any]]:
        """The curves of a window as columns of one matrix, with NaN for missing points."""
        phase = "solver" if window == "precision" else window.split()[0]
        curves = dict(sorted(self._curves[window].items(), reverse=self._many))  # an average is drawn last
        x, length = sorted(set().union(*curves.values())) or [0], self._lengths[phase]
        x = [at for at in x if len(self._titles) <= MANY or at % length == 0 or at == x[-1]]  # after each task, and now
        y = np.array([[curve.get(at, np.nan) for curve in curves.values()] for at in x])
        loss = window.removeprefix(f"{phase} ").replace("-", " ")
        title = loss if phase in loss or window == "precision" else f"{phase} {loss}"
        opts: dict[str, Any] = {"title": title, "xlabel": f"{phase} iterations", "ylabel": title, **WINDOW}
        names = ["average" if window == "precision" else "all tasks", *self._titles]
        opts["legend"] = [names[task] for task in curves]
        opts["linecolor"] = np.array([list(bytes.fromhex(self._colours[task][1:])) for task in curves])
        if window == "precision":
            share = "black: average" if self._many else "share of test images"
            opts |= {"ylabel": f"precision ({share})", "ytickmin": 0, "ytickmax": 1.01}
            opts |= {"markers": not self._many, "markersize": 4, "markerborderwidth": 0}  # so that a single point shows
        if self._many:
            lines = {names[t]: {"line": {"color": self._colours[t], "width": 1 if t else 2.5}} for t in curves}
            opts |= {"traceopts": {"plotly": lines}, "showlegend": False}
        dots = {"color": "#808080", "dash": "dot", "width": 1.5}
        line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": dots}
        label = {"y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "yref": "paper"}
        begun = max(1, -(-x[-1] // length))
        shown = {task: (task - 1) * length for task in range(1, begun + 1, -(-begun // MANY))}
        shapes = [line | {"x0": at, "x1": at} for at in shown.values()]
        fonts = {task: {"size": 11, "color": self._colours[task]} for task in shown}
        labels = [label | {"x": shown[task], "text": self._labels[task - 1], "font": fonts[task]} for task in shown]
        legend = {"orientation": "h", "y": -0.31, "yanchor": "top"}
        opts["layoutopts"] = {"plotly": {"shapes": shapes, "annotations": labels, "legend": legend}}
        # visdom takes a single column for several points of one curve.
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
                # A copy of the options: visdom writes into them, and a failed post is repeated.
                opts = arguments["opts"] | {"title": self._before + arguments["opts"]["title"]}
                post = partial(getattr(client, method), win=self._before + window, **arguments)
                post(opts=dict(opts))
                if not (self._cleared or self._before):  # only after the first post is the environment sure to exist
                    client.close()
                    post(opts=dict(opts))
                self._cleared, self._down = True, False
            except Exception as error:  # whatever a plot server does, training goes on
                client, self._down = None, True
                if not self._warned:
                    warn(f"no live plots: visdom at {self.address}: {reason(error)[:300]}; training goes on")
                    self._warned = True
                with self._changed:
                    self._pending = dict(self._newest)  # all of them: a restarted server has none
                    if self._changed.wait_for(lambda: self._closing, timeout=self.RETRY_SECONDS):
                        return


def connect(*, server: str, port: int, env: str, base_url: str = "") -> Any:
    """A visdom client that gives up after a few seconds and says why; visdom's own waits forever and hides it."""
    import requests
    import visdom

    root, session = f"{server}:{port}{base_url}", requests.Session()
    session.trust_env = not utils.is_this_machine(server.rpartition("/")[2].strip("[]"))  # which needs no proxy
    proxied = session.trust_env and requests.utils.get_environ_proxies(root)
    proxy = "; a proxy is between, as http_proxy or https_proxy say: no_proxy can exempt this host" if proxied else ""
    user, password = (os.environ.get(f"VISDOM_{part}", "").encode() for part in ("USERNAME", "PASSWORD"))
    session.auth = (user, password) if user else None  # for a web server before visdom
    login = {"username": user.decode(), "password": sha256(password).hexdigest()}
    post = partial(session.post, timeout=POST_TIMEOUT, allow_redirects=False)

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            try:
                answer = post(url, data=data or {})
                # visdom's own: 0.2 answers 400 to who is not logged in, 0.3 answers 401.
                if answer.status_code in (400, 401) and user and post(root, json=login).ok:
                    answer = post(url, data=data or {})
            except requests.RequestException as error:
                causes = utils.causes(error)
                wrong_scheme = re.search("WRONG_VERSION|handshake|aborted", " ".join(map(str, causes)))
                hint = "does http or https fit? " if wrong_scheme else ""
                raise UserError(f"{hint}{reason(causes[-1])}{proxy}") from error
            if (status := answer.status_code) != 200:
                raise UserError(f"it answers {status} ({HINTS.get(status, answer.reason)}){proxy}")
            return answer.text

    return Client(server, port=port, base_url=base_url, env=env, use_incoming_socket=False, raise_exceptions=True)


def check_tensorboard(options: PlotOptions) -> None:
    """Refuse --tensorboard before anything is learned if it is not installed."""
    try:
        if options.tensorboard:
            importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UserError(f"argument --tensorboard: {reason(error)}: pip install tensorboard", status=2) from error


class TensorBoard(Observer):
    """Scalars and sample grids of a run for TensorBoard. Needs the package tensorboard.

    A resumed run writes all its scalars again, so that each point is there once; its earlier sample grids are lost.
    """

    def __init__(self, run: Run):
        self.image_interval, self._run, self._failed = run.options["image_log_interval"], run, False
        self._try(self._open)
        run.replay(self)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for file in (self._run.directory / "tensorboard").glob("events.*"):
            file.unlink()
        usual = threading.excepthook  # the writer's thread would print its error, which the next call raises anyway
        threading.excepthook = lambda error: type(error.thread).__module__.startswith("tensorboard.") or usual(error)
        self._writer = SummaryWriter(self._run.directory / "tensorboard")

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        at = (task - 1) * self._run.lengths["solver" if phase == "test" else phase] + iteration
        for name, value in values.items():
            self._try(lambda: self._writer.add_scalar(f"{phase}/{name}", value, at))  # noqa: B023
        if phase == "test" and task == len(self._run.tasks) and all(map(PRECISION.fullmatch, values)):
            self._try(lambda: self._writer.add_scalar("average-precision", sum(values.values()) / len(values), at))

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        from torchvision.utils import make_grid

        at, grid = (task - 1) * self._run.lengths["generator"] + iteration, make_grid(images.cpu(), IMAGES_PER_ROW)
        self._try(lambda: self._writer.add_image("samples", grid, at))

    def close(self) -> None:
        self._try(lambda: self._writer.close())

    def _try(self, write: Callable[[], None]) -> None:  # training goes on, whatever becomes of these files
        try:
            if not self._failed:
                write()
        except Exception as error:
            self._failed = True
            warn(f"TensorBoard: {reason(error)}; training goes on, and --resume writes these files again")


@cache
def set_up_matplotlib() -> None:
    backend = os.environ.pop("MPLBACKEND", "")  # a notebook's may not be installed here, and no figure needs one
    from matplotlib import font_manager, rcParams

    if backend:
        with contextlib.suppress(ValueError):
            os.environ["MPLBACKEND"] = rcParams["backend"] = backend
    # Titles hold names of files, and those may have dollars.
    rcParams.update({"text.parse_math": False, "axes.titlesize": "medium", "figure.titlesize": "medium"})
    rcParams["font.family"] += sorted({font.name for font in font_manager.fontManager.ttflist if CJK.search(font.name)})


def new_figure(width: float, height: float) -> "Figure":
    set_up_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_band(axes: "Axes", curve: tuple[np.ndarray, np.ndarray, np.ndarray], **style: Any) -> None:
    """A curve, and for several seeds a band of one standard deviation on each side."""
    xs, mean, deviation = curve
    axes.plot(xs, mean, **{"linewidth": 1.6} | style)
    if deviation.any() and "label" in style:  # where there is no legend, bands would cover the curves
        axes.fill_between(xs, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)


def draw_task_boundaries(axes: "Axes", settings: Sequence[Setting]) -> None:
    """A dotted line where each task begins, unless the settings differ in that."""
    runs = [setting.first for setting in settings]
    lengths, tasks = {run.lengths["solver"] for run in runs}, max(len(run.tasks) for run in runs)
    for task in range(tasks if len(lengths) == 1 and tasks <= MANY else 0):
        axes.axvline(task * max(lengths), color="0.6", linestyle=":", linewidth=1, zorder=0)
    end = max(len(run.tasks) * run.lengths["solver"] for run in runs)
    axes.set(xlim=(0, end), ylim=(0, 1.01), xlabel="solver iterations")
    axes.locator_params(axis="x", nbins=5 if tasks <= FEW else 4)  # more numbers would touch
    axes.grid(axis="y", color="0.92")


def panels(n: int, settings: Sequence[Setting], height: float = 3.4, width: float = 3.8) -> "tuple[Figure, list[Axes]]":
    """A figure with n plots, at most four in a row, and a title for the settings."""
    rows = -(-n // 4)
    columns = -(-n // rows)
    figure = new_figure(width + 3.0 * (columns - 1), height * rows)
    figure.suptitle(textwrap.fill(figure_title(settings), int(11 * figure.get_figwidth())))
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(n)]


def figure_title(settings: Sequence[Setting]) -> str:
    """Experiments, recipes other than the default one, and a note if the data were not the official ones."""
    runs = [setting.first for setting in settings]
    recipes = ", ".join(sorted({run.recipe for run in runs}))
    title = [", ".join(dict.fromkeys(run.experiment for run in runs)), f"recipe {recipes}" if recipes != "2017" else ""]
    return " · ".join(part for part in [*title, *sorted({run.data_note for run in runs})] if part)


def legend_below(figure: "Figure", all_axes: "Sequence[Axes]") -> "Figure":
    """One legend for all plots, taken from the plot with most curves, in as many rows as it takes."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in all_axes), key=lambda found: len(found[0]))
    labels = [textwrap.fill(label, 64) for label in labels]
    lines = [line for label in labels for line in label.split("\n")]
    columns = max(1, int(figure.get_figwidth() / (max(map(len, lines), default=1) * 0.08 + 0.5)))  # inches
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, len(lines) / columns - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4)
    return figure


def precision_figure(settings: Sequence[Setting]) -> "Figure":
    """Precision on each task over solver iterations, a panel for each setting."""
    figure, all_axes = panels(len(settings), settings)
    several = len({setting.first.experiment for setting in settings}) > 1
    tasks = max(len(setting.first.tasks) for setting in settings)
    colours = task_colours(tasks)
    for axes, setting in zip(all_axes, settings, strict=True):
        if tasks > FEW:
            average = setting.curve(Run.average_precision, tasks > MANY)
            draw_band(axes, average, label="average on the tasks so far", color="black", linewidth=2.4, zorder=3)
        for task, (title, colour) in enumerate(zip(setting.first.task_titles, colours, strict=False), start=1):
            curve = setting.curve(partial(Run.precision, task=task), tasks > MANY)
            style = {"label": f"task {task}" if several else title, "linestyle": DASHES[(task - 1) % len(DASHES)]}
            style |= {"linewidth": 1.6 if tasks <= FEW else 1}
            draw_band(axes, curve, color=colour, **style if tasks <= MANY else {"linewidth": 0.7})
        draw_task_boundaries(axes, [setting])
        title = f"{setting.first.experiment}: {setting.label}" if several else setting.label
        axes.set(title=textwrap.fill(title, 38), ylabel="precision" + " after each task" * (tasks > MANY))
        if not axes.get_subplotspec().is_first_col():
            axes.set(ylabel="", yticklabels=[])
    if tasks > MANY:
        from matplotlib import cm, colors

        scale = cm.ScalarMappable(colors.Normalize(1, tasks), colors.ListedColormap(colours))
        figure.colorbar(scale, ax=all_axes, label="task")
    return legend_below(figure, all_axes)


def setting_styles(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Colour, dash pattern and label of each setting; a replay mode's first setting looks the same in every figure."""
    modes = [setting.first.replay_mode for setting in settings]
    styles: list[dict[str, Any]] = []
    for number, (setting, mode) in enumerate(zip(settings, modes, strict=True)):
        at = COLOUR_OF_MODE[mode] if mode in MODES and mode not in modes[:number] else 4 + number
        seeds = f", {len(setting.shown)} seeds" if len(setting.shown) > 1 else ""
        style = {"color": SETTING_COLOURS[at % len(SETTING_COLOURS)], "linestyle": DASHES[(at + 3) % len(DASHES)]}
        styles.append(style | {"label": setting.label + seeds})
    return styles


def average_figure(settings: Sequence[Setting]) -> "Figure":
    """Average precision on the tasks so far, all settings in one plot."""
    figure, (axes,) = panels(1, settings, height=4, width=6.4)
    for setting, style in zip(settings, setting_styles(settings), strict=True):
        draw_band(axes, setting.curve(Run.average_precision), **style)
    draw_task_boundaries(axes, settings)
    axes.set(ylabel="average precision on the tasks so far")
    return legend_below(figure, [axes])


def matrix_figure(settings: Sequence[Setting]) -> "Figure | None":
    """The precision matrix of each setting: on task j after task i, whole test sets; None if no run is finished."""
    if not (settings := [setting for setting in settings if setting.finished]):
        return None
    figure, all_axes = panels(len(settings), settings, height=3.6)
    for axes, setting in zip(all_axes, settings, strict=True):
        matrix, tasks = setting.matrix(), len(setting.first.tasks)
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis", extent=(0.5, tasks + 0.5, tasks + 0.5, 0.5))
        axes.set(title=textwrap.fill(setting.label, 38), xlabel="precision on task", ylabel="after task")
        axes.locator_params(nbins=NUMBERS, integer=True)
        for (row, column), value in np.ndenumerate(matrix if tasks <= NUMBERS else ()):
            if not np.isnan(value):
                style = {"color": "white" if value < 0.6 else "black", "size": min(10, 80 / tasks)}
                axes.text(column + 1, row + 1, f"{value:.2f}".lstrip("0"), ha="center", va="center", **style)
    figure.colorbar(image, ax=all_axes, shrink=0.8, aspect=20 * all_axes[0].get_gridspec().nrows, label="precision")
    return figure


def kept_picture(path: Path) -> Image.Image | None:
    """A kept sample, or None, with a warning, if its file is damaged."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        return warn_once(f"{path} is left out: {reason(error)}")


def samples_figure(settings: Sequence[Setting]) -> "Figure | None":
    """What the generator draws from the same noise after each task, a row for each setting that kept samples."""
    if not (shown := [(setting, samples) for setting in settings if (samples := setting.first.kept_samples())]):
        return None
    last = max(len(setting.first.tasks) for setting, _ in shown)
    tasks = np.linspace(1, last, min(last, 10)).round().astype(int).tolist()
    figure = new_figure(0.4 + 2.2 * len(tasks), 0.6 + 2.4 * len(shown))
    title = f"{figure_title([setting for setting, _ in shown])}: samples after each task"
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())))
    for axes_row, (setting, samples) in zip(figure.subplots(len(shown), len(tasks), squeeze=False), shown, strict=True):
        end = setting.first.lengths["generator"]
        axes_row[0].set_ylabel(textwrap.fill(setting.label, 32))
        for task, axes in zip(tasks, axes_row, strict=True):
            axes.set(xticks=[], yticks=[], title=f"after task {task}")
            if (task, end) in samples and (picture := kept_picture(samples[task, end])):
                axes.imshow(np.asarray(picture))
            elif task > len(setting.first.tasks):
                axes.axis("off")
    return figure


def generator_figure(settings: Sequence[Setting]) -> "Figure | None":
    """What the generator knows after each task, where all seeds of a setting measured it (--measure-generator)."""
    names = ("frechet_distance", "generator_precision", "generator_recall", "fitting_capacity")
    if not (settings := [setting for setting in settings if setting.measures_generator]):
        return None
    figure, all_axes = panels(len(names), settings)
    for axes, name in zip(all_axes, names, strict=True):
        for setting, style in zip(settings, setting_styles(settings), strict=True):
            draw_band(axes, setting.curve(lambda run, name=name: run.generator_measure(name)), marker=".", **style)
        limits = {"ylim": (0, None if name == names[0] else 1.01)}
        axes.set(title=name.replace("_", " ").replace("frechet", "Fréchet"), xlabel="after task", **limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return legend_below(figure, all_axes)


def save_animation(settings: Sequence[Setting], path: Path) -> bool:
    """Save a GIF of kept samples through all tasks, settings side by side. False if there are none."""
    shown = [(setting, samples) for setting in settings if (samples := setting.first.kept_samples())]
    moments = sorted(set.intersection(*(set(samples) for _, samples in shown))) if shown else []
    if not moments:
        return False
    wrap = partial(textwrap.wrap, width=34)  # as wide as six images
    labels, frames = [wrap(setting.label) + wrap(setting.first.data_note) for setting, _ in shown], []
    top = 18 + 14 * max(map(len, labels))
    for task, iteration in moments[:: -(len(moments) // -FRAMES) * -1][::-1]:  # the last one is among them
        grids = [kept_picture(samples[task, iteration]) for _, samples in shown]
        if None in grids:
            continue
        size = sum(grid.width + 8 for grid in grids), max(grid.height for grid in grids) + top + 2
        frame, left = Image.new("RGB", size, "white"), 4
        for grid, label in zip(grids, labels, strict=True):
            text = "\n".join([*label, f"task {task}, iteration {iteration}"])
            ImageDraw.Draw(frame).text((left, 2), text, fill="black")
            frame.paste(grid, (left, top))
            left += grid.width + 8
        frames.append(frame.quantize(64))
    if not frames:
        return False
    with atomic_write(path, "wb") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0, optimize=True)
    return True


FIGURES = {"precision": precision_figure, "average": average_figure, "matrix": matrix_figure}
FIGURES |= {"samples": samples_figure, "generator": generator_figure}


def save_figures(runs: Sequence[Run], directory: Path) -> None:
    """Save all figures of each experiment as <experiment>-<kind>.png and .svg, and <experiment>.gif."""
    for experiment, settings in utils.group_runs(runs).items():
        for kind, draw in FIGURES.items():
            if (figure := draw(settings)) is not None:
                for suffix in (".png", ".svg") if kind != "samples" else (".png",):
                    write_figure(figure, directory / f"{experiment}-{kind}{suffix}")
        save_animation(settings, directory / f"{experiment}.gif")


def write_figure(figure: "Figure", path: Path) -> None:
    """Save a figure; the same figure always gives the same file."""
    from matplotlib import rc_context

    style, catch = rc_context({"svg.hashsalt": "dgr", "svg.fonttype": "none"}), warnings.catch_warnings(record=True)
    with style, atomic_write(path, "wb") as file, catch as caught:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(file, dpi=120, format=path.suffix[1:], metadata=metadata)
    if any("missing from font" in str(warning.message) for warning in caught):
        warn_once("figures show boxes for what no font here has: install one, such as Noto Sans CJK")


def save_figure(runs: Sequence[Run], path: Path) -> None:
    write_figure(precision_figure(list(itertools.chain(*utils.group_runs(runs).values()))), path)


def mean_sd(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, ± the standard deviation if there are several; empty if there are none."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):z.{digits}f}{deviation}" if values else ""  # z: no -0.000


def cells(setting: Setting) -> dict[str, str]:
    run, unfinished = setting.first, len(setting.runs) - len(setting.finished)
    row = {"experiment": run.experiment + (f" ({run.data_note})" if run.data_note else ""), "recipe": run.recipe}
    row |= {"replay mode": run.replay_mode, "flags": " ".join(run.flags)}
    seeds = ", ".join(str(run.seed) for run in setting.finished)
    row["seeds"] = seeds + (f" ({unfinished} not finished)" if unfinished else "")
    for name in ("average_precision", "forgetting", *utils.MEASURES, "seconds"):
        values = [run.measure(name) for run in setting.finished]
        row[name.replace("_", " ")] = "" if None in values else mean_sd(values, 0 if name == "seconds" else 3)
    return row


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys as a table in Markdown, without measures that no row has."""
    measures = {name.replace("_", " ") for name in utils.MEASURES}
    shown = [key for key in rows[0] if key not in measures or any(row[key] for row in rows)]
    lines = [shown, ["---"] * len(shown), *([row[key] for key in shown] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(runs: Sequence[Run]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    return markdown(list(map(cells, itertools.chain(*utils.group_runs(runs).values()))))


def main(arguments: list[str] | None = None) -> None:
    parser = utils.Parser(description="Tables and figures of runs, from their files.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=utils.to_path, metavar="RUN", help="result directory of one or many")
    parser.add_argument("--output", type=utils.to_path, metavar="FILE", help="their precision plots: .png, .svg, .pdf")
    parser.add_argument("--figures", type=utils.to_path, metavar="DIR", help="all figures, .png and .svg")
    parser.add_argument("--visdom", action="store_true", help="play the runs back on a visdom server")
    utils.add_options(parser, VisdomOptions)
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --output: {options.output} must end in .png, .svg or .pdf")
    runs = [run for group in utils.group_runs(utils.find_runs(options.runs)).values() for s in group for run in s.runs]
    print(table(runs))
    for run in runs if options.visdom else ():
        plots = LivePlots(run, options)
        if not plots.close():
            raise UserError(f"visdom at {plots.address} did not take the plots: start a server there and try again")
        print(f"visdom: {plots.address}")
    for name, make in (("output", save_figure), ("figures", save_figures)):
        if path := getattr(options, name):
            try:
                make(runs, path)
            except (OSError, ValueError) as error:
                raise UserError(f"--{name} {path}: {reason(error)}") from error
            print(f"{name}: {path}")


if __name__ == "__main__":
    utils.run_program(main)
