"""Run every check and measurement that needs a GPU, in order of priority.

    python benchmarks/gpu_check.py                               # or: make gpu-check; 9 minutes
    python benchmarks/gpu_check.py --only kernels models --out FOLDER --budget 300
    python benchmarks/gpu_check.py --dry-run                     # tiny, on a CPU, under a minute

Sections: machine (versions and ceilings), correctness (tests and errors against float64), kernels,
models (Vim against DeiT) and pretraining (a short run, and resuming it). Each runs in a fresh
process, which is stopped when its share of the budget is used; the output reports this. Rows are
appended to CSV files in --out (results/, which git tracks) as they come, with a log per section.

It runs from a plain checkout (PYTHONPATH=.), without git, network or the `datasets` package.
The exit code is 1 if a section or a check failed; a section that was stopped is not a failure.
"""

import argparse
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # for `ceilings` and `timing`

from process import peak_mib, reset_peak
from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl.training.run import read_metrics

ROOT = Path(__file__).parents[1]
# Section -> its share of the remaining time, relative to the sections after it.
SECTIONS = {"machine": 30, "correctness": 120, "kernels": 170, "models": 150, "pretraining": 70}
ACCURACY_COLUMNS = (*ORIGIN, "case", "dtype", "backend", "quantity", "error", "holds")
CEILING_COLUMNS = (*ORIGIN, "exp2_per_s", "fma_per_s", "copied_bytes_per_s", "sm_clock_mhz")
MODEL_COLUMNS = (*ORIGIN, "model", "mode", "what", "px", "batch", "dtype", "p20_ms", "p50_ms",
                 "p80_ms", "images_per_s", "peak_mb", "compile_s")  # fmt: skip
PRETRAINING_COLUMNS = (
    *ORIGIN, "data", "precision", "steps", "seconds", "loss", "knn_top1", "feature_std",
    "resumed_at", "resume_bitwise", "resume_difference",
)  # fmt: skip


@dataclass
class Section:
    """Settings of a section.

    Attributes:
        out: folder for its rows.
        until: `time.monotonic()` at which it will be stopped.
        dry: run everything tiny, on a CPU.
    """

    out: Path
    until: float
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        """Return the seconds until the section is stopped."""
        return self.until - time.monotonic()

    def write(self, name: str, columns: tuple[str, ...], row: dict) -> None:
        append_rows(self.out / name, columns, [row])


def say(*words: object) -> None:
    print(*words, flush=True)


# --- machine ---------------------------------------------------------------------------------


def machine(section: Section) -> bool:
    """Versions, ceilings, and the lower bounds that follow for the scan."""
    import ceilings
    import timing

    for name, value in origin().items():
        say(f"{name}: {value}")
    for command in (["nvidia-smi"], ["nvcc", "--version"]):
        with suppress(OSError):
            say(subprocess.run(command, capture_output=True, text=True).stdout)
    rates = ceilings.measure(section.device, steps=1 if section.dry else 2000)
    say(f"exp2 {rates.exp2:.3g}/s, FMA {rates.fma:.3g}/s, copy {rates.copied:.3g} bytes/s, "
        f"clock {rates.sm_clock_mhz} MHz")  # fmt: skip
    section.write("ceilings.csv", CEILING_COLUMNS, origin() | {
        "exp2_per_s": f"{rates.exp2:.4g}", "fma_per_s": f"{rates.fma:.4g}",
        "copied_bytes_per_s": f"{rates.copied:.4g}", "sm_clock_mhz": rates.sm_clock_mhz,
    })  # fmt: skip
    for shape in () if section.dry else timing.CUDA_SHAPES:
        floors = [rates.floor_ms(way, **vars(shape)) for way in ("forward", "backward")]
        say(f"{shape!s:22} floor forward {floors[0]:.4f} ms, backward {floors[1]:.4f} ms")
    return True


# --- correctness -----------------------------------------------------------------------------


def correctness(section: Section) -> bool:
    """Run the tests marked gpu, then compare every scan backend with the float64 loop."""
    from vim_ssl.kernels.selective_scan import accuracy

    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
             *(["tests/test_makefile.py"] if section.dry else [])]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        code = subprocess.run(
            tests, cwd=ROOT, env=environment, timeout=0.6 * section.left()
        ).returncode
    except subprocess.TimeoutExpired:
        say("cut off: the tests marked gpu")
        code = 1
    passed = code in (0, 5)  # 5: there are none
    names, skipped = accuracy.runnable(section.device)
    for line in skipped:
        say(line)
    # Long sequences last: their exact results take longest.
    cases = [case for case in sorted(accuracy.CASES, key=lambda c: c.l)
             if case.small or not section.dry]  # fmt: skip
    say(accuracy.header())
    common = origin()
    for row in accuracy.rows(section.device, names, cases[:1] if section.dry else cases):
        say(accuracy.format_row(row))
        passed &= not row.broken
        values = row.errors or {"note": row.note}
        for quantity, error in values.items():
            section.write("accuracy.csv", ACCURACY_COLUMNS, common | {
                "case": row.case, "dtype": row.dtype, "backend": row.backend,
                "quantity": quantity, "holds": quantity not in row.broken,
                "error": error if isinstance(error, str) else f"{error:.2e}",
            })  # fmt: skip
        for name, expected in row.broken.items():
            say(f"BROKEN: {name} {row.errors.get(name, row.note)}; expected {expected}")
    return passed


# --- kernels ---------------------------------------------------------------------------------


def kernels(section: Section) -> bool:
    """Time the scan and every peer that runs here."""
    import timing

    tiny = [timing.Shape(1, 8, 4, 2)]
    rows = timing.measure(
        section.device,
        shapes=tiny if section.dry else timing.CUDA_SHAPES,
        dtypes=["fp32"] if section.dry else ["bf16", "fp32"],
        budget_s=0.01 if section.dry else 0.5,
        ceilings=None if section.dry else timing.measure_ceilings(say),
        compiled=not section.dry,
        until=section.until - 5,
        say=say,
    )
    try:
        for row in rows:
            say(timing.format_row(row))
            section.write("kernels.csv", timing.COLUMNS, row)
    except RuntimeError as error:
        say(error)
        return False
    return True


# --- models ----------------------------------------------------------------------------------

BATCHES = {224: 128, 512: 32, 768: 16, 1024: 8, 1248: 4, 2048: 2}  # px -> images


def models(section: Section) -> bool:
    """Time a block, then Vim and DeiT with fused attention: forward and training step, bf16."""
    if section.dry:
        pairs = [("vim_nano_patch8_64", "deit_tiny_patch16_224")]
        plan = [(name, 64, "eager") for pair in pairs for name in pair]
        _time_model(section, "vim block 192", 64, "eager")
    else:
        _time_model(section, "vim block 192", 224, "eager")
        sizes = ("tiny", "small")
        names = {size: (f"vim_{size}_patch16_224", f"deit_{size}_patch16_224") for size in sizes}
        plan = [(name, px, "eager") for size in sizes for px in BATCHES for name in names[size]]
        plan += [(name, px, "compiled") for px in (224, 1024) for name in names["tiny"]]
    for name, px, mode in plan:
        if section.left() < 10:
            say(f"cut off before {name}, {px} px, {mode}: the time is up")
            break
        _time_model(section, name, px, mode)
    return True


def _time_model(section: Section, name: str, px: int, mode: str) -> None:
    """Time one model's forward pass and training step; report failures without a row."""
    batch = 2 if section.dry else BATCHES[px]
    for what in ("forward", "training step"):
        if not section.dry:
            gc.collect()  # the model before
            torch.cuda.empty_cache()
        try:
            row = _measure_model(section, name, px, batch, mode, what)
        except Exception as error:
            say(f"skipped: {name}, {px} px, {mode}, {what}. {type(error).__name__}: "
                f"{str(error)[:300]}")  # fmt: skip
            continue
        say(f"{name:24} {mode:9} {what:14} {px:5} px  b{batch:<4} {row['p50_ms']:>9} ms  "
            f"{row['images_per_s']:>9} images/s  {row['peak_mb']} MB")  # fmt: skip
        section.write("models.csv", MODEL_COLUMNS, row)


def _measure_model(section: Section, name: str, px: int, batch: int, mode: str, what: str) -> dict:
    import timing

    torch.manual_seed(0)
    device = section.device
    model, x = _build(name, px, batch, device, depth=1 if section.dry else None)
    training = what != "forward"
    model.train(training)
    call = torch.compile(model) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def step() -> None:
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16):
            loss = call(x).float().square().mean()
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    started = time.perf_counter()
    step()
    timing.wait(device)
    first = time.perf_counter() - started
    step()
    reset_peak(device)
    timed = timing.Timed(name, "calls", lambda _: step())
    timing.time_calls([timed], sets=1, device=device, budget_s=0.02 if section.dry else 1.0)
    peak = round(peak_mib("cuda") * 2**20 / 1e6, 1) if device == "cuda" else None
    p20, p50, p80 = timing.percentiles(timed.ms)
    return origin() | {
        "model": name, "mode": mode, "what": what, "px": px, "batch": batch, "dtype": "bf16",
        "p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3),
        "images_per_s": round(1e3 * batch / p50, 1), "peak_mb": peak,
        "compile_s": round(first, 1) if mode == "compiled" else None,
    }  # fmt: skip


def _build(name: str, px: int, batch: int, device: str, depth: int | None):
    """Build a model and its input; a block takes the tokens of an image of px by px."""
    import timm

    from vim_ssl.models.block import VimBlock

    if name.startswith("vim block"):
        width = int(name.rpartition(" ")[2])

        class Block(VimBlock):
            def forward(self, x):
                return super().forward(x, None)[0]

        tokens = (px // 16) ** 2 + 1
        x = torch.randn(batch, tokens, width, device=device, requires_grad=True)
        return Block(width).to(device), x
    changed = {"depth": depth} if depth else {}
    model = timm.create_model(name, img_size=px, num_classes=1000, **changed).to(device)
    return model, torch.randn(batch, 3, px, px, device=device)


# --- pretraining -----------------------------------------------------------------------------


def pretraining(section: Section) -> bool:
    """A short run on digits in bf16 with its kNN, and the same run stopped and resumed."""
    work = section.out / "pretraining"
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
        return False
    seconds = time.perf_counter() - started
    whole = _losses(work / "whole")
    middle = len(whole) // 2
    stopped = _pretrain([*settings, "--max-steps", str(middle)], work / "parts")
    if not stopped or not _pretrain([*settings, "--resume", "auto"], work / "parts"):
        return False
    parts = _losses(work / "parts")
    steps = [step for step in whole if step > middle]
    difference = max(abs(whole[s] - parts.get(s, float("inf"))) for s in steps)
    last = read_metrics(work / "whole")[-1]
    row = origin() | {
        "data": "the 1,797 digits of scikit-learn", "precision": "bf16", "steps": last["step"],
        "seconds": round(seconds, 1), "loss": last["loss"], "knn_top1": last.get("knn_top1"),
        "feature_std": last.get("feature_std"), "resumed_at": middle,
        "resume_bitwise": difference == 0, "resume_difference": f"{difference:.1e}",
    }  # fmt: skip
    section.write("pretraining.csv", PRETRAINING_COLUMNS, row)
    say(f"{last['step']} steps in {seconds:.0f} s, loss {last['loss']:.4f}, kNN {row['knn_top1']}")
    say(f"resumed at step {middle}: losses differ by {difference:.1e}")
    return difference <= 1e-3


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


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run)}


# --- all sections ----------------------------------------------------------------------------


def run_sections(names: list[str], out: Path, budget: float, dry: bool) -> bool:
    """Run each section in a fresh process; True if none failed."""
    end, failed = time.monotonic() + budget, []
    if not dry and "kernels" in names and (ROOT / ".peers" / "mamba_ssm").is_dir():
        # In parallel with the first sections; the kernels section waits for it.
        build = [sys.executable, str(ROOT / "benchmarks" / "peers" / "mamba_ssm.py")]
        with open(out / "gpu_check-build.log", "w") as log:
            subprocess.Popen(build, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                             stdout=log, stderr=log)  # fmt: skip
    for i, name in enumerate(names):
        share = SECTIONS[name] / sum(SECTIONS[n] for n in names[i:])
        seconds = (end - time.monotonic()) * share
        if seconds < 1:
            say(f"=== {name}: skipped, the time is up")
            continue
        say(f"=== {name}: up to {seconds:.0f} s")
        started = time.monotonic()
        code = _run_section(name, out, seconds, dry)
        state = {0: "done", None: "CUT OFF, its rows so far are kept"}.get(code, f"FAILED ({code})")
        say(f"=== {name}: {state} after {time.monotonic() - started:.0f} s\n")
        failed += [name] if code else []
    say(f"Rows and logs: {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return not failed


def _run_section(name: str, out: Path, seconds: float, dry: bool) -> int | None:
    """Print and log a section's output; return its exit code, or None if it was cut off."""
    command = [sys.executable, "-u", __file__, "--section", name, "--out", str(out),
               "--budget", str(seconds), *["--dry-run"] * dry]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if dry:
        # The interpreter takes seconds for each scan; only the ceilings cannot do without.
        interpret = "1" if name == "machine" else "0"
        environment |= {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its children are killed with it
    )  # fmt: skip
    tee = subprocess.Popen(["tee", str(out / f"gpu_check-{name}.log")], stdin=process.stdout)
    code: int | None = None
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(seconds)
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    tee.wait()
    return code


def main(argv: list[str] | None = None) -> int:
    parser = results_parser(__doc__, "a CSV file of each section")
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    add("--budget", type=float, default=530, metavar="SECONDS", help="for all sections together")
    add("--dry-run", action="store_true", help="tiny, on a CPU, without the Triton scan")
    add("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_check.py: torch finds no CUDA device; --dry-run needs none.", file=sys.stderr)
        return 1
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.section:
        section = Section(out, time.monotonic() + args.budget, args.dry_run)
        return int(not globals()[args.section](section))
    return int(not run_sections(args.only, out, args.budget, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
