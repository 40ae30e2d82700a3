"""README, docs, --help and docstrings are right: flags and links exist, commands and examples run."""

import argparse
import ast
import contextlib
import gzip
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, TINY, call, small_digits
from PIL import Image

import data
import dgr
import main
import models
import utils
import visual

MANUAL = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]  # whose commands and examples run
PAGES = [*MANUAL, ROOT / "arts/RESULTS.md", ROOT / "benchmarks/README.md"]
SCRIPTS = ["visual.py", "arts/figures.py", "benchmarks/bench.py", "benchmarks/ablations.py"]
SCRIPTS += ["benchmarks/gpu.py", "benchmarks/layers.py", "benchmarks/peers.py", "run_full_experiments"]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("arts/*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "run_full_experiments"]
# Flags of other programs that are named: TensorBoard, pip, SLURM.
FOREIGN = {"--logdir", "--no-deps", "--array", "--gpus", "--wrap"}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(language, path):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def without_code(path):
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------ flags and links


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))


@pytest.fixture(scope="module")
def flags():
    """Every flag that one of the programs takes."""
    found = flags_in(main.make_parser().format_help())
    for script in SCRIPTS:
        process = call(script, "--help", cwd=ROOT)
        assert process.returncode == 0, process.stderr
        found |= flags_in(process.stdout)
    return found


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield f"{name_of(path)}: {getattr(node, 'name', '')}", ast.get_docstring(node)


def test_every_flag_that_is_named_exists(flags):
    texts = {name_of(page): page.read_text() for page in PAGES}
    texts |= {where: text for path in SOURCES for where, text in docstrings(path)}
    assert len(texts) > 150
    for where, text in texts.items():
        unknown = flags_in(text) - flags - FOREIGN
        assert not unknown, f"{where} names {unknown}"


@pytest.mark.parametrize("script", ["main.py", *SCRIPTS])
def test_every_program_prints_where_standard_output_is_something_simpler(script, monkeypatch):
    """As in a notebook, whose output is no text file."""

    class Output:
        text = ""

        def write(self, text):
            self.text += text

    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "stdout", Output())
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "usage: " in sys.stdout.text


def test_pip_says_in_one_line_that_this_is_not_installed(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--no-index", f"--target={tmp_path / 'there'}", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "[1 lines of output]" in process.stderr
    assert "runs from its directory" in process.stderr and not (tmp_path / "there").exists()


def test_options_txt_is_what_help_prints(monkeypatch):
    """Only line breaks may differ, as they do between versions of Python."""
    monkeypatch.delenv("DGR_DATA_DIR", raising=False)
    written, printed = (ROOT / "docs/options.txt").read_text(), main.make_parser().format_help()
    assert written.split() == printed.split(), "make it anew: env -u DGR_DATA_DIR ./main.py --help > docs/options.txt"


def test_every_option_is_explained():
    for action in main.make_parser()._actions:
        assert action.help and len(action.help) > 8, action.option_strings


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)", without_code(path), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")
        found.append(anchor + (f"-{n}" if (n := found.count(anchor)) else ""))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_and_heading_that_is_linked_exists(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_a_link_to_a_missing_heading_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `word`, 2017\n\n```sh\n# no heading\n```\n\n## Again\n## Again\n")
    assert anchors(page) == ["a-word-2017", "again", "again-1"]


# ------------------------------------------------------------------------------------------------ sizes and numbers


def test_readme_takes_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    assert len(text.split()) <= 2000


def test_repository_has_few_files():
    try:
        process = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    except OSError:
        pytest.skip("git is not installed")
    if process.returncode != 0:
        pytest.skip("this is not a git checkout")
    files = process.stdout.split("\0")[:-1]
    assert len(files) <= 130
    assert len([file for file in files if file.startswith("arts/")]) <= 60


def test_differences_are_numbered_and_tests_cite_numbers_that_exist():
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs/differences.md").read_text(), re.MULTILINE)
    numbers = list(map(int, rows))
    assert numbers == list(range(1, 34))
    cited = set()
    for path in ROOT.glob("tests/*.py"):
        for several in re.findall(r"differences\.md, (\d+(?:(?:,|;| and|; and|, and) \d+)*)", path.read_text()):
            cited |= set(map(int, re.findall(r"\d+", several)))
    assert cited
    assert cited <= set(numbers)


def test_recipes_of_the_docs_are_those_of_the_program():
    """The table in docs/running.md: a cell, or where it is empty that of the first recipe, is the recipe's value."""
    table = re.search(r"^\| Option \|.*?\n\n", (ROOT / "docs/running.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    columns = [re.fullmatch(r"`(\w+)` ?(.*)", title).groups() for title in head[1:]]
    shown = {(recipe, experiment): {} for recipe, names in columns for experiment in names.split(", ")}
    for flag, *cells in rows:
        for (recipe, names), cell in zip(columns, cells, strict=True):
            for experiment in names.split(", "):
                shown[recipe, experiment][flag.strip("`")] = cell or cells[0]
    kept = {(recipe, name) for recipe, experiments in main.RECIPES.items() for name in experiments}
    assert set(shown) == kept
    options = {flag.strip("`")[2:].replace("-", "_") for flag, *_ in rows}
    assert options == {key for recipe in main.RECIPES.values() for values in recipe.values() for key in values}
    default = asdict(main.parse(["--train", "--replay-targets=soft"])) | {"replay_targets": "hard"}
    for (recipe, experiment), values in shown.items():
        expected = default | main.RECIPES[recipe][experiment]
        for flag, value in values.items():
            is_set = expected[flag[2:].replace("-", "_")]
            assert type(is_set)(value) == is_set, (recipe, experiment, flag)
    assert main.parse(["--train"]).replay_targets == default["replay_targets"]


# ------------------------------------------------------------------------------------------------ commands


def commands():
    """Every line of the shell blocks, without its comment."""
    lines = [
        line.split(" #")[0].strip()
        for path in MANUAL
        for block in blocks("sh", path)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in dict.fromkeys(lines) if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def trained_place(tmp_path_factory, small_mnist):
    """A directory with small data of all kinds and a trained scholar."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(small_mnist, place / "datasets")
    shutil.copytree(place / "datasets/mnist/MNIST", place / "datasets/fashion-mnist/FashionMNIST")
    for file in (place / "datasets/fashion-mnist").rglob("*-ubyte"):
        with gzip.open(file.with_name(f"{file.name}.gz"), "wb") as compressed:
            compressed.write(file.read_bytes())
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


SMALL = [*TINY, "--data-dir=datasets"]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("./main.py", "./visual.py"))])
def test_command_of_the_docs_runs(command, place, monkeypatch, capsys):
    """In its tiny form: the same flags, then small sizes. What --test wants is trained first."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(dgr.EWC, "images", 20)
    script, *arguments = shlex.split(command)
    if script == "./visual.py":
        results = sorted(str(path.parent) for path in place.glob("results/*/config.json"))
        arguments = [results[0] if word.startswith("results/") else word for word in arguments]
        if "--visdom" in arguments:  # the server is tested elsewhere
            monkeypatch.setattr(visual.LivePlots, "close", lambda _: True)
        visual.main(arguments)
    elif "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main.parse(arguments)
    else:
        if "--test" in arguments:
            training = [word.replace("--test", "--train") for word in arguments]
            main.main(training[: training.index("--on")] + SMALL if "--on" in training else training + SMALL)
        if "--continue-from" in arguments:  # which a command above it in the docs has trained
            main.main(["--train", "--quick", "--tasks=mnist", *SMALL])
        main.main([*arguments, *SMALL])
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("./run_full_experiments")])
def test_run_full_experiments_of_the_docs_is_a_list_of_runs(command, place, monkeypatch):
    """With --dry-run: what each would start is a command line that main.py takes."""
    monkeypatch.chdir(place)
    words = shlex.split(command.split("|")[0].split(">")[0])
    dry = [] if "--dry-run" in words else ["--dry-run"]
    process = call("run_full_experiments", *words[1:], *dry, cwd=place)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    assert lines
    for line in lines:
        assert main.parse(shlex.split(line.split(" && ")[1])[2:]).train


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_target_of_the_docs_exists(command):
    target = [word for word in command.split()[1:] if "=" not in word]
    process = subprocess.run(["make", "--dry-run", *target], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_other_commands_name_what_is_there():
    """What the other lines start or read: scripts, requirement files, modules."""
    rest = [c for c in commands() if not c.startswith(("./main.py", "./visual.py", "./run_full_experiments", "make "))]
    assert rest
    for command in rest:
        for path in re.findall(r"requirements[\w-]*\.txt|(?:arts|benchmarks)/\w+\.py", command):
            assert (ROOT / path).exists(), command
        if module := re.search(r"python3? -m ([\w.]+)", command):
            with contextlib.suppress(ModuleNotFoundError):  # visdom, which is optional
                assert importlib.util.find_spec(module[1]), command


# ------------------------------------------------------------------------------------------------ examples


@pytest.fixture
def example_place(place, monkeypatch):
    """A place for examples: its small MNIST counts as official, and what they register is gone afterwards."""
    monkeypatch.chdir(place)
    for module, name in ((models, "GENERATORS"), (models, "SOLVERS"), (dgr, "REPLAY_MODES"), (data, "EXPERIMENTS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    mnist = data.DATA_SETS["mnist"]
    md5 = {name: data.checksum(place / "datasets" / mnist.folder / name) for name in mnist.md5}
    monkeypatch.setitem(data.DATA_SETS, "mnist", replace(mnist, md5=md5))
    return place


def run_example(code, *arguments):
    """Run a block as the file that it is, with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["example.py", *arguments])
        exec(code, {"__name__": "__main__"})


def import_example(code):
    """Run a block, but not main.py. Returns what it defines."""
    defined = {"__name__": "example"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "run_program", lambda _: None)
        exec(code, defined)
    return defined


def example(page, words):
    """The block of a page that has these words in it."""
    (code,) = [code for code in blocks("python", ROOT / page) if words in code]
    return code


EXAMPLES = [code for page in MANUAL for code in blocks("python", page)]


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.sub(r"\W+", "-", code)[:40])
def test_example_of_the_docs_runs(code, example_place, capsys):
    """With each command that its first lines name, in tiny form."""
    commands = [shlex.split(line)[1:] for line in re.findall(r"^# python (.*)", code, re.MULTILINE)]
    for arguments in commands:
        run_example(code, *arguments, *SMALL)
    if code in blocks("python", ROOT / "README.md"):
        run_example(re.sub(r"\b[1-9]\d\d+\b", "4", code))  # sizes and iterations of three digits and more
        assert capsys.readouterr().out
    elif not commands:
        run_example(code)


def test_generator_of_the_docs_learns_and_replays(example_place):
    """Trained by main.py on two tasks of grey images, it draws images that are as bright as their mean."""
    code = example("docs/extending.md", "dgr.Generator")
    images = np.full((60, 28, 28), 200, dtype=np.uint8)
    np.savez("grey.npz", x_train=images, y_train=np.zeros(60, int), x_test=images, y_test=np.zeros(60, int))
    flags = ["--tasks", "grey.npz", "grey.npz", "--generator=mean", *TINY, "--generator-iterations=150", "--lr=0.03"]
    flags += ["--data-dir=datasets"]
    run_example(code, "--train", *flags)
    run_example(code, "--test", *flags)
    with Image.open("samples/grey+grey-generative-replay-r0.3-mean-sample.jpg") as picture:
        drawn = np.asarray(picture)[2:34, 2:34]
    assert drawn[8:24, 8:24].mean() == pytest.approx(200, abs=10)


def test_replay_mode_of_the_docs_replays_a_few_stored_images(example_place):
    import_example(example("docs/extending.md", "dgr.ReplayMode"))
    options = main.parse(["--train", "--replay-mode=few-images", *SMALL])
    tasks = data.make_tasks(data.Library(Path("datasets"), torch.device("cpu")), options)
    scholar = models.make_scholar(1, 10, options)
    replay = dgr.REPLAY_MODES["few-images"](scholar, [task.train for task in tasks], dgr.Targets("hard"))
    x, y = replay.sample(500)
    assert 20 < len(x.flatten(1).unique(dim=0)) <= 40
    assert torch.equal(y, scholar.solver.answer(x))
    assert replay.sample(0)[0].shape == (0, 1, 32, 32)


def test_experiment_of_the_docs_turns_images(example_place):
    import_example(example("docs/extending.md", "data.EXPERIMENTS"))
    options = main.parse(["--train", "--experiment=rotated-mnist"])
    tasks = data.make_tasks(data.Library(Path("datasets"), torch.device("cpu")), options)
    for quarters, task in enumerate(tasks):
        assert torch.equal(tasks[0].test.images.rot90(quarters, dims=(2, 3)), task.test.images)
    assert len(tasks) == 4


def test_options_of_the_docs_become_flags():
    declared = import_example(example("docs/extending.md", "class ScholarOptions"))["ScholarOptions"]
    parser = utils.Parser(exit_on_error=False)
    utils.add_options(parser, declared)
    parsed = parser.parse_args(["--mean-lr=0.5", "--mean-units=7"])
    assert (parsed.mean_lr, parsed.mean_units) == (0.5, 7)
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--mean-lr=0"])


def test_npz_of_the_docs_is_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example(example("docs/running.md", "np.savez"))
    train, test = data.Library(tmp_path, torch.device("cpu")).load_own(Path("my-digits.npz"))
    assert (len(train), len(test)) == (800, 200)
