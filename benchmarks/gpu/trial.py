"""The section `pretraining` of `gpu_check.py`: a short run, and the same resumed in the middle."""

import shutil
import time
from pathlib import Path

from rows import ORIGIN
from section import Section

PRETRAINING_COLUMNS = (
    *ORIGIN, "data", "precision", "steps", "seconds", "loss", "knn_top1", "feature_std",
    "resumed_at", "resume_bitwise", "resume_difference",
)  # fmt: skip


def pretraining(section: Section) -> None:
    """A short run on digits in bf16 with its kNN, and the same run stopped and resumed."""
    from vim_ssl.training.run import read_metrics

    work = section.cache / "pretraining"
    shutil.rmtree(work, ignore_errors=True)  # otherwise the run would resume or fail
    data = _digits(work / "digits", limit=60 if section.dry else None)
    settings = ["--preset", "demo", "--data", str(data), "--precision", "bf16", "--log-every", "1",
                "--warmup-epochs", "1", "--eval-every", "100"]  # fmt: skip
    settings += (
        ["--epochs", "2", "--batch-size", "10", "--threads", "1", "--decoder-dim", "16",
         "--model-args", "depth=1", "embed_dim=16"]
        if section.dry else ["--epochs", "10"]
    )  # fmt: skip
    started = time.perf_counter()
    if not _pretrain(settings, work / "whole"):
        section.fail("the whole run")
        return
    seconds = time.perf_counter() - started
    whole = {row["step"]: row["loss"] for row in read_metrics(work / "whole")}
    middle = len(whole) // 2
    last = read_metrics(work / "whole")[-1]
    section.say(f"{last['step']} steps in {seconds:.0f} s, loss {last['loss']:.4f}, "
                f"kNN {last.get('knn_top1')}; now in two parts")  # fmt: skip
    row = section.origin | {
        "data": "the 1,797 digits of scikit-learn", "precision": "bf16", "steps": last["step"],
        "seconds": round(seconds, 1), "loss": last["loss"], "knn_top1": last.get("knn_top1"),
        "feature_std": last.get("feature_std"), "resumed_at": middle,
    }  # fmt: skip
    difference = _resumed_difference(settings, work / "parts", whole, middle)
    if difference is not None:
        row |= {"resume_bitwise": difference == 0, "resume_difference": f"{difference:.1e}"}
    section.row("pretraining.csv", PRETRAINING_COLUMNS, row, f"resumed at step {middle}:")
    if difference is None or not difference <= 1e-3:
        section.fail(f"resumed in the middle: the losses differ by {difference}")


def _resumed_difference(
    settings: list[str], run: Path, whole: dict[int, float], middle: int
) -> float | None:
    """The largest difference of the losses after a stop in the middle; None if a part failed."""
    from vim_ssl.training.run import read_metrics

    stopped = _pretrain([*settings, "--max-steps", str(middle)], run)
    if not stopped or not _pretrain([*settings, "--resume", "auto"], run):
        return None
    parts = {row["step"]: row["loss"] for row in read_metrics(run)}
    steps = [step for step in whole if step > middle]
    return max(abs(whole[step] - parts.get(step, float("inf"))) for step in steps)


def _digits(folder: Path, limit: int | None) -> Path:
    """Write scikit-learn's handwritten digits, enlarged, as class folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:limit], digits.target, strict=False)):
        path = folder / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image / 16 * 255).astype(np.uint8))
        grey.resize((28, 28), Image.Resampling.BICUBIC).save(path)
    return folder


def _pretrain(settings: list[str], output: Path) -> bool:
    from vim_ssl.recipes import mim_pretrain

    return mim_pretrain.main([*settings, "--output", str(output)]) == 0
