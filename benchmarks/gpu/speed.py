"""The sections `kernels`, `peers`, `mamba` and `models` of `gpu_check.py`: times and memory."""

import gc
import time
from pathlib import Path

import compiles
import timing
import torch
from process import peak_mib, reset_peak, saved_bytes
from rows import ORIGIN
from section import Section, compile_ahead

ROOT = Path(__file__).parents[2]
MODEL_COLUMNS = (*ORIGIN, "model", "mode", "what", "px", "batch", "dtype", "p20_ms", "p50_ms",
                 "p80_ms", "images_per_s", "peak_mb", "saved_mb", "compile_s")  # fmt: skip


# --- kernels ---------------------------------------------------------------------------------


def kernels(section: Section) -> None:
    """Time the Triton scan: bfloat16 before float32, small models before large ones."""
    if not section.dry:  # the kernels do not depend on the width
        shapes = [shape for shape in timing.CUDA_SHAPES if shape.d == timing.CUDA_SHAPES[0].d]
        compile_ahead(section, compile_scan, [
            (shape, dtype, way) for dtype in ("bf16", "fp32") for shape in shapes
            for way in ("forward", "backward")
        ])  # fmt: skip
    _time_kernels(section, ["numba", "torch"] if section.dry else ["triton"])


def compile_scan(device: str, shape, dtype: str, direction: str) -> list[compiles.Compilation]:
    """Run a scan once for its compilations."""
    provider, *_ = timing.providers(device, ["triton"])[0]
    compilations: list[compiles.Compilation] = []
    with compiles.heard(compilations.append):
        timing.prepare_calls(provider, direction, [timing.inputs(shape, dtype, device)], device)
    return compilations


def peers(section: Section) -> None:
    """Time other implementations of the scan that need no build; torch.compile's last."""
    if section.dry:
        _time_kernels(section, ["torch"])
        return
    _time_kernels(section, ["associative_scan", "torch"])
    _time_kernels(section, ["compiled"])


def mamba(section: Section) -> None:
    """Time the CUDA kernel of mamba-ssm, if its sources are there; it is built here."""
    if section.dry or not (ROOT / ".peers" / "mamba_ssm").is_dir():
        section.say("skipped: its sources are not in .peers/; see benchmarks/peers/mamba_ssm.py")
        return
    _time_kernels(section, ["mamba_ssm"])


def _time_kernels(section: Section, groups: list[str]) -> None:
    tiny = [timing.Shape(1, 8, 4, 2)]
    rows = timing.measure(
        section.device,
        shapes=tiny if section.dry else timing.CUDA_SHAPES,
        dtypes=["fp32"] if section.dry else ["bf16", "fp32"],
        groups=groups,
        budget_s=0.01 if section.dry else 0.5,
        ceilings=None if section.dry else timing.measure_ceilings(section.say),
        until=section.until - 5,
        say=section.say,
    )
    try:
        for row in rows:
            section.row("kernels.csv", timing.COLUMNS, row, timing.format_row(row))
    except RuntimeError as error:
        section.fail(error)


# --- models ----------------------------------------------------------------------------------

BATCHES = {224: 128, 1024: 8, 512: 32, 2048: 2, 1248: 4, 768: 16}  # px -> images
WHAT = ("forward", "training step")


def models(section: Section) -> None:
    """Time a block, then Vim and DeiT with fused attention: forward and training step, bf16."""
    if section.dry:
        plan = [(name, 64, "eager") for name in
                ("vim block 192", "vim_nano_patch8_64", "deit_tiny_patch16_224")]  # fmt: skip
    else:
        sizes = ("tiny", "small")
        names = {size: (f"vim_{size}_patch16_224", f"deit_{size}_patch16_224") for size in sizes}
        plan = [(name, 224, "eager") for name in names["tiny"]]
        plan += [("vim block 192", 224, "eager")]
        plan += [(name, 224, "eager") for name in names["small"]]
        plan += [(name, px, "eager") for size in sizes for px in BATCHES if px != 224
                 for name in names[size]]  # fmt: skip
        plan += [(name, px, "compiled") for px in (224, 1024) for name in names["tiny"]]
        compile_ahead(section, compile_model, [(px, what) for px in BATCHES for what in WHAT])
    for name, px, mode in plan:
        if section.left() < 10:
            section.cut_off(f"{name}, {px} px, {mode} and what follows: the time is up")
            break
        _time_model(section, name, px, mode)


def compile_model(device: str, px: int, what: str) -> list[compiles.Compilation]:
    """Run a Vim of one block once for its compilations."""
    model, x = _build("vim_tiny_patch16_224", px, BATCHES[px], device, depth=1)
    compilations: list[compiles.Compilation] = []
    with compiles.heard(compilations.append):
        with torch.set_grad_enabled(what != "forward"), torch.autocast(device, torch.bfloat16):
            loss = model(x).float().square().mean()
        if loss.requires_grad:
            loss.backward()
    return compilations


def _time_model(section: Section, name: str, px: int, mode: str) -> None:
    """Time one model's forward pass and training step; a failure leaves out its row."""
    batch = 2 if section.dry else BATCHES[px]
    for what in WHAT:
        if not section.dry:
            gc.collect()  # the model before
            torch.cuda.empty_cache()
        try:
            row = _measure_model(section, name, px, batch, mode, what)
        except Exception as error:
            what_failed = f"{name}, {px} px, {mode}, {what}"
            section.fail(f"{what_failed}. {timing.first_line(error)}")
            continue
        section.row("models.csv", MODEL_COLUMNS, row, (
            f"{name:24} {mode:9} {what:14} {px:5} px  b{batch:<4} {row['p50_ms']:>9} ms  "
            f"{row['images_per_s']:>9} images/s  peak {row['peak_mb']} MB, saved {row['saved_mb']} "
            f"MB, first call {row['compile_s']} s"
        ))  # fmt: skip


def _measure_model(section: Section, name: str, px: int, batch: int, mode: str, what: str) -> dict:
    torch.manual_seed(0)
    device = section.device
    model, x = _build(name, px, batch, device, depth=1 if section.dry else None)
    training = what != "forward"
    model.train(training)
    call = torch.compile(model) if mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def loss() -> torch.Tensor:
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16):
            return call(x).float().square().mean()

    def step() -> None:
        value = loss()
        if training:
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    started = time.perf_counter()
    step()
    timing.wait(device)
    first = time.perf_counter() - started
    saved = None
    if training and mode == "eager":
        saved = round(saved_bytes(loss, model.parameters()) / 1e6, 1)
    step()
    reset_peak(device)
    timed = timing.Timed(name, "calls", lambda _: step())
    timing.time_calls([timed], sets=1, device=device, budget_s=0.02 if section.dry else 1.0)
    peak = round(peak_mib("cuda") * 2**20 / 1e6, 1) if device == "cuda" else None
    p20, p50, p80 = timing.percentiles(timed.ms)
    return section.origin | {
        "model": name, "mode": mode, "what": what, "px": px, "batch": batch, "dtype": "bf16",
        "p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3),
        "images_per_s": round(1e3 * batch / p50, 1), "peak_mb": peak, "saved_mb": saved,
        "compile_s": round(first, 1),
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
