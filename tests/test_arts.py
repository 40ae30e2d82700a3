"""RESULTS.md and its figures are what the kept runs say; the benchmark and the ablations run and have their rows."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call
from PIL import Image

import main
import models
import utils

ARTS = ROOT / "arts"


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """arts/figures.py at work on a copy of arts."""
    spec = importlib.util.spec_from_file_location("figures", ARTS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ARTS", Path(shutil.copytree(ARTS, tmp_path / "arts")))
    return module


@pytest.fixture
def kept(figures, tmp_path):
    return figures.read_kept(tmp_path / "kept")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_mnist):
    """The result directory of a tiny run with kept samples."""
    directory = tmp_path_factory.mktemp("finished")
    flags = ["--train", f"--data-dir={small_mnist}", "--sample-log", "--sample-dir", directory / "samples", *TINY]
    process = call("main.py", *flags, cwd=directory)
    assert process.returncode == 0, process.stderr
    return directory / "results/permutated-mnist-generative-replay-r0.3"


def copy_with(directory: Path, copy: Path, **changes) -> Path:
    """A copy of a result directory with another config."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_a_penalty_does_not_stand_for_the_replay_mode_without_one(figures, kept):
    """Of as many seeds, and beside a flag that changes no solver."""
    settings = utils.group_runs([run for run in kept if not run.config["variation"]])["permutated-mnist"]
    flags = {tuple(setting.first.flags) for setting in settings if setting.first.replay_mode == "none"}
    assert {("--sample-log",), ("--penalty=ewc",)} <= flags
    none = figures.together(settings)["quick"][0]
    assert (none.first.replay_mode, none.first.flags) == ("none", ["--sample-log"])


def test_other_networks_are_shown_only_beside_no_replay(figures, kept):
    experiments = utils.group_runs([run for run in kept if not run.config["variation"]])
    shown = {experiment: figures.together(settings) for experiment, settings in experiments.items()}
    assert "best-heads=task" in shown["svhn-mnist"] and "quick" in shown["split-mnist"]
    blurred = [setting for setting in experiments["split-mnist"] if setting.first.flags == ["--solver-blur=1.5"]]
    assert blurred and "quick-solver-blur=1.5" not in shown["split-mnist"]  # with exact and generative replay alone


def test_runs_measured_on_held_out_images_stand_for_no_others(figures, kept):
    for seed in range(5):
        (like,) = [run for run in kept if run.name == "split-mnist-generative-replay-best-seed0"]
        row = figures.to_row(like) | {"run": f"held-out-{seed}", "seed": str(seed), "flags": "--validation=0.1"}
        kept.append(figures.to_run(row | {"average_precision": "0.5"}, like.rows, Path()))
    settings = utils.group_runs([run for run in kept if not run.config["variation"]])["split-mnist"]
    assert any(setting.first.held_out for setting in settings)
    shown = figures.together(settings)
    assert not any(setting.first.held_out for group in shown.values() for setting in group)


def test_generative_replay_is_compared_with_exact_replay_seed_by_seed(figures, kept):
    """By hand: the runs have other seeds, and one seed in common. A chain is not compared."""
    (like,) = [run for run in kept if run.name == "split-mnist-generative-replay-best-seed0"]

    def setting(mode, experiment="split-mnist", **precisions):
        rows = [
            figures.to_row(like)
            | {"run": f"{mode}-{seed}", "replay_mode": mode, "seed": seed[1:], "average_precision": str(value)}
            | {"experiment": experiment}
            for seed, value in precisions.items()
        ]
        return utils.Setting([figures.to_run(row | {"seconds": "90"}, like.rows, Path()) for row in rows])

    exact, ours = setting("exact-replay", s0=0.99, s1=0.97), setting("generative-replay", s1=0.95, s2=0.9, s3=0.91)
    chain = [setting(mode, "mnist-chain", s0=0.9) for mode in ("exact-replay", "generative-replay")]
    table = figures.beside_exact({"split-mnist": {"best-narrow": [exact, ours]}, "mnist-chain": {"best": chain}})
    _, _, row = [line.strip("| ").split(" | ") for line in table.splitlines()]
    cells = ["split-mnist", "5", "best, narrow", "0.980 ± 0.014", "0, 1", "0.920 ± 0.026", "1, 2, 3"]
    assert row == [*cells, "0.900, 0.950", "2.0", "2 ± 0"]


def test_make_figures_reproduces_results_and_every_picture_it_shows(figures):
    shown = set(re.findall(r"\]\(([\w.-]+\.(?:png|gif))\)", (ARTS / "RESULTS.md").read_text()))
    assert len(shown) > 20 and shown == {path.name for path in [*ARTS.glob("*-*.png"), *ARTS.glob("*.gif")]}
    for name in ["RESULTS.md", *shown]:
        (figures.ARTS / name).unlink()
    figures.run([])
    assert (figures.ARTS / "RESULTS.md").read_text() == (ARTS / "RESULTS.md").read_text()
    for name in shown:  # bytes of a PNG file depend on the library that packs it
        assert pixels(figures.ARTS / name) == pixels(ARTS / name), name


def test_arts_stay_small():
    files = [path for path in ARTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert 0 < len(files) <= 60 and sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_flags_of_kept_runs_are_what_the_program_would_list(kept):
    for run in kept:
        flags = [flag for flag in run.flags if not flag.startswith("variation=")]
        setting = [f"--experiment={run.experiment}", f"--replay-mode={run.replay_mode}", f"--recipe={run.recipe}"]
        options = main.parse(["--train", *setting, f"--seed={run.seed}", *flags])
        assert options.flags == flags, run.name
        for key in ("generator_iterations", "solver_iterations"):
            assert getattr(options, key) == run.options[key], run.name


def test_kept_runs_are_known_by_their_names_and_hold_no_path(kept):
    assert len({run.name for run in kept}) == len({(run.setting, run.seed) for run in kept}) == len(kept)
    assert not re.search(r"[\",]/\w|-dir", (ARTS / "runs.csv").read_text())


def test_a_kept_run_has_its_numbers_and_pictures_and_no_path(figures, finished, capsys):
    figures.write_kept(figures.read_kept(finished.parent / "before")[:1])  # to draw these two alone
    (figures.ARTS / "RESULTS.template.md").write_text("{{other settings}}")
    before = (figures.ARTS / "runs.csv").read_text()
    figures.run(["--keep", str(finished)])
    kept = figures.read_kept(finished.parent / "kept")[-1]
    run = utils.Run.read(finished)
    keys = [*utils.SUMMARY_KEYS, *figures.FURTHER]
    assert kept.summary == {key: run.summary[key] for key in keys if key in run.summary}
    assert kept.measure("backward_transfer") is not None
    assert kept.setting == run.setting and kept.seed == run.seed == 0
    precisions = [row for row in run.rows if row["name"].startswith("precision-")]
    assert precisions and [row for row in kept.rows if row["name"].startswith("precision-")] == precisions
    assert len(kept.rows) < len(run.rows)
    names = [path.name for path in run.kept_samples().values()]
    assert names and [path.name for path in kept.kept_samples().values()] == names
    after = (figures.ARTS / "runs.csv").read_text()
    assert after.startswith(before) and str(finished.parents[1]) not in after
    assert f"| {kept.summary['average_precision']:.3f} |" in (figures.ARTS / "RESULTS.md").read_text()
    assert f"kept: {kept.name}\n" in capsys.readouterr().out


def test_keeping_a_run_again_changes_nothing(figures, finished, tmp_path):
    kept = []
    for _ in range(2):
        figures.keep(kept, utils.Run.read(finished), tmp_path)
        assert len(kept) == 1
        figures.write_kept(kept)
    assert [path.stem for path in kept[0].kept_samples().values()] == ["task-1-iteration-4", "task-2-iteration-4"]


@pytest.mark.parametrize(
    "changes", [{"flags": ["--lr=0.5"]}, {"seed": 1}, {"data": {"checksums": {"mnist/x": "0"}, "unverified": []}}]
)
def test_a_kept_run_is_replaced_by_none_with_other_flags_data_or_seed(figures, finished, tmp_path, changes):
    kept = []
    figures.keep(kept, utils.Run.read(finished), tmp_path)
    first = kept[0]
    figures.keep(kept, utils.Run.read(copy_with(finished, tmp_path / "other", **changes)), tmp_path)
    assert len(kept) == 2 and kept[0] is first and kept[1].name != first.name


def test_unfinished_runs_and_own_tasks_are_not_kept(figures, finished, tmp_path):
    unfinished = copy_with(finished, tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    with pytest.raises(utils.UserError, match="not finished"):
        figures.keep([], utils.Run.read(unfinished), tmp_path)
    options = json.loads((finished / "config.json").read_text())["options"] | {"tasks": ["mnist"]}
    own = copy_with(finished, tmp_path / "own", options=options)
    with pytest.raises(utils.UserError, match="tasks of its own"):
        figures.keep([], utils.Run.read(own), tmp_path)


def test_commands_lose_directories_in_either_spelling(figures):
    command = ["/x/main.py", "--train", "--data-dir", "/a", "--result-dir=/b", "--results", "/c", "--seed", "1"]
    assert figures.without_directories(command) == ["./main.py", "--train", "--seed", "1"]
    assert figures.without_directories(["/x/ablations.py", "baseline"]) == ["benchmarks/ablations.py", "baseline"]


def test_a_setting_that_the_prose_names_wrongly_is_one_line(figures, kept):
    with pytest.raises(utils.UserError, match="no kept run is 'split-mnist best no-such-mode'"):
        figures.numbers("mean: split-mnist best no-such-mode", [utils.Setting([run]) for run in kept])


def test_benchmark_has_its_rows(tmp_path):
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True)
    against = ["--against=HEAD"] if git.returncode == 0 else []
    flags = ["--repetitions=1", "--output=bench.json", "--profile", *against]
    process = call("benchmarks/bench.py", *TINY, *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    names = [f"generator-update{kind}" for kind in ("", "-replay", "-mixed")]
    names += ["solver-update", "solver-update-replay"]
    assert [row["name"] for row in rows] == [*names, "replay-sampling", "batch", "testing"]
    for row in rows:
        assert set(row) > {"name", "device", "ours_ms", "baseline_ms", "ratio", "limit_share", "compute_dtype"}
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"]) and 0 < row["limit_share"] < 1
        assert 1 <= len(row["profile"]) <= 10 and 0.3 < sum(row["profile"].values()) <= 1
        if against:
            assert row["against_commit"] == "HEAD" and row["against_ms"] > 0
            assert row["against_ratio"] == pytest.approx(row["against_ms"] / row["ours_ms"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_way_of_a_layer_is_measured(tmp_path, monkeypatch, dtype):
    """With the rules of models.choose_way back in force afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    layers, choose = importlib.import_module("layers"), models.choose_way
    monkeypatch.setattr(layers, "SOLVER", [(2, 8, 4, 8)])
    monkeypatch.setattr(layers, "GENERATOR", [(2, 4, 8, 4)])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(
        sys, "argv", ["", f"--output={tmp_path / 'layers.json'}", "--repetitions=1", f"--dtype={dtype}"]
    )
    layers.run()
    table = json.loads((tmp_path / "layers.json").read_text())
    assert models.choose_way is choose and table["dtype"] == dtype
    names = {kind: ["PyTorch", "product for the weight's gradient", kind] for kind in ("one product", "nine products")}
    for row in table["layers"]:
        transposed = row["layer"].startswith("TransposedConvolution 8 to 4")
        kind = "nine products" if transposed and dtype == "float32" else "one product"
        assert row["places_per_channel"] == 4 and list(row["milliseconds"]) == names[kind]
        assert all(min(times.values()) > 0 for times in row["milliseconds"].values())


def test_a_commit_that_git_does_not_know_is_one_line(tmp_path):
    process = call("benchmarks/bench.py", *TINY, "--against=no-such-commit", cwd=tmp_path)
    assert_one_line_error(process, 2, "--against", "no-such-commit")


def test_what_is_for_a_gpu_works_in_tiny_form_on_a_cpu(tmp_path, small_mnist, monkeypatch, capsys):
    """A call does what it has time for, the next one the rest, and what is left is small."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.bench, "IMAGES", 500)
    monkeypatch.setattr(gpu.bench, "TEST_IMAGES", 50)
    monkeypatch.setattr(gpu.bench, "peak_rates", lambda *_: (1e9, 1e9))
    monkeypatch.setitem(gpu.STEPS, "nine", ["noise-replay"])
    monkeypatch.chdir(tmp_path)
    data_sets = shutil.make_archive("data", "gztar", small_mnist)
    flags = [f"--data-dir={data_sets}", "--repetitions=1", *TINY]

    def call_for(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, *flags])
        gpu.run()
        return json.loads(Path("results/gpu/gpu.json").read_text())

    monkeypatch.setattr(gpu, "TESTS", ["-c", "print('1 passed, 7 skipped')"])
    assert not call_for("tests", "--minutes=0.5")["tests passed"]  # they need a GPU
    monkeypatch.setattr(gpu, "TESTS", ["-c", "print('1 passed')"])
    Path("results/gpu/gpu.json").unlink()
    found = call_for("tests", "nine", "--minutes=0.5")
    assert found["tests passed"] and found["runs"] == {} and found["speed"] == []
    with monkeypatch.context() as broken:
        broken.setattr(gpu.bench, "measure", mock.Mock(side_effect=RuntimeError("no kernel image")))
        assert [row["error"] for row in call_for("speed")["speed"]] == ["no kernel image"] * 2
    found = call_for("speed", "nine", "--minutes=5")  # what failed is tried again
    replay = [row for row in found["speed"] if row["name"] == "generator-update-replay"]
    assert [(row["dtype"], row["batch_size"]) for row in replay] == [("float32", 8), ("float32", 32)]
    assert all(row["kernels_ms"] > 0 and row["kernels"] > 100 for row in replay)
    assert found["runs"]["nine"]["status"] == 0 and found["runs"]["nine"]["calls"] == 1
    assert "nine: finished after" in capsys.readouterr().out
    assert call_for("speed", "nine") == found  # all done
    left = Path("results/gpu")
    assert {file.name: file.stat().st_size < 1e5 for file in left.iterdir()} == dict.fromkeys(
        ("gpu.json", "results.tgz", "tests.txt"), True
    )
    with tarfile.open("results/gpu/results.tgz") as archive:
        names = archive.getnames()
    assert any(re.fullmatch(r"nine/results/.*/summary.json", name) for name in names)
    shutil.rmtree("results/gpu-runs")
    assert call_for("nine") == found  # on another machine
    del found["runs"]["nine"]["status"]  # begun there, and to be begun again here
    Path("results/gpu/gpu.json").write_text(json.dumps(found))
    monkeypatch.setattr(gpu, "run_until", lambda *_: 0)
    assert call_for("nine")["runs"]["nine"]["calls"] == 1


@pytest.mark.slow
def test_only_tests_that_need_a_gpu_are_among_those_for_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    command = [sys.executable, *importlib.import_module("gpu").TESTS, "--collect-only"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in process.stdout.splitlines() if "::" in line]
    assert len(names) >= 6 and all("gpu" in name.split("::")[1] for name in names), process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind, experiment", [("ablations", "permutated-mnist"), ("levers", "split-mnist")])
def test_every_variation_changes_what_is_learned_and_is_kept(figures, tmp_path, small_mnist, kind, experiment):
    flags = ["--seeds", "0", f"--results={tmp_path / 'results'}", f"--data-dir={small_mnist}", *TINY]
    flags += ["--levers"] if kind == "levers" else []
    process = call("benchmarks/ablations.py", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / f"results/{kind}.json").read_text())
    names = list(content["average_precision"])
    assert len(names) > 10 and all(f"  {name} " in process.stdout for name in names)
    metrics = [path.read_text() for path in tmp_path.glob(f"results/{kind}/*/seed-0/result/*/metrics.csv")]
    assert len(metrics) == len(set(metrics)) == len(names)
    runs = utils.find_runs([tmp_path / "results"])
    assert len(utils.group_runs(runs)[experiment]) == len(names)
    again = call("benchmarks/ablations.py", names[0], names[-1], *flags, cwd=tmp_path)
    assert again.stdout.count("nothing to resume") == 2
    assert json.loads((tmp_path / f"results/{kind}.json").read_text()) == content

    before = len(figures.read_kept(tmp_path / "before"))
    figures.run(["--keep-ablations", str(tmp_path / "results" / kind)])
    kept = figures.read_kept(tmp_path / "after")[before:]
    precisions = {run.config["variation"]: [run.summary["average_precision"]] for run in kept}
    assert precisions == content["average_precision"]
    assert str(tmp_path) not in (figures.ARTS / "runs.csv").read_text()


def test_peers_are_run_after_ours_and_what_is_done_is_kept(tmp_path, small_mnist, monkeypatch, capsys):
    """A stand-in says what van de Ven's program says at its end, and fails on the second experiment."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import peers

    for name, units in (("ours", 400), ("ours, small", 128)):
        command, pattern = peers.ours(name, "split-mnist", 20, 3, tmp_path, [f"--data-dir={small_mnist}"])
        options = main.parse(command[2:])
        run = options.experiment, options.recipe, options.solver_iterations, options.seed
        assert run == ("split-mnist", "vae", 20, 3)
        assert options.solver_channel_size == 16 * options.generator_g_channel_size == units
    assert re.findall(pattern, "permutated-mnist-none-r1: average precision 0.8125, forgetting") == ["0.8125"]
    stand_in = [sys.executable, "-c", "print('average precision 0.7')"]
    monkeypatch.setattr(peers, "ours", lambda *_: (stand_in, pattern))
    (tmp_path / "main.py").write_text(
        "import sys\nif '--experiment=permMNIST' in sys.argv: sys.exit('no such data')\n"
        "print('=> average accuracy over all 5 contexts: 0.9000')\n"
    )
    arguments = [f"--van-de-ven={tmp_path}", f"--data-dir={small_mnist}", f"--output={tmp_path / 'peers.json'}"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    with pytest.raises(utils.UserError, match="van de Ven ended with status 1 and no precision: no such data"):
        peers.main()
    runs = json.loads((tmp_path / "peers.json").read_text())["runs"]
    assert [(run["experiment"], run["program"], run["steps"], run["precision"]) for run in runs] == [
        ("split-mnist", "ours", 2000, 0.7),
        ("split-mnist", "ours, small", 2000, 0.7),
        ("split-mnist", "van de Ven", 2000, 0.9),
        ("permutated-mnist", "ours", 1000, 0.7),
        ("permutated-mnist", "ours, small", 1000, 0.7),
    ]
    times = " | ".join(f"{runs[2]['seconds'] / run['seconds']:.1f}" for run in runs[:2])
    assert f"| split-mnist | van de Ven | 2000 | 0.9000 | {runs[2]['seconds']:.0f} | {times} |" in peers.table(runs)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--van-de-ven=nowhere", *arguments[1:]])
    with pytest.raises(SystemExit, match="2"):
        peers.main()
    assert "argument --van-de-ven: nowhere is not a checkout of it" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["benchmarks/bench.py", "benchmarks/ablations.py"])
def test_what_the_machine_cannot_do_is_one_line(tmp_path, script):
    process = call(script, *TINY, "--no-gpus", "--cuda-graphs", cwd=tmp_path)
    assert_one_line_error(process, 2, "--cuda-graphs", "--no-gpus")


def test_a_batch_of_more_images_than_there_are_is_one_line(tmp_path):
    assert_one_line_error(call("benchmarks/bench.py", "--batch-size=60001", cwd=tmp_path), 2, "--batch-size", "60000")


def test_unknown_variation_is_one_line(tmp_path):
    assert_one_line_error(call("benchmarks/ablations.py", "no gravity", cwd=tmp_path), 2, "'no gravity'", "baseline")


def test_batches_that_the_critic_of_2017_cannot_take_are_one_line(tmp_path):
    process = call("benchmarks/ablations.py", "critic of 2017", "--batch-size=20", cwd=tmp_path)
    assert_one_line_error(process, 2, "--batch-size", "multiples of 8")
    assert not list(tmp_path.iterdir())
