#!/usr/bin/env python3
"""What only a GPU can tell: do its tests pass, how fast is each way to compute, what do whole runs learn in what time.

    make gpu                               everything; make gpu GPU='--data-dir=data.tgz' gives it flags
    benchmarks/gpu.py speed --minutes=5    one step; flags of main.py go to every measurement and run

This script has not run on a GPU yet, only in tiny form on a CPU. A call does what fits in --minutes, and the next one
goes on from there; three do if the marks below are met. Where nothing can be downloaded, carry the data as an archive,
made by `tar -czf data.tgz -C datasets .`, which --data-dir takes. Steps, in this order:

    tests               those that need a GPU; the later steps use CUDA graphs only if they pass
    speed               bench.py in each number format, eager and with graphs, at two batch sizes, with and without
                        cuDNN's autotuning, and beside it the time of a generator update's kernels alone
    permutated-mnist    without replay, with exact and with generative replay, at the default width, five seeds
    nine                the nine runs of run_full_experiments

Marks: with graphs, a generator update with replay is at least 10 times as fast as the baseline's and takes at most
twice as long as its kernels; the nine runs take at most 20 minutes. In --output are gpu.json, tests.txt and, small
enough to carry, results.tgz with the results and samples of the runs. Only where their scholars are, in --runs, can
unfinished runs go on; elsewhere, their step begins again.
"""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench

import data
import dgr
import main
import models
import utils

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("float32", "tf32", "bfloat16")
STEPS = {"tests": [], "speed": [], "permutated-mnist": ["permutated-mnist", "--seeds=0-4"], "nine": []}
TESTS = ["-m", "pytest", "-q", "-rs", "-k", "gpu", "tests/test_gan.py", "tests/test_resume.py"]


class Session:
    """One call: what it and those before it have found, and the time that is left."""

    def __init__(self, output: Path, minutes: float, flags: list[str]):
        self.output, self.flags, self.end = output, flags, time.monotonic() + 60 * minutes
        self.options = main.parse(["--train", *flags])
        models.set_deterministic(self.options.deterministic)
        self.device = models.choose_device(gpus=not self.options.no_gpus)
        machine = {"device": models.device_name(self.device), "torch": torch.__version__, "commit": utils.commit()}
        machine |= {"cudnn": torch.backends.cudnn.version(), "flags": flags}
        file = output / "gpu.json"
        self.found = json.loads(file.read_text()) if file.exists() else {"speed": [], "runs": {}}
        if self.found.setdefault("machine", machine) != machine:
            raise utils.UserError(f"{file} has results of {self.found['machine']}: use another --output")

    @property
    def left(self) -> float:
        """Seconds, less some to stop in."""
        return self.end - time.monotonic() - 20

    @property
    def graphs(self) -> list[str]:
        return ["--cuda-graphs"] if self.found.get("tests passed") and self.device.type == "cuda" else []

    def save(self) -> None:
        utils.write_json(self.output / "gpu.json", self.found)

    def tests(self) -> None:
        if "tests passed" not in self.found:
            with (self.output / "tests.txt").open("w") as log:
                status = run_until(self.left, [sys.executable, *TESTS], cwd=ROOT, stdout=log, stderr=log)
            if status is not None:  # where there is no GPU, they are skipped
                skipped = " skipped" in Path(log.name).read_text(errors="replace")
                self.found["tests passed"] = status == 0 and not skipped
            print(f"tests passed: {self.found.get('tests passed', 'not finished')}, see {log.name}")

    def speed(self, repetitions: int) -> None:
        on_gpu = self.device.type == "cuda"
        batches = self.options.batch_size, 4 * self.options.batch_size
        # Graphs last: if one can't be recorded, the GPU may be of no use to this process afterwards.
        every = itertools.product((False, True), batches, (False, True), FORMATS)
        ways = [dict(zip(("cuda_graphs", "batch_size", "autotune", "dtype"), way, strict=True)) for way in every]
        ways = [way for way in ways if on_gpu or (not way["autotune"] and way["dtype"] == "float32")]
        for way in sorted(ways, key=lambda way: bool(self.rows(way))):  # those that failed before come last
            if any(row["name"] != "failed" for row in self.rows(way)) or (way["cuda_graphs"] and not self.graphs):
                continue
            if self.left < 30:
                break
            print(f"\n{describe(way)}")
            self.keep(way, [{"name": "failed", "error": "the process ended"}])
            flags = [f"--dtype={way['dtype']}", f"--batch-size={way['batch_size']}"]
            torch.backends.cudnn.benchmark = way["autotune"]
            gc.collect()  # networks and their graphs refer to each other
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                options = main.parse(["--train", *self.flags, *flags, *self.graphs[: way["cuda_graphs"]]])
                rows = bench.measure(options, repetitions)
                self.keep(way, rows)
                kernels = kernels_of(options, self.device)
                self.keep(way, [row | (kernels if row["name"] == UPDATE else {}) for row in rows])
            except Exception as error:  # a finding too, and no reason to leave out the other ways
                kept = [row for row in self.rows(way) if row["name"] != "failed"]
                self.keep(way, [*kept, {"name": "failed", "error": utils.reason(error)[:500]}])
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()  # for the runs to come

    def rows(self, way: dict[str, Any]) -> list[dict[str, Any]]:
        """What was measured one way."""
        return [row for row in self.found["speed"] if way.items() <= row.items()]

    def keep(self, way: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        others = [row for row in self.found["speed"] if not way.items() <= row.items()]
        self.found["speed"] = others + [way | row for row in rows]
        self.save()

    def runs(self, step: str, where: Path, data_dir: Path, jobs: int) -> None:
        """Continue the runs of a step for as long as there is time. where: the directory of its files."""
        state = self.found["runs"].get(step, {})
        if state.get("status") == 0 or self.left < 30:
            return
        if not (state and where.exists()):
            state = {"jobs": jobs, "flags": self.graphs, "seconds": 0.0, "calls": 0}
        self.found["runs"][step] = state
        places = [f"--{kind}-dir={where / f'{kind}s'}" for kind in ("result", "checkpoint", "sample")]
        command = [sys.executable, str(ROOT / "run_full_experiments"), *STEPS[step], f"--jobs={state['jobs']}"]
        command += [*self.flags, *state["flags"], *places, f"--data-dir={data_dir}", "--no-visdom"]
        start = time.monotonic()
        status = run_until(self.left, command)
        state |= {"status": status, "calls": state["calls"] + 1, "seconds": state["seconds"] + time.monotonic() - start}
        self.save()
        with tarfile.open(self.output / "results.tgz", "w:gz") as archive:
            for directory in [*where.parent.glob("*/results"), *where.parent.glob("*/samples")]:
                archive.add(directory, directory.relative_to(where.parent))

    def report(self) -> None:
        """Print what the marks are about."""
        for row in self.found["speed"]:
            if row["name"] in ("failed", UPDATE):
                times = "{ratio:.1f} x the baseline, {ours_ms:.2f} ms".format_map
                kernels = f", kernels {row['kernels_ms']:.2f} ms" if "kernels_ms" in row else ""
                print(f"{describe(row)}: {row['error'] if row['name'] == 'failed' else times(row) + kernels}")
        for step, state in self.found["runs"].items():
            status = {None: "not finished", 0: "finished"}.get(state.get("status"), "some runs failed")
            print(f"{step}: {status} after {state['seconds']:.0f} s, {state['jobs']} at a time, {state['flags']}")


def describe(way: dict[str, Any]) -> str:
    kind = ("graphs" if way["cuda_graphs"] else "eager") + (", autotuned" if way["autotune"] else "")
    return f"{way['dtype']}, batch {way['batch_size']}, {kind}"


UPDATE = "generator-update-replay"  # bench.py's name for the update whose kernels are timed


def run_until(seconds: float, command: list[str], **how: Any) -> int | None:
    """Run a command; returns its exit status, or None if the time was over before: it then gets SIGTERM."""
    with subprocess.Popen(command, **how) as process:
        try:
            return process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return None


def kernels_of(options: main.Options, device: torch.device, times: int = 5) -> dict[str, float]:
    """Number and milliseconds of the kernels of a generator update with replay (on a CPU: of its operations)."""
    on_gpu = device.type == "cuda"
    dtype = models.choose_dtype(options.dtype, device, cuda_graphs=options.cuda_graphs)
    scholar = models.make_scholar(1, bench.CLASSES, options, compute_dtype=dtype).to(device)
    size = options.image_size
    images = torch.randint(256, (2000, 1, size, size), dtype=torch.uint8, device=device)
    split = data.Split(images, torch.randint(bench.CLASSES, (2000,), device=device))
    replay = dgr.GenerativeReplay(scholar, [split], dgr.Targets("hard"))
    replay.block = models.images_at_once(device)
    how = {"r": bench.R, "iterations": sys.maxsize, "batch_size": options.batch_size}
    update = partial(next, dgr.learn_generator(scholar.generator, split, replay, **how))
    for _ in range(models.Captured.warm_up + 2):
        update()
    bench.Clock(device).wait()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            update()
        bench.Clock(device).wait()
    # Without what belongs to the CPU, such as launches.
    events = [event for event in profiler.key_averages() if not on_gpu or event.device_type != DeviceType.CPU]
    microseconds = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events)
    return {"kernels_ms": microseconds / 1000 / times, "kernels": sum(event.count for event in events) / times}


def run() -> None:
    steps, about = ", ".join(STEPS), __doc__.split("\n\n")[0]
    usage = f"%(prog)s [STEP ...] [options] [flags of main.py]\n\nSTEP: {steps} (default: all)"
    parser = utils.Parser(description=about, usage=usage, allow_abbrev=False)
    number, whole, shown = utils.number(0, above=True), utils.number(1, kind=int), "(default: %(default)s)"
    parser.add_argument("--minutes", type=number, default=9.0, metavar="X", help=f"of this call {shown}")
    parser.add_argument("--jobs", type=whole, default=5, metavar="N", help=f"runs at a time {shown}")
    parser.add_argument("--repetitions", type=whole, default=3, metavar="N", help=f"of each measurement {shown}")
    for name, default, help in (
        ("--output", Path("results/gpu"), "what was found"),
        ("--runs", Path("results/gpu-runs"), "files of the runs, with which the next call continues them"),
        ("--data-dir", data.data_dir(), "data sets, or an archive of them"),
    ):
        parser.add_argument(name, type=Path, default=default, metavar="DIR", help=f"{help} {shown}")
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    here, flags = parser.parse_known_args(sys.argv[1 + len(words) :])
    if unknown := [word for word in words if word not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}: choose from {steps}")
    here.output.mkdir(parents=True, exist_ok=True)
    session = Session(here.output, here.minutes, flags)
    print(session.found["machine"], flush=True)
    where, data_dir = here.runs.absolute(), here.data_dir.absolute()
    if data_dir.is_file():
        shutil.unpack_archive(data_dir, where / "datasets", filter="data")
        data_dir = where / "datasets"
    for step in words or STEPS:
        if step == "tests":
            session.tests()
        elif step == "speed":
            session.speed(here.repetitions)
        else:
            session.runs(step, where / step, data_dir, here.jobs)
        session.save()
    session.report()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # the profiler's part that does not go well with graphs
    utils.run_program(run)
