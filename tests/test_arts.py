"""The README's figures and tables are what the kept runs say; the benchmark runs and has its rows."""

import importlib.util
import json
import re
import shutil

import pytest
from conftest import ROOT, TINY, assert_one_line_error, call
from PIL import Image

from utils import UserError


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """arts/figures.py at work on a copy of the repository's README and arts."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "arts/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copytree(ROOT / "arts", tmp_path / "arts")
    shutil.copy(ROOT / "README.md", tmp_path)
    for name, path in {
        "ROOT": "",
        "ARTS": "arts",
        "RUNS": "arts/runs",
        "ABLATIONS": "arts/ablations",
        "README": "README.md",
    }.items():
        monkeypatch.setattr(module, name, tmp_path / path)
    return module


def test_readme_says_what_the_kept_runs_say(figures):
    for picture in [*figures.ARTS.glob("*-*.png"), *figures.ARTS.glob("*.gif")]:
        picture.unlink()
    figures.draw_all()
    assert figures.README.read_text() == (ROOT / "README.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", figures.README.read_text())
    assert len(shown) >= 10 and all((figures.ROOT / path).is_file() for path in shown)


def test_flags_of_the_tables_are_those_of_the_runs(figures):
    for kept in figures.visual.find_runs([figures.RUNS]):
        options = vars(figures.main.parse(["--train", *figures.flags_of(kept)]))
        assert {key: options[key] for key in kept.learned_with} == kept.learned_with, kept.directory


def test_a_run_is_kept_without_paths_and_shown(figures, tmp_path, small_mnist):
    flags = ["--train", "--data-dir", small_mnist, *TINY, "--seed=5"]
    assert call("main.py", *flags, cwd=tmp_path).returncode == 0
    shutil.rmtree(figures.RUNS)  # for this one to be drawn alone
    run = "permutated-mnist-generative-replay-r0.3"
    kept = figures.keep(tmp_path / "results" / run)
    assert kept.name == f"{run}-seed5"
    config = json.loads((kept / "config.json").read_text())
    assert config["options"]["seed"] == 5
    assert not any(str(value).startswith("/") for value in config["options"].values())
    with Image.open(kept / "samples.png") as copy, Image.open(tmp_path / "results" / run / "samples.png") as samples:
        assert copy.mode == "L" and copy.convert("RGB").tobytes() == samples.tobytes()
    assert figures.keep(tmp_path / "results" / run) == kept  # once more, the same run
    figures.draw_all()
    assert "| 5 | .93 on MNIST | .89 to .91 on MNIST | **0." in figures.README.read_text()  # data that are not


def test_a_kept_run_gives_way_to_none_with_other_flags(figures, tmp_path):
    """Names of runs do not hold learning rates and widths."""
    kept = next(figures.RUNS.glob("*-quick-seed0"))
    other = shutil.copytree(kept, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["options"]["lr"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(figures.UserError, match=r"other flags.*--suffix"):
        figures.keep(other)
    assert (kept / "config.json").read_text() != (other / "config.json").read_text()
    assert figures.keep(other, "-large-lr").name == f"{kept.name}-large-lr"


def test_benchmark_has_its_rows(tmp_path):
    process = call("benchmarks/bench.py", *TINY, "--repetitions=1", "--output=bench.json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    names = [f"generator-update{kind}" for kind in ("", "-replay", "-mixed")]
    names += ["solver-update", "solver-update-replay"]
    assert [row["name"] for row in rows] == [*names, "replay-sampling", "batch", "testing"]
    for row in rows:
        assert set(row) > {"name", "device", "ours_ms", "plain_ms", "ratio", "limit_share", "compute_dtype", "commit"}
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"]) and 0 < row["limit_share"] < 1


def test_every_variation_changes_what_is_learned_and_is_kept(figures, tmp_path, small_mnist):
    flags = ["--seeds", "0", f"--results={tmp_path / 'results'}", f"--data-dir={small_mnist}", *TINY]
    process = call("benchmarks/ablations.py", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / "results/ablations.json").read_text())
    names = list(content["average_precision"])
    assert len(names) > 10 and all(f"  {name} " in process.stdout for name in names)
    metrics = [path.read_text() for path in tmp_path.glob("results/ablations/*/seed-0/result/*/metrics.csv")]
    assert len(metrics) == len(set(metrics)) == len(names)
    runs = figures.visual.find_runs([tmp_path / "results"])
    assert len(figures.visual.arms_of(runs)["permutated-mnist"]) == len(names)
    again = call("benchmarks/ablations.py", names[0], names[-1], *flags, cwd=tmp_path)
    assert again.stdout.count("there is nothing to resume") == 2
    assert json.loads((tmp_path / "results/ablations.json").read_text()) == content
    aside = shutil.copytree(runs[0].directory, runs[0].directory.with_name(f"{runs[0].directory.name}~1"))
    other = json.loads((aside / "summary.json").read_text()) | {"average_precision": -1.0}
    (aside / "summary.json").write_text(json.dumps(other))
    shutil.rmtree(figures.ABLATIONS)
    figures.keep_ablations(tmp_path / "results")
    assert str(tmp_path) not in "".join(path.read_text() for path in figures.ABLATIONS.rglob("*.json"))
    table = "\n".join(figures.ablations())
    for name, (value,) in content["average_precision"].items():
        assert f"| {name} | {value:.3f} |" in table
    aside.rename(aside.with_name("of-other-flags"))
    with pytest.raises(UserError, match="different flags"):
        figures.keep_ablations(tmp_path / "results")


@pytest.mark.parametrize("script", ["benchmarks/bench.py", "benchmarks/ablations.py"])
def test_what_the_machine_cannot_do_is_one_line(tmp_path, script):
    process = call(script, *TINY, "--no-gpus", "--cuda-graphs", cwd=tmp_path)
    assert_one_line_error(process, 2, "--cuda-graphs", "--no-gpus")


def test_a_batch_of_more_images_than_there_are_is_one_line(tmp_path):
    assert_one_line_error(call("benchmarks/bench.py", "--batch-size=60001", cwd=tmp_path), 2, "--batch-size", "60000")


def test_unknown_variation_is_one_line(tmp_path):
    assert_one_line_error(call("benchmarks/ablations.py", "no gravity", cwd=tmp_path), 2, "'no gravity'", "as it is")


def test_batches_that_the_critic_of_2017_cannot_take_are_one_line(tmp_path):
    process = call("benchmarks/ablations.py", "critic of 2017", "--batch-size=20", cwd=tmp_path)
    assert_one_line_error(process, 2, "--batch-size", "multiples of 8")
    assert not list(tmp_path.iterdir())
