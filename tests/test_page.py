"""The live page as a person sees it: a real run, a real visdom server, a real browser."""

import csv
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import TINY, run, start
from test_visual import free_port, same_colour

import visual

NAME = "permutated-mnist-generative-replay-r0.3"
FLAGS = ["--train", *(flag for flag in TINY if flag != "--no-visdom"), "--generator-iterations=200", "--sample-size=12"]
FLAGS += ["--solver-iterations=400", "--image-log-interval=20", "--loss-log-interval=10", "--eval-log-interval=20"]

# What the page holds: for each window its title, and for each plot curves, axes, legend, lines and notes.
READ = r"""() => [...document.querySelectorAll('.layout .window')].map(window => {
    const plot = window.querySelector('.js-plotly-plot');
    return {
        title: window.querySelector('.bar').textContent.replace(/^[^a-z]+/, ''),
        image: window.querySelector('img') ? window.querySelector('img').naturalWidth : 0,
        curves: plot ? plot.data.map(c => ({x: [...c.x], y: [...c.y], colour: (c.line || {}).color})) : [],
        axes: plot ? [plot.layout.xaxis.title.text, plot.layout.yaxis.title.text] : [],
        legend: [...window.querySelectorAll('.legendtext')].map(text => text.textContent),
        lines: plot ? (plot.layout.shapes || []).map(shape => shape.x0) : [],
        notes: [...window.querySelectorAll('.annotation-text')].map(text => text.textContent),
    }
})"""


@pytest.fixture(scope="module")
def browser():
    """Chromium, steered by Playwright."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed (pip install playwright)"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as steering:
        browser = steering.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a visdom server that this machine alone can reach."""
    visdom = pytest.importorskip("visdom", reason="visdom is not installed")
    if not (Path(visdom.__file__).parent / "static/js/plotly-plotly.min.js").exists():
        pytest.skip("visdom has not downloaded its front end yet: start its server once, with a network")
    port = free_port()
    code = f"import sys; from visdom.server.run_server import main; sys.argv += ['-port', '{port}', '-bind_local', "
    code += f"'-env_path', {str(tmp_path_factory.mktemp('environments'))!r}]; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < limit, "visdom did not start"
            time.sleep(0.2)
    yield port
    process.kill()
    process.wait()


def windows_of(page):
    return {window["title"]: window for window in page.evaluate(READ)}


def test_the_page_shows_the_run(browser, server, small_mnist, tmp_path):
    """Windows, titles, legends, axes, colours, boundaries and points, first while it runs and then when it is over."""
    flags = [*FLAGS, f"--data-dir={small_mnist}", f"--visdom-port={server}", "--visdom-server=127.0.0.1"]
    page = browser.new_page(viewport={"width": 1340, "height": 1320})
    with start("main.py", *flags, cwd=tmp_path) as process:
        while process.poll() is None and not windows_of(page):  # the environment comes with the first window
            page.goto(f"http://127.0.0.1:{server}/env/{NAME}")
            page.wait_for_timeout(1000)
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 3", timeout=60_000)
        running = process.poll() is None
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert running, "the windows came after the run"
    check(page, tmp_path / "results" / NAME)
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000

    # A second run of the same name draws over the first; a page that is opened later shows the same.
    before = set(windows_of(page))
    assert run("main.py", *flags, "--seed=1", cwd=tmp_path).returncode == 0
    page.reload()
    check(page, tmp_path / "results" / NAME)
    assert set(windows_of(page)) == before


def check(page, results):
    """The page shows what the files of the run say."""
    last = "samples: task 2, iteration 200"
    page.wait_for_function(f"[...document.querySelectorAll('.bar')].some(e => e.textContent.includes('{last}'))")
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length == 5")
    expected, options = {}, json.loads((results / "config.json").read_text())["options"]
    with (results / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["phase"] != "test":
                precision = row["name"].startswith("precision-")
                window = "precision" if precision else f"{row['phase']} {row['name']}"
                x = (int(row["task"]) - 1) * options[f"{row['phase']}_iterations"] + int(row["iteration"])
                expected.setdefault(window, {}).setdefault(row["name"], []).append((x, float(row["value"])))
    limit = time.monotonic() + 20
    while True:  # the newest points come a moment after the window
        shown = windows_of(page)
        try:
            compare(shown, expected, options)
            break
        except AssertionError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)
    assert shown[last]["image"] > 6 * 32


def compare(shown, expected, options):
    samples = [title for title in shown if title.startswith("samples: ")]
    assert len(samples) == 1 and {*shown} == {*expected, *samples}
    for title, curves in expected.items():
        window, phase = shown[title], title.split()[0] if title != "precision" else "solver"
        points = [
            [(x, y) for x, y in zip(c["x"], c["y"], strict=True) if y is not None and y == y] for c in window["curves"]
        ]
        assert sorted(map(len, points)) == sorted(map(len, curves.values()))
        for ours, theirs in zip(points, curves.values(), strict=True):
            assert [x for x, _ in ours] == [x for x, _ in theirs]
            assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-5, abs=1e-6)
        words = title.removeprefix("generator ").replace("-", " ")
        assert window["axes"] == [f"{phase} iterations", words]
        assert window["lines"] == [0, options[f"{phase}_iterations"]] and window["notes"] == ["task 1", "task 2"]
    precision = shown["precision"]
    assert precision["legend"] == ["task 1: original", "task 2: permutation 1"]
    for task, curve in enumerate(precision["curves"], start=1):
        assert same_colour(curve["colour"], visual.task_colour(task))
