"""Embed slides with sides of 30,000 and 50,000 pixels and a photograph; kill and resume the run.

    python benchmarks/slides.py                              # needs 2 GB of disk for a while
    python benchmarks/slides.py --sides                      # the photograph alone
    python benchmarks/slides.py --sides 4000 --tiles 32 --out FOLDER

A slide is generated: one tiled JPEG level without a pyramid, the hardest case, with an ellipse of
coloured texture on light grey. A fresh process opens it (which finds the tissue) and embeds some
tiles, spread over the tissue, by downstream/embed.py in batches of `--batch`. Memory is the rise of
the resident set's peak in each of the two steps; the second includes the encoder. Further processes
embed the same tiles twice, once without a break and once killed (SIGKILL) when half of the files
exist, and resumed: the files must be equal byte for byte. The largest of the three peaks is a
column; its target is 4 GiB. The photograph is the largest aerial one of the sample set `aerial`,
2472 x 2299 pixels. Rows are appended to results/slides.csv, or to --out.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from process import peak_mib, reset_peak, run_apart, rusage_peak_mib
from rows import ORIGIN, append_rows, origin, results_parser

FILE = "slides.csv"
COLUMNS = (
    *ORIGIN, "threads", "side", "file_mb", "tile", "tiles", "open_seconds", "open_rise_mib",
    "encoder", "batch", "embedded", "seconds_a_tile", "embed_rise_mib", "peak_mib", "files",
    "files_before_kill", "same_features", "killed_peak_mib",
)  # fmt: skip
PHOTO = "2472x2299"  # pixels of the photograph
TILE = 512  # of the file; --tile is the encoder's


def write_slide(path: Path, side: int) -> None:
    """Generate a tiled TIFF and write it tile by tile."""
    import tifffile

    rng = np.random.default_rng(0)
    base = np.array([190, 110, 160])
    texture = [
        (base + np.kron(rng.normal(0, 25, (64, 64, 3)), np.ones((8, 8, 1)))).clip(0, 255)
        .astype(np.uint8) for _ in range(8)
    ]  # fmt: skip
    glass = np.full((TILE, TILE, 3), 240, np.uint8)
    count = -(-side // TILE)

    def tiles() -> Iterator[np.ndarray]:
        for row in range(count):
            for column in range(count):
                y, x = (2 * (k + 0.5) / count - 1 for k in (row, column))
                inside = x**2 / 0.5 + y**2 / 0.3 < 1  # three tenths of the slide
                yield texture[(row * count + column) % 8] if inside else glass

    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE),
                     photometric="rgb", compression="jpeg", bigtiff=True)  # fmt: skip


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Open a slide and embed some tiles in this process, then kill and resume others."""
    import torch

    from vim_ssl.data import open_data
    from vim_ssl.downstream import embed

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    reset_peak()
    before, started = peak_mib(), clock()
    data = open_data(f"slide:{path}?tile={args.tile}")
    opened, seconds = peak_mib(), clock() - started
    data[0]
    count = min(args.tiles, len(data))

    def embedded(tiles: int, name: str) -> float:
        begun = clock()
        with contextlib.redirect_stdout(io.StringIO()):
            embed.main(["--encoder", args.encoder, "--batch-size", str(args.batch), "--device",
                        "cpu", "--data", f"slide:{path}?tile={args.tile}&limit={tiles}",
                        "--output", str(path.parent / name)])  # fmt: skip
        return clock() - begun

    reset_peak()
    lower = peak_mib()
    embedded(1, "warm")  # compiles and loads
    one, many = embedded(1, "one"), embedded(count, "many")
    row = {
        "tiles": len(data), "open_seconds": round(seconds, 2),
        "open_rise_mib": round(opened - before), "embedded": count,
        "seconds_a_tile": round((many - one) / max(count - 1, 1), 4),
        "embed_rise_mib": round(peak_mib() - lower), "peak_mib": round(peak_mib()),
    }  # fmt: skip
    return row | kill_and_resume(path, count, args)


def kill_and_resume(path: Path, tiles: int, args: argparse.Namespace) -> dict[str, int | bool]:
    """Embed tiles without a break, and again with a kill at half of the files and a restart."""

    def command(folder: Path) -> list[str]:
        return [
            sys.executable, "-m", "vim_ssl.downstream.embed", "--encoder", args.encoder,
            "--batch-size", str(args.batch), "--shard-rows", str(args.batch), "--format", "npy",
            "--device", "cpu", "--data", f"slide:{path}?tile={args.tile}&limit={tiles}",
            "--output", str(folder),
        ]  # fmt: skip

    def written(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folder / "shards").glob("[!.]*.npy")}

    whole, broken = path.parent / "whole", path.parent / "broken"
    subprocess.run(command(whole), check=True, capture_output=True)
    expected = written(whole)
    process = subprocess.Popen(
        command(broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(written(broken)) < len(expected) // 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(written(broken))
    subprocess.run(command(broken), check=True, capture_output=True)
    return {
        "files": len(expected), "files_before_kill": kept,
        "same_features": written(broken) == expected,
        "killed_peak_mib": round(rusage_peak_mib(children=True)),
    }  # fmt: skip


def photograph() -> Path:
    """Path of the largest photograph. Raises: SampleMissing with the command that fetches it."""
    from vim_ssl.data.samples.fetch import find_sample
    from vim_ssl.data.samples.sets import SCENES

    return find_sample("aerial")[0] / "deepforest/data" / f"{SCENES[0]}.png"


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--sides", nargs="*", type=int, default=(30_000, 50_000), help="pixels")
    add("--tile", type=int, default=256, help="side of an embedded tile in pixels")
    add("--tiles", type=int, default=256, help="tiles to embed per slide")
    add("--batch", type=int, default=16, help="tiles per batch")
    add("--encoder", default="vim_tiny_patch16_224", help="preset, run or file")
    add("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    good = True
    for side in (*args.sides, PHOTO):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (f"{side}.tif" if side != PHOTO else "photo.png")
            if side == PHOTO:
                shutil.copy(photograph(), path)
            else:
                write_slide(path, side)
            row: dict[str, Any] = run_apart(measure, path, args)
            row |= {
                "threads": args.threads, "side": side, "tile": args.tile, "batch": args.batch,
                "encoder": args.encoder, "file_mb": round(path.stat().st_size / 1e6),
            }  # fmt: skip
            append_rows(args.out / FILE, COLUMNS, [origin() | row])
            print(
                f"{side} px: {row['tiles']:,} tiles found in {row['open_seconds']} s and "
                f"{row['open_rise_mib']} MiB; {row['seconds_a_tile']} s per tile, "
                f"{row['embed_rise_mib']} MiB; killed after {row['files_before_kill']} of "
                f"{row['files']} files and resumed: the same {row['same_features']}, "
                f"{row['killed_peak_mib']} MiB",
                flush=True,
            )
            good &= row["same_features"] and row["killed_peak_mib"] <= 4096
            good &= 0 < row["files_before_kill"] < row["files"]
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
