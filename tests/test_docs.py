"""README, --help and docstrings say the same: every flag is explained, every flag named exists, every command runs."""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from conftest import ROOT, TINY, call, small_digits
from PIL import Image
from torch import nn

import dgr
import main
import models
import visual

README = (ROOT / "README.md").read_text()
SOURCES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("arts/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "run_full_experiments"]
)
SCRIPTS = ["visual.py", "arts/figures.py", "benchmarks/bench.py", "benchmarks/ablations.py", "run_full_experiments"]
# Flags of other programs that are named: visdom's server (with one dash: not found here), SLURM, pip, git.
FOREIGN = {"--logdir", "--no-deps", "--array", "--gpus", "--wrap", "--abbrev", "--always", "--dirty"}


def help_of(script):
    process = call(script, "--help", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def flags():
    """Every flag that one of the programs takes."""
    texts = [main.make_parser().format_help(), *map(help_of, SCRIPTS)]
    return {flag for text in texts for flag in flags_in(text)}


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))


def one_line(text):
    return " ".join(text.split())


def test_readme_has_the_whole_help(monkeypatch):
    """Every flag with its meaning and defaults, as --help prints them; only line breaks may differ."""
    monkeypatch.delenv("DGR_DATA_DIR", raising=False)
    block = re.search(r"```text\n(usage: main\.py.*?)```", README, re.DOTALL)[1]
    explained = main.make_parser()
    for action in explained._actions:
        assert action.help and len(action.help) > 8, action.option_strings
        shown = (action.help % vars(action)).strip() if "%" in action.help else action.help
        assert not action.choices or f"{{{','.join(action.choices)}}}" in block, action.option_strings
        assert one_line(shown) in one_line(block), f"make the README's block anew: ./main.py --help says {shown!r}"
    assert flags_in(block) == {flag for action in explained._actions for flag in action.option_strings if "--" in flag}


def test_every_flag_that_is_named_exists(flags):
    texts = {"README.md": README, "benchmarks/README.md": (ROOT / "benchmarks/README.md").read_text()}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                texts[f"{path.name}: {getattr(node, 'name', '')}"] = ast.get_docstring(node)
    assert len(texts) > 150
    for where, text in texts.items():
        unknown = flags_in(text) - flags - FOREIGN
        assert not unknown, f"{where} names {unknown}"


def test_every_file_and_heading_that_is_linked_exists():
    links = re.findall(r"\]\((?!http)(.*?)\)", README, re.DOTALL)
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall("^#+ (.*)", README, re.M)
    }
    assert len(links) > 5
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).exists(), link


def commands():
    """Every line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def trained_place(tmp_path_factory, small_mnist):
    """A directory with small data of all kinds and a trained scholar."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(small_mnist, place / "datasets")
    images, labels = small_digits(60, seed=1)
    images = images.astype(np.uint8)
    np.savez(place / "my-digits.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    (place / "datasets/svhn").mkdir()
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        content = {"X": random.integers(0, 255, (32, 32, 3, 60), dtype=np.uint8), "y": np.arange(60)[:, None] % 10 + 1}
        scipy.io.savemat(place / f"datasets/svhn/{part}_32x32.mat", content)
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        main.run_training(main.parse(["--train", *TINY]))
    return place


@pytest.fixture
def place(tmp_path, trained_place):
    """A copy of it for one command: what another has left behind does not matter."""
    return shutil.copytree(trained_place, tmp_path / "place")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("./main.py", "./visual.py"))])
def test_command_of_the_readme_runs(command, place, monkeypatch, capsys):
    """In its tiny form: the same flags, then small sizes."""
    monkeypatch.chdir(place)
    script, *arguments = shlex.split(command)
    if script == "./visual.py":
        results = sorted(str(path.parent) for path in place.glob("results/*/config.json"))
        arguments = [results[0] if word.startswith("results/") else word for word in arguments]
        if "--visdom" in arguments:  # the server is tested elsewhere
            monkeypatch.setattr(visual, "play_back", lambda *_: None)
        visual.main(arguments)
    elif "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main.parse(arguments)
    else:
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments, *TINY, "--data-dir=datasets"])
        main.main()
    assert capsys.readouterr().out


def test_generator_of_the_readme_learns_and_replays(place, monkeypatch, capsys):
    """The class as it stands there, trained by main.py; with two pictures, as bright as the mean of its images."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    defined = {"dgr": dgr, "nn": nn, "step": models.step}
    exec(code, defined)
    monkeypatch.setitem(models.GENERATORS, "mean", defined["Mean"])
    monkeypatch.chdir(place)
    images = np.full((60, 28, 28), 200, dtype=np.uint8)
    np.savez("grey.npz", x_train=images, y_train=np.zeros(60, int), x_test=images, y_test=np.zeros(60, int))
    flags = ["--tasks", "grey.npz", "grey.npz", "--generator=mean", *TINY, "--generator-iterations=150", "--lr=0.03"]
    main.run_training(main.parse(["--train", *flags, "--image-log-interval=50"]))
    main.run_test(main.parse(["--test", *flags]))
    with Image.open("samples/grey+grey-generative-replay-r0.3-mean-sample.jpg") as picture:
        drawn = np.asarray(picture)[2:34, 2:34]
    assert drawn[8:24, 8:24].mean() == pytest.approx(200, abs=10)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("./run_full_experiments")])
def test_run_full_experiments_of_the_readme_is_a_list_of_runs(command, tmp_path):
    """With --dry-run: what each would start is a command line that main.py takes."""
    words = shlex.split(command.split("|")[0].split(">")[0])
    process = call(
        "run_full_experiments", *words[1:], *(["--dry-run"] if "--dry-run" not in words else []), cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    assert lines
    for line in lines:
        for part in line.split("&&"):
            script, *arguments = shlex.split(part)
            assert script == "./main.py"
            options = main.parse(arguments)
            assert options.train or options.test


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_target_of_the_readme_exists(command):
    target = [word for word in command.split()[1:] if "=" not in word]
    process = subprocess.run(["make", "--dry-run", *target], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_other_commands_name_what_is_there():
    """What the other lines of the README start or read: requirement files, modules, nothing that is not there."""
    known = ("./main.py", "./visual.py", "make ", "export ")
    rest = [c for c in commands() if not c.startswith(known) and not c.startswith("./run_full_experiments")]
    assert rest
    for command in rest:
        for path in re.findall(r"requirements[\w-]*\.txt", command):
            assert (ROOT / path).exists(), command
        if module := re.search(r"python -m ([\w.]+)", command):
            try:
                assert importlib.util.find_spec(module[1]), command
            except ModuleNotFoundError:
                pytest.skip(f"{module[1]} is not installed")
