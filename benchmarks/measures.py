"""What `compare_commits.py` measures, with the package of the checkout that PYTHONPATH names.

    PYTHONPATH=CHECKOUT python benchmarks/measures.py NAME

A measure that is a function of this file runs in a process of its own: it prepares, runs once, and
then, for every line on its standard input, runs again and prints a line of JSON,
{what: [CPU seconds, wall seconds]}. A measure in `COMMANDS` is a whole program.

Both commits run this one file: it may use only names that they have in common.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

Seconds = tuple[float, float]  # of the processor and by the clock
Turn = Callable[[], dict[str, Seconds]]
TURN_SECONDS = 0.3  # duration of a turn for one kind of call, or one call if it takes longer
IMAGENET_SIZE = (500, 375)  # px, the mean of its images
STEPS = 8  # of a training in one turn; the first is not counted


def repeated(calls: dict[str, Callable[[], object]]) -> Turn:
    """Return a turn that runs each call for `TURN_SECONDS` and gives the mean of one."""
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call()  # compiles
        counts[name] = max(int(TURN_SECONDS / timed(call, 1)[1]), 1)
    return lambda: {name: timed(call, counts[name]) for name, call in calls.items()}


def timed(call: Callable[[], object], count: int) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def photographs(folder: Path, count: int, size: tuple[int, int] = IMAGENET_SIZE) -> str:
    """Write JPEG files that are smooth with some noise, as photographs are; return the folder."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=90)
    return str(folder)


# --- measures in one process, on one thread --------------------------------------------------


def forward(folder: Path) -> Turn:
    """Features of Vim-Ti at 224 px, batches of 1 and 8."""
    import torch

    from vim_ssl import load_encoder

    encoder = load_encoder("vim_tiny_patch16_224").eval()

    def call(batch: int) -> Callable[[], object]:
        x = torch.randn(batch, 3, 224, 224)
        return torch.inference_mode()(lambda: encoder(x))

    return repeated({f"forward, batch {batch}": call(batch) for batch in (1, 8)})


def step(folder: Path) -> Turn:
    """A step of the trainer: MAE by the demo's preset and by the one for images of 64 px."""
    data = {
        "demo": "sample:mnist5k?split=train&limit=128",
        "cpu_mae": photographs(folder / "images", 128, (96, 80)),
    }
    names = {"demo": "step, demo", "cpu_mae": "step, 64 px"}
    return lambda: {names[preset]: trained(preset, data[preset], folder) for preset in names}


def trained(preset: str, data: str, folder: Path) -> Seconds:
    """Train for `STEPS` steps; return the median time from one update of the weights to the
    next."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from vim_ssl.recipes import mim_pretrain

    times: list[Seconds] = []
    hook = register_optimizer_step_post_hook(
        lambda *_: times.append((time.process_time(), time.perf_counter()))
    )
    with hook, tempfile.TemporaryDirectory(dir=folder) as runs:
        config = mim_pretrain.PRESETS[preset]()
        settings = {"data": data, "output": f"{runs}/run", "max_steps": STEPS, "workers": 0,
                    "threads": 1, "trackers": ("none",), "eval_every": 1e9}  # fmt: skip
        mim_pretrain.run(replace(config, **settings))
    later = itertools.pairwise(times)
    cpu, wall = zip(*((b[0] - a[0], b[1] - a[1]) for a, b in later), strict=True)
    return statistics.median(cpu), statistics.median(wall)


def step_vim(folder: Path) -> Turn:
    """A supervised step of Vim-Ti at 224 px, batch 8, with AdamW."""
    import torch

    from vim_ssl import load_encoder

    encoder = load_encoder("vim_tiny_patch16_224", num_classes=1000).train()
    optimizer = torch.optim.AdamW(encoder.parameters())
    x, y = torch.randn(8, 3, 224, 224), torch.arange(8)

    def call() -> None:
        torch.nn.functional.cross_entropy(encoder(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeated({"step, Vim-Ti, batch 8": call})


def data(folder: Path) -> Turn:
    """Decode and transform an image of ImageNet's mean size for 224 px; for digits in memory."""
    from vim_ssl import create_transform
    from vim_ssl.recipes import mim_pretrain

    def samples(preset: str, spec: str):
        config = replace(mim_pretrain.PRESETS[preset](), data=spec)
        encoder = mim_pretrain.build_model(config)
        return encoder, *mim_pretrain.build_data(config, encoder)

    count = 32
    encoder, images, augmented = samples("mae_tiny_224", photographs(folder, count))
    plain = create_transform(encoder)
    _, _, digits = samples("demo", f"sample:mnist5k?split=train&limit={count}")
    turn = repeated({
        "data, training image": lambda: [augmented[(0, i)] for i in range(count)],
        "data, test image": lambda: [plain(images[i]["image"]) for i in range(count)],
        "data, training digit": lambda: [digits[(0, i)] for i in range(count)],
    })  # fmt: skip
    return lambda: {name: (cpu / count, wall / count) for name, (cpu, wall) in turn().items()}


def evaluation(folder: Path) -> Turn:
    """Linear probe and kNN with their sweeps on 2,000 embeddings; the probe during training."""
    import torch

    from vim_ssl import load_encoder
    from vim_ssl.data import open_data
    from vim_ssl.downstream import linear_probe
    from vim_ssl.evaluation.extract import Features
    from vim_ssl.evaluation.online import online_probe

    g = torch.Generator().manual_seed(0)
    width, classes = 192, 10
    y = torch.arange(2000) % classes
    means = torch.randn(classes, 5 * width, generator=g)
    x = 0.3 * means[y] + torch.randn(len(y), 5 * width, generator=g)
    ids = [str(i) for i in range(len(y))]
    splits = [
        Features(x[part], y[part], ids[part], []) for part in (slice(1600), slice(1600, None))
    ]
    readouts = {"token": slice(width), "avg": slice(width, 2 * width),
                "token+avg": slice(2 * width), "layers": slice(5 * width)}  # fmt: skip
    config = linear_probe.Config()
    encoder = load_encoder("vim_nano_patch4_28", depth=3)
    digits = open_data("sample:mnist5k?split=train&limit=600")
    return repeated({
        "evaluation, probe and kNN": lambda: linear_probe.probe(
            "encoder", *splits, readouts, config
        ),
        "evaluation, during training": online_probe(encoder, digits, "cpu", 0),
    })  # fmt: skip


def report(folder: Path) -> Turn:
    """Write the page of a run."""
    from vim_ssl.recipes import mim_pretrain
    from vim_ssl.report import write_report

    small = {"model_args": {"depth": 1, "embed_dim": 32}, "log_every": 1, "threads": 1,
             "data": "sample:mnist5k?split=train&limit=640", "output": f"{folder}/run"}  # fmt: skip
    mim_pretrain.run(replace(mim_pretrain.PRESETS["demo"](), **small))
    return repeated({"report": lambda: write_report(folder / "run")})


MEASURES: dict[str, Callable[[Path], Turn]] = {
    "forward": forward, "step": step, "step-vim": step_vim, "data": data,
    "evaluation": evaluation, "report": report,
}  # fmt: skip


def check_package() -> None:
    """Raise AssertionError unless the package is that of PYTHONPATH."""
    from vim_ssl import kernels

    folders = [Path(path).parent.resolve() for path in kernels.__path__]
    checkout = Path(os.environ["PYTHONPATH"]).resolve()
    assert folders == [checkout], f"{folders} is not the commit's checkout, {checkout}"


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints is no answer
    check_package()  # imports the package, and that before torch
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        turn = MEASURES[sys.argv[1]](Path(folder))
        print(json.dumps(turn()), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(turn()), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
