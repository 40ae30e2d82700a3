"""main.py at tiny sizes: as a user starts it, and its further uses in this process."""

import contextlib
import csv
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, run, small_digits, write_small_mnist
from PIL import Image
from test_data import write_small_svhn, write_task
from test_resume import harm

import data
import dgr
import main
import models
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
    assert process.stdout.strip().endswith(f"scholar: checkpoints/{NAME}, samples: samples/{NAME}-sample.jpg")
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning: ")]
    expected = [f"task {task}/2 {phase}" for task in (1, 2) for phase in ("generator", "solver")]
    assert [line.split(":")[0] for line in lines] == expected and "\r" not in process.stderr


def test_a_run_names_its_device_and_number_format(trained):
    config = read_json(trained[0] / "results" / NAME / "config.json")
    assert trained[1].stdout.splitlines()[0] == f"{NAME} runs on {config['device']}, in {config['dtype']}"
    assert config["device"] == models.device_name(torch.device("cpu"))
    assert config["versions"]["cudnn"] == str(torch.backends.cudnn.version())


def test_deterministic_is_asked_for_before_a_run_and_changes_nothing_on_a_cpu(
    trained, tmp_path, small_mnist, monkeypatch
):
    def load(library, name, plain=data.Library.load):
        asked.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return plain(library, name)

    asked, metrics = [], f"results/{NAME}/metrics.csv"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(data.Library, "load", load)
    try:
        assert train(tmp_path, small_mnist, "--deterministic").returncode == 0
    finally:
        models.set_deterministic(False)
    assert asked == [(True, ":4096:8")] and not torch.are_deterministic_algorithms_enabled()
    assert (tmp_path / metrics).read_bytes() == (trained[0] / metrics).read_bytes()


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
        ("--replay-mode=joint", "permutated-mnist-joint-rauto"),
        ("--replay-mode=none --penalty=ewc", "permutated-mnist-none-r1-ewc"),
        ("--replay-mode=lwf --heads=task", "permutated-mnist-lwf-r0.3-task-heads"),
        ("--generator-conditional --replay-targets=own", "permutated-mnist-generative-replay-r0.3-own-conditional"),
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
    drawn = tmp_path / "samples" / f"{name}-sample.jpg"
    assert drawn.exists() == ("generative" in name or "--sample-log" in flags)
    if "generative" in name:
        drawn.unlink()
        assert draw(tmp_path, *flags.split()).returncode == 0 and drawn.exists()


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


def test_images_of_another_size_are_learned_and_drawn(tmp_path, small_mnist):
    process = train(tmp_path, small_mnist, "--image-size=48")
    assert process.returncode == 0, process.stderr
    name = "permutated-mnist-generative-replay-r0.3-48px"
    config = read_json(tmp_path / "results" / name / "config.json")
    assert config["options"]["image_size"] == 48 and "--image-size=48" in config["flags"]
    assert draw(tmp_path, "--image-size=48").returncode == 0
    with Image.open(tmp_path / f"samples/{name}-sample.jpg") as picture:
        assert picture.size == (6 * 50 + 2, 2 * 50 + 2)
    (tmp_path / "checkpoints" / name).rename(tmp_path / "checkpoints" / name.removesuffix("-48px"))
    assert_one_line_error(draw(tmp_path), 1, "was trained with --image-size 48, not 32")


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
    words = [sys.executable, f"{ROOT}/main.py", "--train", "--replay-mode=none", f"--data-dir={small_mnist}", *TINY]
    process = subprocess.run(["bash", "-c", f"{shlex.join(words)} >&-"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and "Traceback" not in process.stderr


def test_a_notebooks_matplotlib_backend_does_no_harm(copy_of_trained):
    """MPLBACKEND may name a backend that is not installed here."""
    arguments = ["results", "--figures", "figures"]
    process = run("visual.py", *arguments, cwd=copy_of_trained, MPLBACKEND="module://nowhere.backend")
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
    drawn = sorted(path.name for path in (cwd / "samples").glob("[!.]*"))
    assert drawn == [f"{NAME}-sample.jpg", f"{NAME}-sample.jpg~1"]
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


# ----------------------------------------------------------------------------------- going on with a kept scholar

OWN = "own-generative-replay-r0.3-continued"
BOTH = "mnist+own-generative-replay-r0.3-continued"


@pytest.fixture(scope="module")
def mnist_alone(tmp_path_factory, small_mnist):
    """A directory with a scholar of MNIST, and own digits with labels up to 11."""
    cwd = tmp_path_factory.mktemp("alone")
    assert train(cwd, small_mnist, "--tasks", "mnist").returncode == 0
    images, labels = small_digits(48, seed=3)
    arrays = {f"{kind}_{part}": value for part in ("train", "test") for kind, value in (("x", images), ("y", labels))}
    arrays |= {f"y_{part}": np.arange(48) % 12 for part in ("train", "test")}
    np.savez(cwd / "own.npz", **{key: value.astype(np.uint8) for key, value in arrays.items()})
    return cwd


@pytest.fixture
def copy_of_alone(mnist_alone, tmp_path):
    return shutil.copytree(mnist_alone, tmp_path / "copy")


KEPT = "--continue-from=checkpoints/mnist-generative-replay-r0.3"


def test_a_kept_scholar_learns_own_digits_of_more_classes(copy_of_alone, small_mnist):
    cwd = copy_of_alone
    process = train(cwd, small_mnist, KEPT, "--tasks", "own.npz")
    assert process.returncode == 0, process.stderr
    assert "tasks that the scholar has learned: 1; the next one is own\n" in process.stdout
    kept, continued = (utils.load_checkpoint(cwd / "checkpoints" / name) for name in (KEPT.split("/")[1], OWN))
    assert (kept["classes"], continued["classes"]) == (10, 12) and continued["learned"][:1] == kept["learned"]
    assert len(continued["learned"]) == 2
    assert "--continue-from=mnist-generative-replay-r0.3" in read_json(cwd / "results" / OWN / "config.json")["flags"]
    measured = draw(cwd, KEPT, "--tasks", "own.npz", f"--data-dir={small_mnist}", "--on=mnist")
    assert re.search(r"precision on MNIST: 0\.\d+ of 100 test images", measured.stdout), measured.stderr


@pytest.mark.parametrize("targets", ["soft", "own"])
def test_a_kept_scholar_with_a_conditional_generator_learns_more_classes(copy_of_alone, small_mnist, targets):
    cwd = copy_of_alone
    flags = ["--generator=conv-flow", "--generator-conditional", "--replay-pool=20", "--replay-distortion=1"]
    flags += [f"--replay-targets={targets}"]
    assert train(cwd, small_mnist, "--tasks", "mnist", *flags).returncode == 0
    kept = next(cwd.glob("checkpoints/mnist-*conditional"))
    process = train(cwd, small_mnist, f"--continue-from={kept}", "--tasks", "own.npz", *flags)
    assert process.returncode == 0, process.stderr
    continued = next(cwd.glob("checkpoints/own-*conditional-continued"))
    before, after = (utils.load_checkpoint(path)["scholar"]["generator.seen"] for path in (kept, continued))
    assert len(before) == 10 and len(after) == 12 and (after[:10] >= before).all() and after[10:].any()
    drawn = draw(cwd, f"--continue-from={kept}", "--tasks", "own.npz", *flags)
    assert drawn.returncode == 0 and "samples: " in drawn.stdout, drawn.stderr


def test_tasks_that_a_kept_scholar_has_learned_are_measured_and_not_learned_again(copy_of_alone, small_mnist):
    """In every replay mode that needs their data, too; from such a scholar one goes on as well."""
    cwd, tasks = copy_of_alone, ["--tasks", "mnist", "own.npz"]
    assert train(cwd, small_mnist, KEPT, *tasks).returncode == 0
    before, after = read_json(cwd / "results" / BOTH / "summary.json")["precision"]
    assert before == [read_json(next(cwd.glob("results/mnist-*/summary.json")))["average_precision"], None]
    assert None not in after
    with (cwd / "results" / BOTH / "metrics.csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file) if row["phase"] == "solver"} == {"2"}
    process = train(cwd, small_mnist, KEPT, *tasks, "--replay-mode=exact-replay")
    assert process.returncode == 0, process.stderr
    process = train(cwd, small_mnist, f"--continue-from=checkpoints/{BOTH}", *tasks, "own.npz")
    assert process.returncode == 0 and "has learned: 2" in process.stdout, process.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "mnist"], ["has learned all of these tasks"]),
        (["--tasks", "own.npz", "--replay-mode=exact-replay"], ["exact-replay needs the old tasks too"]),
        (["--tasks", "svhn"], ["has learned grey images, and these have colour"]),
        (["--tasks", "own.npz", "--solver-channel-size=32"], ["--solver-channel-size 16, not 32"]),
        (["--tasks", "own.npz", "--continue-from=gone"], ["no scholar at gone"]),
        (["--tasks", "own.npz", "--continue-from=loop"], ["no scholar at loop"]),
        (["--experiment=mnist-chain"], ["--continue-from", "--experiment=mnist-chain"]),
    ],
)
def test_what_a_kept_scholar_cannot_go_on_with_is_one_line(copy_of_alone, small_mnist, flags, words):
    write_small_svhn(shutil.copytree(small_mnist, copy_of_alone / "data"))
    (copy_of_alone / "loop").symlink_to("loop")
    process = train(copy_of_alone, "data", KEPT, *flags)
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 2 if "chain" in flags[0] else 1, *words)
    assert not list(copy_of_alone.glob("results/*continued"))


def test_a_run_would_not_replace_the_scholar_it_continues_from(copy_of_alone, small_mnist):
    (copy_of_alone / KEPT.split("=")[1]).rename(copy_of_alone / "checkpoints" / OWN)
    process = train(copy_of_alone, small_mnist, f"--continue-from=checkpoints/{OWN}", "--tasks", "own.npz")
    assert_one_line_error(process, 2, "--continue-from", "give it another name")


def test_a_chain_of_scholars_is_not_continued(tmp_path, small_mnist):
    """Each of its scholars has learned the same task, so the number of tasks would be wrong."""
    assert train(tmp_path, small_mnist, "--experiment=mnist-chain", "--quick").returncode == 0
    (chain,) = tmp_path.glob("checkpoints/mnist-chain*")
    process = train(tmp_path, small_mnist, "--quick", f"--continue-from={chain}", "--tasks", "mnist")
    assert process.returncode == 1 and "a scholar of mnist-chain can't be continued" in process.stderr


def test_a_finished_run_is_that_of_its_scholar_alone(copy_of_alone, small_mnist):
    cwd, flags = copy_of_alone, [KEPT, "--tasks", "own.npz", "--resume"]
    assert train(cwd, small_mnist, *flags).returncode == 0
    assert "nothing to resume" in train(cwd, small_mnist, *flags).stdout
    (cwd / "other").mkdir()
    where = [f"--{kind}-dir=other/{kind}" for kind in ("result", "checkpoint", "sample")]
    assert train(cwd, small_mnist, "--tasks", "mnist", "--seed=1", *where).returncode == 0
    (kept,) = cwd.glob("other/checkpoint/mnist*")
    process = train(cwd, small_mnist, f"--continue-from={kept}", *flags[1:])
    assert_one_line_error(process, 1, "another scholar in --continue-from", "without --resume")


def test_each_tasks_scholar_is_kept_on_request(tmp_path, small_mnist):
    assert train(tmp_path, small_mnist, "--keep-scholars").returncode == 0
    first, last = (tmp_path / f"checkpoints/after-task-{task}" / NAME for task in (1, 2))
    scholars = [utils.load_checkpoint(path) for path in (first, last, tmp_path / "checkpoints" / NAME)]
    assert [len(scholar["learned"]) for scholar in scholars] == [1, 2, 2]
    weights = [scholar["scholar"]["solver.net.0.weight"] for scholar in scholars]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    drawn = tmp_path / f"samples/{NAME}-sample.jpg"
    before = drawn.read_bytes()
    assert draw(tmp_path, f"--checkpoint-dir={first.parent}").returncode == 0
    assert draw(tmp_path, f"--checkpoint-dir={first.parent}", "--on=mnist", f"--data-dir={small_mnist}").returncode == 0
    files = {f"{NAME}-{rest}" for rest in ("sample.jpg", "after-task-1-sample.jpg", "after-task-1-on-mnist.csv")}
    assert {path.name for path in drawn.parent.glob("perm*")} == files and drawn.read_bytes() == before
    assert train(tmp_path, small_mnist).returncode == 0  # which renames them
    assert train(tmp_path, small_mnist).returncode == 0
    renamed = {f"{name}~1" for name in files} | {drawn.name, f"{drawn.name}~2"}
    assert {path.name for path in drawn.parent.glob("perm*")} == renamed
    assert {path.name for path in tmp_path.glob("checkpoints/after-*/*")} == {f"{NAME}~1"}


def test_a_run_can_be_measured_on_held_out_images_instead_of_test_images(tmp_path, small_mnist):
    flags, name = ["--replay-mode=none", "--sample-log"], "permutated-mnist-none-r1-validation"
    process = train(tmp_path, small_mnist, *flags, "--validation=0.2")
    assert process.returncode == 0, process.stderr
    assert "precision on each task's held-out training images after the last task" in process.stdout
    run = utils.Run.read(tmp_path / "results" / name)
    assert "--validation=0.2" in run.flags and run.data_note.endswith(
        "held-out training images in place of test images"
    )
    share = 40  # of 200 training images
    assert {round(value * share, 6) % 1 for value in run.summary["precision"][1]} == {0}
    again = train(tmp_path, small_mnist, *flags, "--validation=0.1", "--resume")
    assert_one_line_error(again, 1, "--validation 0.2, not 0.1")
    on_test_images = draw(tmp_path, *flags, "--validation=0.2", "--on=mnist", f"--data-dir={small_mnist}")
    assert "of 100 test images" in on_test_images.stdout
    kept = tmp_path / "checkpoints" / name
    own = write_task(tmp_path / "own.npz", classes=12)
    process = train(tmp_path, small_mnist, *flags, f"--continue-from={kept}", "--tasks", own)
    assert process.returncode == 1
    assert "error: --continue-from: its scholar was trained with --validation=0.2" in process.stderr.splitlines()[-1]


def test_answers_of_a_scholar_are_a_csv_file_with_its_precision(copy_of_trained, small_mnist):
    where = ["--on=mnist", f"--data-dir={small_mnist}"]
    process = draw(copy_of_trained, *where)
    assert process.returncode == 0, process.stderr
    with (copy_of_trained / f"samples/{NAME}-on-mnist.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(n) for n in range(100)] and {row["label"] for row in rows} > {"0"}
    right = sum(row["label"] == row["answer"] for row in rows) / 100
    summary = read_json(copy_of_trained / "results" / NAME / "summary.json")
    assert right == summary["precision"][-1][0]  # the first task is MNIST as it is
    assert f"precision on MNIST: {right:.4f} of 100 test images" in process.stdout
    assert_one_line_error(train(copy_of_trained, small_mnist, "--on=mnist"), 2, "--on", "--test")


# ------------------------------------------------------------------------------ networks from outside, and options


def test_a_generator_and_a_solver_come_from_modules_where_the_run_is_started(tmp_path, small_mnist):
    (tmp_path / "my_networks.py").write_text("import models\nclass G(models.VAE): pass\nclass S(models.MLP): pass\n")
    flags = ["--generator=my_networks:G", "--solver=my_networks:S"]
    process = train(tmp_path, small_mnist, *flags, start=run)
    assert process.returncode == 0, process.stderr
    process = draw(tmp_path, *flags, start=run)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / f"samples/{NAME}-my_networks.G-my_networks.S-sample.jpg").exists()


def test_a_generator_outside_of_0_to_1_is_refused_before_it_learns(tmp_path, small_mnist, monkeypatch):
    class Tanh(models.VAE):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.net[-2] = torch.nn.Tanh()

    monkeypatch.setitem(models.GENERATORS, "tanh", Tanh)
    process = train(tmp_path, small_mnist, "--generator=tanh")
    assert process.returncode == 1 and "iterations in" not in process.stderr
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 1, "--generator: Tanh draws values from -", "[0, 1]", "models.Sigmoid()")


def test_own_targets_of_a_generator_that_is_told_no_classes_are_refused(tmp_path, small_mnist, monkeypatch):
    class Unconditional(models.VAE):
        def __init__(self, channels, options):
            super().__init__(channels, replace(options, generator_classes=0))

    monkeypatch.setitem(models.GENERATORS, "unconditional", Unconditional)
    flags = ["--generator=unconditional", "--generator-conditional", "--replay-targets=own"]
    process = train(tmp_path, small_mnist, *flags)
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 1, "--replay-targets: own needs a conditional generator", "unconditional is not")


def test_options_without_effect_are_named(tmp_path, small_mnist):
    write_task(tmp_path / "own.npz")
    flags = ["--replay-mode=none", "--generator=vae", "--solver=mlp", "--solver-depth=3", "--tasks", "own.npz"]
    process = train(tmp_path, small_mnist, *flags)
    said = re.findall("^warning: (.*)", process.stderr, re.MULTILINE)
    assert set(said) == {
        "--generator-c-channel-size has no effect with --generator=vae",
        "--generator-c-updates-per-g-update has no effect with --generator=vae",
        "--solver-depth has no effect with --solver=mlp",
        "--mnist-permutation-number has no effect with --tasks",
    }


# -------------------------------------------------------------------------------------------------------- test


def test_samples_are_drawn_six_a_row_and_as_in_the_end_of_training(copy_of_trained):
    drawn = copy_of_trained / "samples" / f"{NAME}-sample.jpg"
    at_the_end = drawn.read_bytes()
    drawn.unlink()
    process = draw(copy_of_trained, start=run)
    assert drawn.read_bytes() == at_the_end
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
    assert draw(copy_of_trained, "--sample-size=11556").returncode == 0
    assert_one_line_error(draw(copy_of_trained, "--sample-size=11557"), 2, "--sample-size", "at most 11556")


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


def test_a_missing_scholar_of_a_finished_run_is_named_with_the_way_out(copy_of_trained, small_mnist):
    scholar = copy_of_trained / "checkpoints" / NAME
    kept = scholar.rename(copy_of_trained / "kept")
    for process in (train(copy_of_trained, small_mnist, "--resume"), draw(copy_of_trained)):
        process.stderr = process.stderr.strip().splitlines()[-1]
        assert_one_line_error(process, 1, f"no scholar at checkpoints/{NAME}", "put it back", "without --resume")
    left = scholar.with_name(f"{NAME}.unfinished.previous")  # as by a run that is stopped while it tidies up
    left.touch()
    assert_one_line_error(draw(copy_of_trained), 1, f"no scholar at checkpoints/{NAME}", "put it back")
    left.unlink()
    kept.rename(scholar)
    (copy_of_trained / f"results/{NAME}/precision.png").unlink()
    assert "nothing to resume" in train(copy_of_trained, small_mnist, "--resume").stdout
    assert (copy_of_trained / f"results/{NAME}/precision.png").exists()
    process = train(copy_of_trained, small_mnist, "--resume", "--keep-scholars")
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 1, f"no scholar at checkpoints/after-task-2/{NAME}")


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


def test_measures_of_a_generator_outlive_a_resume_without_them(tmp_path, small_mnist, monkeypatch):
    flags = ["--train", f"--data-dir={small_mnist}", *TINY, "--measured-images=100"]
    monkeypatch.chdir(tmp_path)
    measured, plain = [], main.train.measure_generator
    watched = lambda *these: measured.append(True) or plain(*these)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(utils.UserError, match="stopped at task 2"):
        patch.setattr(main.train, "measure_generator", watched)
        patch.setattr(utils, "stop_requests", lambda: contextlib.nullcontext(lambda: len(measured)))
        main.main([*flags, "--measure-generator"])
    main.main([*flags, "--resume"])
    first, second = read_json(next(tmp_path.glob("results/*/summary.json")))["generator"]
    assert first["fitting_capacity"] >= 0 and second is None


def test_samples_come_with_measures_of_the_tasks_learned(copy_of_trained, small_mnist, monkeypatch):
    seen, plain = [], main.train.measure_generator
    watched = lambda scholar, tasks, *rest: seen.append(len(tasks)) or plain(scholar, tasks, *rest)  # noqa: E731
    monkeypatch.setattr(main.train, "measure_generator", watched)
    process = draw(copy_of_trained, f"--data-dir={small_mnist}", "--mnist-permutation-number=3")
    assert process.returncode == 0, process.stderr
    names = [line.split(":")[0] for line in process.stdout.splitlines()]
    assert names[:3] == ["samples", "frechet_distance", "generator_precision"] and names[-1] == "class_share"
    assert seen == [2]  # of three


@pytest.mark.parametrize("flag", ["--mnist-permutation-number=1", "--mnist-permutation-seed=7"])
def test_a_generator_is_not_measured_beside_fewer_or_other_tasks(copy_of_trained, small_mnist, flag):
    process = draw(copy_of_trained, f"--data-dir={small_mnist}", flag)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith(
        "no measures of the generator: the scholar has learned from other"
    )


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


def test_denormal_numbers_are_zero(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: told.append(on))
    assert call("main.py", "--help", cwd=tmp_path).returncode == 0 and told == [True, False]  # False: conftest


@pytest.mark.slow
def test_denormal_numbers_are_zero_on_all_threads():
    """Or float32 training slows down several times: Adam's weight decay alone moves weights that see only black."""
    script = """if True:
        import contextlib, runpy, sys, torch
        sys.argv[1:] = ["--help"]
        with contextlib.suppress(SystemExit):
            runpy.run_path("main.py", run_name="__main__")
        torch.set_num_threads(2)
        print("\\n", float((torch.full((10**6,), 2.0**-100) * 2.0**-40).max()))
    """
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout.splitlines()[-1]) == 0 or not torch.set_flush_denormal(False)
