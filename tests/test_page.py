"""A run as people see it elsewhere: the live page in a real browser, TensorBoard, pandas."""

import csv
import errno
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line_error, run, start
from PIL import Image
from test_resume import NAME, flags, run_here, run_until
from test_visual import needs_visdom, visdom_server
from test_visual import wait_for as wait_briefly_for

import visual

needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed"
)


def wait_for(condition) -> None:
    wait_briefly_for(condition, seconds=90)  # a program starts, a browser draws


def metrics(directory) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------- the page in a browser

TITLES = ["original", "permutation 1", "permutation 2"]
SIZES = {"generator": 20, "solver": 40}
SAMPLES_TITLE = f"samples: task 3, iteration {SIZES['generator']}"

# What a person sees of each plot: title, axes, legend, curves with colour and points, beginnings of tasks.
LOOK = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => {
    const layout = plot._fullLayout, box = element => element.getBoundingClientRect().toJSON()
    return {
        title: layout.title.text, x: layout.xaxis.title.text, y: layout.yaxis.title.text,
        legend: [...plot.querySelectorAll('.legendtext')].map(text => text.textContent),
        curves: plot._fullData.map(curve => ({
            name: curve.name, colour: curve.line.color,
            points: [...curve.x].map((x, i) => [x, curve.y[i]]).filter(point => point[1] !== null),
        })),
        lines: layout.shapes.map(line => [line.x0, line.x1]),
        labels: layout.annotations.map(label => [label.text, label.font.color]),
        box: box(plot),
        texts: [...plot.querySelectorAll('.legend, .annotation, .gtitle, .g-xtitle, .g-ytitle')].map(box),
    }
})"""


@pytest.fixture
def page():
    """An empty page of a headless Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    visdom = Path(importlib.util.find_spec("visdom").origin).parent
    if not (visdom / "static/js/plotly-plotly.min.js").exists():
        pytest.skip("visdom's front end is not there: `python -m visdom.server` downloads it when it is first started")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1280, "height": 1130})
        browser.close()


def points_of(directory, lengths) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By title and legend, the points that the plots of a run must have, from its metrics.csv."""
    plots = {}
    for row in metrics(directory):
        phase, name, task = row["phase"], row["name"], int(row["task"])
        if phase == "test":
            continue
        title = {"loss": "solver loss", "critic-loss": "generator critic loss", "generator-loss": "generator loss"}.get(
            name, f"generator {name}"
        )
        if name.startswith("precision-"):
            title, task = "precision", int(name.removeprefix("precision-"))
        point = [(int(row["task"]) - 1) * lengths[phase] + int(row["iteration"]), float(row["value"])]
        plots.setdefault(title, {}).setdefault(f"task {task}: {TITLES[task - 1]}", []).append(point)
    return plots


def points_seen(page) -> dict[str, dict[str, list[tuple[int, float]]]]:
    plots = page.evaluate(LOOK)
    assert len({plot["title"] for plot in plots}) == len(plots)
    return {plot["title"]: {curve["name"]: curve["points"] for curve in plot["curves"]} for plot in plots}


def bars(page) -> list[str]:
    return sorted(bar.inner_text().strip() for bar in page.query_selector_all(".window .bar > div.pull-right"))


@needs_visdom
def test_the_page_of_a_run_is_what_its_files_say(tmp_path, small_mnist, page):
    with visdom_server(tmp_path / "server") as port:
        sizes = [f"--{phase}-iterations={n}" for phase, n in SIZES.items()]
        arguments = [flag for flag in flags(tmp_path, small_mnist, *sizes) if flag != "--no-visdom"]
        arguments += ["--mnist-permutation-number=3", "--checkpoint-interval=300"]
        arguments += ["--visdom-server=127.0.0.1", f"--visdom-port={port}"]
        directory = tmp_path / "results" / NAME
        process = start("main.py", *arguments, cwd=tmp_path)
        wait_for(
            lambda: (directory / "metrics.csv").exists() and "solver,1," in (directory / "metrics.csv").read_text()
        )
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None

        # In the middle of the run: the first task, and no line of the next ones.
        page.goto(f"http://127.0.0.1:{port}/env/{NAME}")
        page.wait_for_selector(".js-plotly-plot")
        wait_for(lambda: "generator critic loss" in points_seen(page))
        early, so_far = points_seen(page), points_of(directory, SIZES)
        for title, curves in early.items():
            for name, points in curves.items():
                assert points == so_far.get(title, {}).get(name, [])[: len(points)]
        assert all(plot["lines"] == [[0, 0]] for plot in page.evaluate(LOOK))
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "no live plots" not in error

        # At its end, on the page that is still open.
        expected = points_of(directory, SIZES)
        wait_for(lambda: points_seen(page) == expected)
        wait_for(lambda: bars(page) == sorted([*expected, SAMPLES_TITLE]))
        names = [f"task {task}: {title}" for task, title in enumerate(TITLES, start=1)]
        for plot in page.evaluate(LOOK):
            phase = "generator" if "generator" in plot["title"] else "solver"
            assert plot["x"] == f"{phase} iterations"
            assert plot["y"] == {"precision": "precision (share of test images)"}.get(plot["title"], plot["title"])
            assert plot["legend"] == [curve["name"] for curve in plot["curves"]] == names
            assert [curve["colour"].upper() for curve in plot["curves"]] == visual.TASK_COLOURS[:3]
            assert plot["lines"] == [[task * SIZES[phase]] * 2 for task in range(3)]
            assert plot["labels"] == [list(pair) for pair in zip(names, visual.TASK_COLOURS, strict=False)]
            for text in plot["texts"]:
                assert inside(text, plot["box"]), (plot["title"], text, plot["box"])
        page.wait_for_function("[...document.querySelectorAll('.window img')].some(image => image.naturalWidth > 200)")
        boxes = [window.bounding_box() for window in page.query_selector_all(".window")]
        boxes = [
            {"left": b["x"], "top": b["y"], "right": b["x"] + b["width"], "bottom": b["y"] + b["height"]} for b in boxes
        ]
        assert len(boxes) == 6 and all(box["right"] <= 1280 for box in boxes)
        assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
        page.screenshot(path=tmp_path / "live.png", full_page=True)
        assert (tmp_path / "live.png").stat().st_size > 20_000

        # A second, shorter run of the same name: the same windows, of its own curves, on the open page and a fresh one.
        shorter = {"generator": 20, "solver": 12}
        process = start("main.py", *arguments, "--solver-iterations=12", cwd=tmp_path)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and (tmp_path / "results" / f"{NAME}~1").exists(), error
        expected = points_of(directory, shorter)
        for _ in range(2):
            wait_for(lambda: points_seen(page) == expected)
            wait_for(lambda: bars(page) == sorted([*expected, SAMPLES_TITLE]))
            page.reload()


def inside(one, other) -> bool:
    return (
        other["left"] <= one["left"] <= one["right"] <= other["right"]
        and other["top"] <= one["top"] <= one["bottom"] <= other["bottom"]
    )


def overlap(one, other) -> bool:
    return (
        min(one["right"], other["right"]) - max(one["left"], other["left"]) > 1
        and min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > 1
    )


# ---------------------------------------------------------------------------------------------- TensorBoard, pandas


def test_metrics_load_into_pandas_as_they_are(tmp_path, small_mnist):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    run_here(flags(tmp_path, small_mnist, "--replay-mode=none"))
    (directory,) = (tmp_path / "results").glob("*-none-r1")
    frame = pandas.read_csv(directory / "metrics.csv")
    assert [frame[column].dtype.kind for column in ("task", "iteration", "value")] == ["i", "i", "f"]
    assert frame.notna().all(axis=None)
    assert frame.astype(str).to_dict("records") == metrics(directory)


def board(directory):
    """What TensorBoard reads in a run's directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def assert_board_is_what_the_files_say(directory, generator=4, solver=6, tasks=2) -> None:
    """Every scalar, the newest samples, the outcome."""
    expected = {}
    for row in metrics(directory):
        length = generator if row["phase"] == "generator" else solver
        at = (int(row["task"]) - 1) * length + int(row["iteration"])
        expected.setdefault(f"{row['phase']}/{row['name']}", []).append((at, pytest.approx(float(row["value"]))))
    summary = json.loads((directory / "summary.json").read_text())
    expected["average-precision"] = [(tasks * solver, pytest.approx(summary["average_precision"]))]
    seen = board(directory)
    assert {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]} == expected
    newest = Image.open(io.BytesIO(seen.Images("samples")[-1].encoded_image_string))
    with Image.open(directory / visual.SAMPLES) as file:
        assert np.abs(np.asarray(newest, dtype=int) - np.asarray(file)).max() <= 1  # one cuts off, the other rounds


def hparams_of(directory) -> dict[str, object]:
    from tensorboard.plugins.hparams import metadata

    plugin = board(directory).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data
    values = metadata.parse_session_start_info_plugin_data(plugin.content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


@needs_tensorboard
def test_tensorboard_shows_what_the_files_say(tmp_path, small_mnist):
    directory = tmp_path / "results" / NAME
    run_here(flags(tmp_path, small_mnist, "--tensorboard"))
    assert_board_is_what_the_files_say(directory)
    assert [image.step for image in board(directory).Images("samples")] == [2, 4, 6, 8]
    seen = hparams_of(directory)
    assert (seen["lr"], seen["replay_mode"], seen["generator_iterations"]) == (1e-3, "generative-replay", 4)

    # A second run of the same name leaves the first one's as they are, and has its own.
    run_here(flags(tmp_path, small_mnist, "--tensorboard", "--lr=2e-3"))
    assert_board_is_what_the_files_say(directory)
    assert hparams_of(directory)["lr"] == 2e-3
    assert_board_is_what_the_files_say(directory.with_name(f"{NAME}~1"))
    assert hparams_of(directory.with_name(f"{NAME}~1"))["lr"] == 1e-3


# Of the 23 states of such a run (tests/test_resume.py): in the first generator, the first solver, the second of both.
@needs_tensorboard
@pytest.mark.parametrize("saves, before", [(3, True), (9, True), (15, True), (22, True), (9, False)])
def test_tensorboard_of_a_resumed_run_has_every_point_once(tmp_path, small_mnist, monkeypatch, saves, before):
    """Stopped where more was written than the state knows of, and half a record; or begun without the flag."""
    arguments, directory = flags(tmp_path, small_mnist), tmp_path / "results" / NAME
    run_until(monkeypatch, saves, [*arguments, *["--tensorboard"] * before])
    for file in directory.glob("tensorboard/events*"):
        with file.open("ab") as half:
            half.write(b"\x50\0\0")
    run_here([*arguments, "--tensorboard", "--resume"])
    assert_board_is_what_the_files_say(directory)
    steps = [image.step for image in board(directory).Images("samples")]
    assert steps == ([2, 4, 6, 8] if before else [6, 8])
    assert len(list(directory.glob("tensorboard/events*"))) == 1


@needs_tensorboard
def test_tensorboard_that_cannot_be_written_is_one_warning(tmp_path, small_mnist, monkeypatch, capsys):
    from torch.utils.tensorboard import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    run_here(flags(tmp_path, small_mnist, "--tensorboard"))
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_tensorboard_not_installed_is_one_line(tmp_path, small_mnist):
    """As where it is missing: a package of the name that cannot be imported stands before any other."""
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")\n")
    arguments = flags(tmp_path, small_mnist, "--tensorboard")
    process = run("main.py", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_one_line_error(process, 2, "--tensorboard", "pip install tensorboard")
    assert not (tmp_path / "results").exists()
