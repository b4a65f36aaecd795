"""Where the time goes beside the arithmetic: start, data, evaluation and report, stage by stage.

    python benchmarks/costs.py             # minutes of one core
    python benchmarks/costs.py --table     # the newest rows in Markdown, for docs/costs.md

Each part runs in a fresh process on one thread. Its stages follow one another, timed with the
process's CPU clock. Rows are appended to results/costs.csv, or to --out.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

from measures import photographs
from process import run_apart
from rows import ORIGIN, append_rows, markdown_table, origin, read_rows, results_parser

FILE = "costs.csv"
COLUMNS = (*ORIGIN, "run", "part", "stage", "cpu_seconds", "wall_seconds")
DIGITS = "sample:mnist5k?split=train"
IMAGES = 64  # per kind, whose mean counts
MODULES = (  # in the order in which a recipe needs them
    "torch", "torchvision", "timm", "vim_ssl.recipes.mim_pretrain", "accelerate", "numba",
    "scipy.optimize",
)  # fmt: skip
Stage = tuple[str, float, float]


class Clock:
    """Collects the CPU and wall seconds of stages that follow one another."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._restart()

    def _restart(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, stage: str, of: int = 1) -> None:
        """End a stage, of which one of ``of`` equal parts counts; the next one begins."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self.stages.append((stage, cpu / of, wall / of))
        self._restart()

    def add(self, stage: str, call: Callable[[], Any], of: int = 1) -> Any:
        self._restart()
        result = call()
        self.stop(stage, of)
        return result


def demo_run() -> tuple[Any, Any, Any, Any]:
    """The demo's config with data, encoder and objective."""
    from vim_ssl.data import open_data
    from vim_ssl.recipes import mim_pretrain

    config = replace(mim_pretrain.PRESETS["demo"](), data=DIGITS, threads=1)
    data = open_data(DIGITS)
    encoder = mim_pretrain.build_model(config, data)
    return config, data, encoder, mim_pretrain.build_objective(config, encoder)


def imports() -> list[Stage]:
    clock = Clock()
    for name in MODULES:
        clock.add(f"import {name}", lambda name=name: __import__(name))
    return clock.stages


def launcher() -> list[Stage]:
    """Accelerate's launcher with one process and a script that does nothing."""
    with tempfile.NamedTemporaryFile(suffix=".py") as script:
        command = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
            "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", script.name,
        ]  # fmt: skip
        before, wall = os.times(), time.perf_counter()
        subprocess.run(command, check=True)
        after, wall = os.times(), time.perf_counter() - wall
    cpu = sum(after[2:4]) - sum(before[2:4])
    return [("accelerate launch, an empty script", cpu, wall)]


def first_step(cache: str) -> list[Stage]:
    """The stages of the demo up to its first step; numba's cache is in the folder ``cache``."""
    os.environ["NUMBA_CACHE_DIR"] = cache
    clock = Clock()
    from vim_ssl.data.loading.indexed import collate
    from vim_ssl.recipes import mim_pretrain
    from vim_ssl.training.optim import build_optimizer

    clock.stop("imports")
    config, data, encoder, objective = clock.add("data and model", demo_run)
    _, samples = mim_pretrain.build_data(config, encoder, data)
    accelerator = clock.add("accelerator", lambda: mim_pretrain.make_accelerator(config))
    optimizer = build_optimizer(
        objective, opt=config.optimizer, lr=1e-3, weight_decay=config.weight_decay,
        betas=config.betas, eps=config.eps, layer_decay=config.layer_decay,
    )  # fmt: skip
    objective, optimizer = accelerator.prepare(objective, optimizer)
    clock.stop("optimiser")

    def step(batch: Any) -> None:
        out = objective.train()(batch)
        accelerator.backward(out.loss_sum / out.weight)
        optimizer.step()
        optimizer.zero_grad()

    batch = clock.add("first batch", lambda: collate([samples[(0, i)] for i in range(64)]))
    clock.add("first step, with its kernels", lambda: step(batch))
    clock.add("a later step", lambda: step(batch))
    return clock.stages


def evaluation() -> list[Stage]:
    """The evaluation in the demo's training and its parts, then the probe of 2,000 embeddings."""
    import torch

    from vim_ssl import create_transform
    from vim_ssl.downstream import linear_probe
    from vim_ssl.evaluation.extract import Features, encode_batches
    from vim_ssl.evaluation.knn import choose_neighbours, knn_predict
    from vim_ssl.evaluation.linear_heads import fit_logistic
    from vim_ssl.evaluation.online import ONLINE_TOL, effective_rank, online_probe
    from vim_ssl.evaluation.readout import all_readouts, choose_readout, readout_columns
    from vim_ssl.metrics.titles import ONLINE_C, ONLINE_K

    _, data, encoder, _ = demo_run()
    encoder.eval()
    probe = online_probe(encoder, data, "cpu", 0)
    probe()  # compiles, and imports what it needs
    clock, transform, count = Clock(), create_transform(encoder), 2250
    clock.add("in training: all of it", probe)
    rows = clock.add(
        "in training: 2,250 digits read and transformed",
        lambda: [(transform(data[i]["image"]),) for i in range(count)],
    )
    batches = [rows[i : i + 128] for i in range(0, count, 128)]
    x, *_ = clock.add(
        "in training: their features",
        lambda: encode_batches(lambda x: all_readouts(encoder, x), batches, "cpu"),
    )
    y, patches = torch.tensor(data.labels[:count]), x[:, readout_columns(encoder, "avg")]
    train, test = slice(500, None), slice(500)
    clock.add("in training: kNN", lambda: knn_predict(x[train], y[train], x[test], k=ONLINE_K))
    clock.add(
        "in training: logistic regression",
        lambda: fit_logistic(patches[train], y[train], ONLINE_C, ONLINE_TOL),
    )
    clock.add("in training: effective rank", lambda: effective_rank(patches[train]))

    readouts = {name: readout_columns(encoder, name) for name in ("token", "avg", "layers")}
    splits = [Features(x[s], y[s], data.ids[s], []) for s in (slice(400, 2000), slice(400))]
    (rest, held), config = (slice(320, 1600), slice(320)), linear_probe.Config()
    a = splits[0]
    clock.add(
        "linear-probe: choose readout and C",
        lambda: choose_readout(a.x[rest], a.y[rest], a.x[held], a.y[held], readouts),
    )
    clock.add("linear-probe: choose the neighbours", lambda: choose_neighbours(a, readouts))
    clock.add(
        "linear-probe: both, refit, and intervals",
        lambda: linear_probe.probe("encoder", *splits, readouts, config),
    )
    return clock.stages


def data() -> list[Stage]:
    """Reading and each transform, per image; the second pass counts."""
    from vim_ssl import create_transform, load_encoder
    from vim_ssl.data import open_data, pretrain_transform

    def measure(clock: Clock, kind: str, spec: str, preset: str) -> list[Stage]:
        images, config = open_data(spec), load_encoder(preset)
        items = clock.add(f"{kind}: read", lambda: [images[i]["image"] for i in numbers], IMAGES)
        for use, transform in (
            ("training", pretrain_transform(config.data_config, hflip=0.5)),
            ("test", create_transform(config)),
        ):
            changed = items
            for one in transform.transforms:
                stage = f"{kind}: {type(one).__name__}, {use}"
                changed = clock.add(stage, partial(list, map(one, changed)), IMAGES)
        return clock.stages

    numbers, stages = range(IMAGES), []
    with tempfile.TemporaryDirectory() as folder:
        for described in (
            ("photograph, 500 x 375 px", photographs(Path(folder), IMAGES), "vim_tiny_patch16_224"),
            ("digit, 28 px", f"{DIGITS}&limit={IMAGES}", "vim_nano_patch4_28"),
        ):
            measure(Clock(), *described)
            stages += measure(Clock(), *described)
    return stages


def report() -> list[Stage]:
    """The page of a run with four evaluations."""
    from vim_ssl.recipes import mim_pretrain
    from vim_ssl.report import write_report

    config = mim_pretrain.PRESETS["demo"]()
    with tempfile.TemporaryDirectory() as folder:
        small = {"model_args": {"depth": 1, "embed_dim": 32}, "log_every": 1, "threads": 1,
                 "data": f"{DIGITS}&limit=640", "output": f"{folder}/run"}  # fmt: skip
        mim_pretrain.run(replace(config, **small))
        clock = Clock()
        clock.add("report.html", lambda: write_report(f"{folder}/run"))
    return clock.stages


def measured() -> Iterator[tuple[str, list[Stage]]]:
    """Yield the name of each part and its stages."""
    yield "start", run_apart(imports)
    yield "start", run_apart(launcher)
    with tempfile.TemporaryDirectory() as cache:
        yield "first step, nothing compiled", run_apart(first_step, cache)
        yield "first step", run_apart(first_step, cache)
    for part in (evaluation, data, report):
        yield part.__name__, run_apart(part)


def table(rows: list[dict[str, str]]) -> str:
    """The rows of the newest run in Markdown."""
    newest = [row for row in rows if row["run"] == rows[-1]["run"]]
    cells = [(row["part"], row["stage"], f"{1e3 * float(row['cpu_seconds']):,.4g}")
             for row in newest]  # fmt: skip
    return markdown_table(("part", "stage", "CPU ms"), cells)


def main() -> int:
    parser = results_parser(__doc__, FILE)
    parser.add_argument("--table", action="store_true", help="print the newest rows, measure none")
    args = parser.parse_args()
    path = args.out / FILE
    if not args.table:
        here = origin() | {"run": time.strftime("%Y-%m-%dT%H:%M:%S")}
        for part, stages in measured():
            rows = [{"part": part, "stage": stage, "cpu_seconds": f"{cpu:.6f}",
                     "wall_seconds": f"{wall:.6f}"} for stage, cpu, wall in stages]  # fmt: skip
            append_rows(path, COLUMNS, [here | row for row in rows])
    print(table(read_rows(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
