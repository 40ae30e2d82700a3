"""main.py at tiny sizes: as a user starts it, and its further uses in this process."""

import csv
import errno
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, run, write_small_mnist
from PIL import Image
from test_data import write_small_svhn, write_task
from test_resume import harm

import data
import dgr
import main
import utils

NAME = "permutated-mnist-generative-replay-r0.3"


def train(cwd, data_dir, *flags, start=call):
    return start("main.py", "--train", "--data-dir", data_dir, *TINY, *flags, cwd=cwd)


def draw(cwd, *flags, start=call):
    return start("main.py", "--test", "--data-dir=none", *TINY, *flags, cwd=cwd)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_mnist):
    """A directory in which a scholar was trained, and what the run printed."""
    cwd = tmp_path_factory.mktemp("trained")
    process = train(cwd, small_mnist, start=run)
    assert process.returncode == 0, process.stderr
    return cwd, process


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------- train


def test_run_leaves_its_files(trained):
    directory = trained[0] / "results" / NAME
    files = {path.name for path in directory.iterdir()}
    assert files == {"config.json", "metrics.csv", "precision.png", "samples.png", "summary.json"}
    assert [path.name for path in (trained[0] / "checkpoints").iterdir() if path.suffix != ".lock"] == [NAME]
    config = read_json(directory / "config.json")
    assert config["options"]["solver_iterations"] == 6 and config["options"]["seed"] == config["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__ and config["name"] == NAME
    assert len(config["data"]["checksums"]) == 4 == len(config["data"]["unverified"])
    assert {"commit", "device", "dtype", "started", "command"} <= set(config)


def test_summary_agrees_with_metrics(trained):
    directory = trained[0] / "results" / NAME
    summary = read_json(directory / "summary.json")
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = {(int(row["task"]), row["name"]): float(row["value"]) for row in rows if row["phase"] == "test"}
    last = [whole[2, "precision-1"], whole[2, "precision-2"]]
    assert summary["precision"] == [[whole[1, "precision-1"], None], last]
    assert summary["average_precision"] == pytest.approx(sum(last) / 2)
    assert {row["phase"] for row in rows} == {"generator", "solver", "test"}


def test_a_run_prints_the_outcome_and_a_line_for_each_phase(trained):
    """Without a terminal."""
    cwd, process = trained
    summary = read_json(cwd / "results" / NAME / "summary.json")
    assert f"average precision {summary['average_precision']:.4f}" in process.stdout
    assert f"forgetting {summary['forgetting']:.4f}" in process.stdout
    assert process.stdout.strip().endswith(f"files: results/{NAME}, scholar: checkpoints/{NAME}")
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning: ")]
    expected = [f"task {task}/2 {phase}" for task in (1, 2) for phase in ("generator", "solver")]
    assert [line.split(":")[0] for line in lines] == expected and "\r" not in process.stderr


def test_same_seed_same_files(trained, tmp_path, small_mnist):
    """Bit for bit, apart from times."""

    def left(cwd):
        summary = read_json(cwd / "results" / NAME / "summary.json")
        scholar = torch.load(cwd / "checkpoints" / NAME, weights_only=True)["scholar"]
        weights = {name: value.numpy().tobytes() for name, value in scholar.items()}
        return ((cwd / "results" / NAME / "metrics.csv").read_bytes(), summary | {"seconds": 0}, weights)

    assert train(tmp_path, small_mnist, start=run).returncode == 0
    assert left(tmp_path) == left(trained[0])


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--experiment=split-mnist", "split-mnist-generative-replay-r0.3"),
        ("--experiment=mnist-chain", "mnist-chain-generative-replay-r0"),
        ("--experiment=mnist-svhn", "mnist-svhn-generative-replay-r0.3"),
        ("--experiment=svhn-mnist", "svhn-mnist-generative-replay-r0.3"),
        ("--replay-mode=noise-replay", "permutated-mnist-noise-replay-r0.3"),
        # A VAE that learns inputs outside of [0, 1].
        ("--replay-mode=noise-replay --generator=vae --sample-log", "permutated-mnist-noise-replay-r0.3-vae"),
        ("--replay-mode=exact-replay --replay-targets=soft", "permutated-mnist-exact-replay-r0.3-soft"),
        ("--generator=vae --replay-targets=soft --temperature=3", "permutated-mnist-generative-replay-r0.3-soft-vae"),
        ("--generator=vae --solver=mlp", "permutated-mnist-generative-replay-r0.3-vae-mlp"),
        ("--recipe=best", "permutated-mnist-generative-replay-rauto-best"),
        ("--quick", "permutated-mnist-generative-replay-rauto-quick"),
        ("--recipe=vae --experiment=split-mnist", "split-mnist-generative-replay-rauto-vae"),
    ],
)
def test_every_experiment_mode_and_recipe_runs_and_draws(tmp_path, flags, name):
    write_small_svhn(write_small_mnist(tmp_path / "data"))
    process = train(tmp_path, tmp_path / "data", *flags.split())
    assert process.returncode == 0, process.stderr
    assert "warning: " in process.stderr and "is not the official file" in process.stderr
    results = tmp_path / "results" / name
    assert 0 <= read_json(results / "summary.json")["average_precision"] <= 1 and (results / "precision.png").exists()
    config, recipe = read_json(results / "config.json"), name.split("-")[-1]
    assert set(config["data"]["unverified"]) == set(config["data"]["checksums"]) != set()
    assert config["recipe"] == (recipe if recipe in main.RECIPES and "--generator" not in flags else "2017")
    table = call("visual.py", "results", cwd=tmp_path)
    cells = [config["recipe"], config["replay_mode"], " ".join(config["flags"])]
    assert table.stdout.splitlines()[-1].split(" | ")[1:4] == cells
    if "generative" in name:
        assert draw(tmp_path, *flags.split()).returncode == 0
        assert (tmp_path / "samples" / f"{name}-sample.jpg").exists()


def test_tasks_of_ones_own_mix_with_named_ones(tmp_path, small_mnist):
    """And files of one name are told apart."""
    files = ["a/my t.npz", "b/my t.npz"]
    for file in files:
        (tmp_path / file).parent.mkdir()
        write_task(tmp_path / file)
    process = train(tmp_path, small_mnist, "--tasks", *files, "mnist")
    assert process.returncode == 0, process.stderr
    assert "task 1, my t: " in process.stdout and "task 3, MNIST: " in process.stdout
    config = read_json(tmp_path / "results/my_t+my_t+mnist-generative-replay-r0.3/config.json")
    assert set(files) < set(config["data"]["checksums"])
    assert draw(tmp_path, "--tasks", *files, "mnist").returncode == 0


def test_a_task_of_ones_own_is_not_taken_for_an_experiment(tmp_path):
    """Whatever its file is called: a chain, for instance, would learn nothing of the other tasks."""
    write_task(tmp_path / "mnist-chain.npz")
    options = main.parse(["--train", "--recipe=best", "--tasks", str(tmp_path / "mnist-chain.npz")])
    assert options.name == "own-mnist-chain-generative-replay-rauto-best" and not options.chain
    assert options.solver_iterations == 1000  # not the chain's


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_printed_is_one_line(copy_of_trained):
    command = f"{shlex.join([sys.executable, str(ROOT / 'visual.py')])} results > /dev/full"
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(command, shell=True, cwd=copy_of_trained, capture_output=True, text=True, env=usual)
    assert_one_line_error(process, 1, "No space left on device")


def test_closed_standard_output_is_no_error(tmp_path, small_mnist):
    words = [sys.executable, f"{ROOT}/main.py", "--train", f"--data-dir={small_mnist}", *TINY]
    process = subprocess.run(["bash", "-c", f"{shlex.join(words)} >&-"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and "Traceback" not in process.stderr


@pytest.mark.parametrize("backend", ["module://nowhere.backend", "nowhere"])
def test_a_notebooks_matplotlib_backend_does_no_harm(copy_of_trained, backend):
    """MPLBACKEND may name a backend that is not installed here."""
    arguments = ["results", "--figures", "figures"]
    process = run("visual.py", *arguments, cwd=copy_of_trained, MPLBACKEND=backend)
    assert process.returncode == 0, process.stderr
    assert list((copy_of_trained / "figures").glob("*-precision.png"))


@pytest.mark.parametrize("mode, r", [("none", "1"), ("exact-replay", "auto")])
def test_modes_without_generative_replay_train_no_generator(tmp_path, small_mnist, mode, r):
    flags = [f"--replay-mode={mode}", "--importance-of-new-task=auto"]
    process = train(tmp_path, small_mnist, *flags)
    assert process.returncode == 0, process.stderr
    assert "generator" not in process.stderr
    assert (tmp_path / "results" / f"permutated-mnist-{mode}-r{r}" / "summary.json").exists()
    assert_one_line_error(draw(tmp_path, *flags), 1, "never trained", "--sample-log")


def test_a_mode_of_ones_own_that_draws_from_the_generator_has_it_trained(monkeypatch):
    class Half(dgr.GenerativeReplay):
        pass

    monkeypatch.setitem(dgr.REPLAY_MODES, "half", Half)
    assert main.parse(["--train", "--replay-mode=half"]).trains_generator


def test_sample_log_trains_the_generator_in_every_mode(tmp_path, small_mnist):
    flags = ["--replay-mode=none", "--sample-log", "--sample-log-interval=2"]
    assert train(tmp_path, small_mnist, *flags).returncode == 0
    grids = sorted(path.name for path in (tmp_path / "samples/permutated-mnist-none-r1").iterdir())
    assert grids == [f"task-{task}-iteration-{iteration}.jpg" for task in (1, 2) for iteration in (2, 4)]
    assert draw(tmp_path, *flags).returncode == 0


def test_a_vae_that_diverges_is_one_line(tmp_path, small_mnist):
    """PyTorch's loss refuses NaN by itself, in words that say nothing about --lr."""
    process = train(tmp_path, small_mnist, "--generator=vae", "--lr=1000", "--generator-iterations=40")
    process.stderr = process.stderr.strip().splitlines()[-1]  # after the warnings on data
    assert_one_line_error(process, 1, "diverged at task 1, generator iteration", "--lr", "--dtype=float32")


def test_files_are_locked_as_nfs_asks_for(tmp_path, small_mnist, monkeypatch):
    """NFS locks only what is open for writing."""
    modes = []
    monkeypatch.setattr(fcntl, "flock", lambda file, _how: modes.append(fcntl.fcntl(file, fcntl.F_GETFL)))
    assert train(tmp_path, small_mnist, "--replay-mode=none").returncode == 0
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_WRONLY] * 3  # of results, checkpoints and samples


def test_a_file_system_without_locks_is_a_warning(tmp_path, capsys, monkeypatch):
    def flock(_file, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with utils.locked(tmp_path / "run"):
        assert "can't be locked (No locks available)" in capsys.readouterr().err


def test_second_run_keeps_the_first(copy_of_trained, small_mnist):
    cwd = copy_of_trained
    before = ((cwd / "results" / NAME / "metrics.csv").read_bytes(), (cwd / "checkpoints" / NAME).read_bytes())
    assert draw(cwd).returncode == 0
    process = train(cwd, small_mnist, "--seed=1")
    assert process.returncode == 0
    assert f"results/{NAME} of an earlier run is kept as results/{NAME}~1" in process.stdout
    kept = (cwd / "results" / f"{NAME}~1" / "metrics.csv", cwd / "checkpoints" / f"{NAME}~1")
    assert tuple(path.read_bytes() for path in kept) == before
    assert [path.name for path in (cwd / "samples").glob("[!.]*")] == [f"{NAME}-sample.jpg~1"]
    assert (cwd / "results" / NAME / "metrics.csv").read_bytes() != before[0]
    assert train(cwd, small_mnist).returncode == 0
    assert (cwd / "results" / f"{NAME}~2").is_dir()
    assert [run.directory.name for run in utils.find_runs([cwd / "results"])] == [NAME]


def test_without_visdom_server_there_is_one_warning(tmp_path, small_mnist):
    flags = [f"--data-dir={small_mnist}", *TINY, "--visdom-port=9", "--replay-mode=none"]
    process = run("main.py", "--train", *(flag for flag in flags if flag != "--no-visdom"), cwd=tmp_path)
    assert process.returncode == 0 and process.stderr.count("warning: no live plots") == 1


def test_unreachable_data_is_one_line_with_a_way_out(tmp_path):
    """No network for torchvision (a proxy that does not exist) and no package index for pip."""
    process = run(
        "main.py", "--train", "--no-visdom", cwd=tmp_path,
        http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", DGR_DATA_DIR="",
        PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null",
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr
    words = ["main.py: error: MNIST can't be downloaded", "datasets/mnist/MNIST/raw", "--data-dir"]
    words += [f"{name} (md5 {md5})" for name, md5 in data.DATA_SETS["mnist"].md5.items()]
    for word in words:
        assert word in process.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "results").exists()
    assert list((tmp_path / "datasets/mnist/MNIST/raw").iterdir()) == []


def test_data_directory_that_leads_nowhere_is_one_line(tmp_path):
    (tmp_path / "data").symlink_to("nowhere")
    assert_one_line_error(train(tmp_path, "data"), 1, "data directory", "--data-dir")


# -------------------------------------------------------------------------------------------------------- test


def test_samples_are_drawn_six_a_row(copy_of_trained):
    process = draw(copy_of_trained, start=run)
    assert process.returncode == 0 and process.stdout.splitlines()[0] == f"samples: samples/{NAME}-sample.jpg"
    with Image.open(copy_of_trained / "samples" / f"{NAME}-sample.jpg") as picture:
        assert picture.size == (6 * 34 + 2, 2 * 34 + 2)


def test_samples_repeat_under_a_seed_and_follow_dtype(copy_of_trained):
    def drawn(*flags):
        assert draw(copy_of_trained, *flags).returncode == 0
        return (copy_of_trained / "samples" / f"{NAME}-sample.jpg").read_bytes()

    assert drawn("--seed=4") == drawn("--seed=4") != drawn("--seed=5")
    assert drawn("--dtype=float32") != drawn("--dtype=bfloat16")
    assert_one_line_error(draw(copy_of_trained, "--dtype=tf32"), 1, "--dtype=tf32", "GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_says_which_dtype_it_computed_in(tmp_path, small_mnist, dtype):
    flags = [f"--dtype={dtype}", "--replay-mode=none"]
    assert train(tmp_path, small_mnist, *flags).returncode == 0
    config = read_json(tmp_path / "results/permutated-mnist-none-r1/config.json")
    assert config["dtype"] == dtype and f"--dtype={dtype}" in config["flags"]


def test_the_largest_sample_grid_is_one_that_can_be_kept(copy_of_trained):
    assert draw(copy_of_trained, "--sample-size=11000").returncode == 0
    assert_one_line_error(draw(copy_of_trained, "--sample-size=11001"), 2, "--sample-size", "at most 11000")


@pytest.mark.parametrize("directory, said", [("checkpoints", "checkpoints/"), ("a\nb", "a b/")])
def test_samples_of_no_checkpoint(tmp_path, directory, said):
    """On one line, whatever the directory is called."""
    process = draw(tmp_path, f"--checkpoint-dir={directory}")
    assert_one_line_error(process, 1, f"no scholar at {said}{NAME}", "--train")


def test_checkpoint_of_another_shape_is_refused(copy_of_trained):
    process = draw(copy_of_trained, "--generator-z-size=9", "--solver-channel-size=32")
    assert_one_line_error(process, 1, "--generator-z-size 8, not 9", "--solver-channel-size 16, not 32")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "malicious", "pickle", "other format", "directory"])
def test_damaged_checkpoint_is_refused_and_nothing_in_it_executed(copy_of_trained, damage):
    path = copy_of_trained / "checkpoints" / NAME
    harm(path, damage, copy_of_trained)
    assert_one_line_error(draw(copy_of_trained), 1, f"checkpoints/{NAME}")
    assert not (copy_of_trained / "executed").exists()


# ------------------------------------------------------------------------------------------- measures of a generator


def test_measures_of_each_task_are_in_the_summary_where_a_generator_is_trained(tmp_path, small_mnist):
    flags = ["--measure-generator", "--measured-images=100", "--replay-mode=exact-replay"]
    assert train(tmp_path, small_mnist, *flags, "--sample-log").returncode == 0
    (path,) = tmp_path.glob("results/*/summary.json")
    measured = read_json(path)["generator"]
    assert len(measured) == 2 and len(measured[0]["class_share"]) == 10
    assert all(
        0 <= value <= 1 for name, value in measured[1].items() if name not in ("frechet_distance", "class_share")
    )
    rows = utils.Run.read(path.parent).rows
    assert [row["task"] for row in rows if (row["phase"], row["name"]) == ("test", "fitting_capacity")] == ["1", "2"]
    assert train(tmp_path, small_mnist, *flags).returncode == 0
    assert "generator" not in read_json(path)


def test_samples_come_with_measures_of_the_tasks_learned(copy_of_trained, small_mnist, monkeypatch):
    seen, plain = [], main.train.measure_generator
    watched = lambda scholar, tasks, *rest: seen.append(len(tasks)) or plain(scholar, tasks, *rest)  # noqa: E731
    monkeypatch.setattr(main.train, "measure_generator", watched)
    process = draw(copy_of_trained, f"--data-dir={small_mnist}", "--mnist-permutation-number=3")
    assert process.returncode == 0, process.stderr
    names = [line.split(":")[0] for line in process.stdout.splitlines()]
    assert names[:3] == ["samples", "frechet_distance", "generator_precision"] and names[-1] == "class_share"
    assert seen == [2]  # of three


def test_without_its_data_a_generator_is_drawn_and_not_measured(copy_of_trained, small_mnist):
    """Nothing is downloaded for that."""
    official = [flag for flag in TINY if flag != "--unverified-data"]
    missing = draw(copy_of_trained)
    unofficial = call("main.py", "--test", f"--data-dir={small_mnist}", *official, cwd=copy_of_trained)
    for process, why in ((missing, "none/mnist/MNIST/raw has no train-images"), (unofficial, "not the official file")):
        assert process.returncode == 0 and not process.stderr
        samples, reason = process.stdout.splitlines()
        assert samples.startswith("samples: ") and reason.startswith("no measures of the generator: ") and why in reason
    assert not (copy_of_trained / "none").exists()
