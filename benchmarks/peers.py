#!/usr/bin/env python3
"""Ours beside the others, on their protocols: precision and seconds of generative replay, one after the other.

    benchmarks/peers.py --van-de-ven=DIR --avalanche=PYTHON      leave one out, and it is not run;
    benchmarks/peers.py ... --recipe=demo                        other flags go to our runs

DIR is a checkout of github.com/GMvandeVen/continual-learning, best at e6d795a; the Python that runs this
script then needs pandas and scikit-learn besides requirements.txt. PYTHON is the interpreter of an environment with
avalanche-lib 0.6.0. MNIST is where main.py keeps it (--data-dir).

Each learns five tasks with its own defaults and takes the same number of steps per task: 2,000 on split MNIST (new
classes, two digits a task) and 1,000 on permuted MNIST, with its solver and with its generator; Avalanche takes whole
epochs, 1,980 to 2,040 and 1,200 steps. Ours is the recipe vae with 400 units per layer, as many as van de Ven's on
split MNIST (1,000 on permuted MNIST), and once more (ours, small) with 128, batches of 32 and a replay pool, in float32
and measured once a task; its images of split MNIST are 28 x 28, as the others' are there. All run on the CPU, with as
many threads. --output gets each result as it comes, and standard output the table.

benchmarks/README.md has the outcome of one run.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import models
import utils

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"split-mnist": 2000, "permutated-mnist": 1000}  # per task
SMALL = ["--generator-g-channel-size=8", "--generator-z-size=32", "--solver-channel-size=128", "--batch-size=32"]
SMALL += ["--replay-pool=5000", "--dtype=float32"]
SMALL += [f"--{what}-log-interval=2000" for what in ("eval", "loss", "image", "sample")]
OURS = {"ours": ["--generator-g-channel-size=25", "--solver-channel-size=400"], "ours, small": SMALL}

# Its example of generative replay on split MNIST, for both experiments: images per batch, network and rate are those.
AVALANCHE = """
import sys, torch
from avalanche.benchmarks.classic import PermutedMNIST, SplitMNIST
from avalanche.models import SimpleMLP
from avalanche.training.supervised import GenerativeReplay
experiment, folder, seed, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(seed)
make, more = PermutedMNIST, {}
if experiment == "split-mnist":
    make, more = SplitMNIST, {"fixed_class_order": list(range(10))}
tasks = make(n_experiences=5, seed=seed, dataset_root=folder, **more)
model = SimpleMLP(num_classes=10)
adam = torch.optim.Adam(model.parameters(), lr=0.001)
settings = dict(train_mb_size=100, eval_mb_size=500, device="cpu", evaluator=None)
scholar = GenerativeReplay(model, adam, torch.nn.CrossEntropyLoss(), train_epochs=1, **settings)
for task in tasks.train_stream:
    epochs = max(1, round(steps * 100 / len(task.dataset)))
    scholar.train_epochs = scholar.generator_strategy.train_epochs = epochs
    scholar.train(task)
model.eval()
right = []
for task in tasks.test_stream:
    x, y = (torch.stack([torch.as_tensor(row[i]) for row in task.dataset]) for i in (0, 1))
    with torch.no_grad():
        right.append((model(x).argmax(1) == y).double().mean().item())
print("precision", sum(right) / len(right))
"""


def ours(name: str, experiment: str, steps: int, seed: int, folder: Path, flags: list[str]) -> tuple[list[str], str]:
    where = [f"--{kind}-dir={folder / name / kind}" for kind in ("result", "checkpoint", "sample")]
    command = [sys.executable, "main.py", "--train", f"--experiment={experiment}", "--recipe=vae", f"--seed={seed}"]
    command += OURS[name]
    if (name, experiment) == ("ours, small", "split-mnist"):
        command.append("--image-size=28")  # as the others have it there
    command += flags
    command += [f"--generator-iterations={steps}", f"--solver-iterations={steps}", "--no-gpus", "--no-visdom", *where]
    return command, r"average precision ([\d.]+)"


def van_de_ven(experiment: str, steps: int, seed: int, folder: Path) -> tuple[list[str], str]:
    which = ["splitMNIST", "--scenario=class"] if experiment == "split-mnist" else ["permMNIST", "--scenario=domain"]
    command = [sys.executable, "main.py", f"--experiment={which[0]}", which[1], "--contexts=5", "--replay=generative"]
    command += [f"--iters={steps}", f"--seed={seed}", "--no-gpus", "--no-save", f"--data-dir={folder}"]
    return [*command, f"--results-dir={folder}"], r"average accuracy over all \d+ contexts: ([\d.]+)"


def run(name: str, command: list[str], pattern: str, directory: Path) -> dict[str, Any]:
    """Run a program to its end: what it took, and the precision that it says at its end."""
    print(f"{name}: {' '.join(command)[:200]}", file=sys.stderr)
    start = time.perf_counter()
    process = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    found = re.findall(pattern, process.stdout)
    if process.returncode or not found:
        last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise utils.UserError(f"{name} ended with status {process.returncode} and no precision: {last}")
    return {"program": name, "precision": float(found[-1]), "seconds": seconds, "command": command}


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["experiment", "program", "steps", "precision", "seconds", *(f"time, {name} = 1" for name in OURS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        facts = [row["experiment"], row["program"], row["steps"], f"{row['precision']:.4f}", f"{row['seconds']:.0f}"]
        own = {r["program"]: r["seconds"] for r in rows if r["experiment"] == row["experiment"]}
        facts += [f"{row['seconds'] / own[name]:.1f}" for name in OURS]
        lines.append(f"| {' | '.join(map(str, facts))} |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = utils.Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--van-de-ven", type=Path, metavar="DIR")
    parser.add_argument("--avalanche", type=Path, metavar="PYTHON")
    parser.add_argument("--data-dir", type=Path, default=data.data_dir())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shorter", type=int, default=1, metavar="N", help="take an Nth of the steps, to try it")
    parser.add_argument("--output", type=Path, default=Path("results/peers.json"))
    options, flags = parser.parse_known_args()
    mnist = (options.data_dir / "mnist").resolve()
    if not (mnist / "MNIST" / "raw").is_dir():
        parser.error(f"argument --data-dir: {options.data_dir} has no MNIST yet: any run of main.py fetches it")
    if options.van_de_ven and not (options.van_de_ven / "main.py").is_file():
        parser.error(f"argument --van-de-ven: {options.van_de_ven} is not a checkout of it (see --help)")
    machine = {"device": models.device_name(torch.device("cpu")), "torch": torch.__version__, "commit": utils.commit()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for experiment, whole in STEPS.items():
        steps = math.ceil(whole / options.shorter)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "MNIST").symlink_to(mnist)
            more = [f"--data-dir={options.data_dir.resolve()}", *flags]
            todo = [(name, *ours(name, experiment, steps, options.seed, folder, more), ROOT) for name in OURS]
            if options.van_de_ven:
                source = options.van_de_ven.resolve()
                todo += [("van de Ven", *van_de_ven(experiment, steps, options.seed, folder), source)]
            if options.avalanche:
                command = [str(options.avalanche.absolute()), "-c", AVALANCHE, experiment, str(mnist)]
                todo += [("Avalanche", [*command, str(options.seed), str(steps)], r"precision ([\d.]+)", ROOT)]
            for program in todo:
                rows.append({"experiment": experiment, "steps": steps} | run(*program))
                options.output.write_text(json.dumps({"machine": machine, "runs": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    utils.run_program(main)
