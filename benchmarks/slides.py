"""Whole slides of 30,000 and 50,000 pixels a side through the tile encoder: seconds and memory.

    python benchmarks/slides.py                              # 2 GB of disk for a while
    python benchmarks/slides.py --sides 4000 --tiles 32 --out FOLDER

A slide is made here: one tiled JPEG level without a pyramid, the hardest case, an ellipse of
coloured texture on light grey. In a process of its own it is opened (where is tissue?) and some of
its tiles, spread over the tissue, are embedded by downstream/embed.py in batches of `--batch`.
Memory is the rise of the resident set's peak over what it was before each part; the second has the
encoder in it. Rows are appended to results/slides.csv.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from efficiency import peak_mib, reset_peak
from rows import ORIGIN, append_rows, origin, results_parser

FILE = "slides.csv"
COLUMNS = (
    *ORIGIN, "threads", "side", "file_mb", "tile", "tiles", "open_seconds", "open_rise_mib",
    "encoder", "batch", "embedded", "seconds_a_tile", "embed_rise_mib", "peak_mib",
)  # fmt: skip
TILE = 512  # of the file; the encoder's are --tile


def write_slide(path: Path, side: int) -> None:
    """A tiled TIFF, made and written tile by tile."""
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
                inside = x**2 / 0.5 + y**2 / 0.3 < 1  # three tenths of the whole
                yield texture[(row * count + column) % 8] if inside else glass

    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE),
                     photometric="rgb", compression="jpeg", bigtiff=True)  # fmt: skip


def measure(path: Path, args: argparse.Namespace) -> dict[str, float | str]:
    """Open it and embed some tiles, in this process."""
    import torch

    from vim_ssl.data import open_data
    from vim_ssl.downstream import embed

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    reset_peak(False)
    before, started = peak_mib(False), clock()
    data = open_data(f"slide:{path}?tile={args.tile}")
    opened, seconds = peak_mib(False), clock() - started
    data[0]
    count = min(args.tiles, len(data))

    def embedded(tiles: int, name: str) -> float:
        begun = clock()
        with contextlib.redirect_stdout(io.StringIO()):
            embed.main(["--encoder", args.encoder, "--batch-size", str(args.batch), "--device",
                        "cpu", "--data", f"slide:{path}?tile={args.tile}&limit={tiles}",
                        "--output", str(path.parent / name)])  # fmt: skip
        return clock() - begun

    reset_peak(False)
    lower = peak_mib(False)
    embedded(1, "warm")  # compiles, and opens what is opened once
    one, many = embedded(1, "one"), embedded(count, "many")
    return {
        "tiles": len(data), "open_seconds": round(seconds, 2),
        "open_rise_mib": round(opened - before), "embedded": count,
        "seconds_a_tile": round((many - one) / max(count - 1, 1), 4),
        "embed_rise_mib": round(peak_mib(False) - lower), "peak_mib": round(peak_mib(False)),
    }  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--sides", nargs="+", type=int, default=(30_000, 50_000), help="pixels")
    add("--tile", type=int, default=256, help="pixels, of what is embedded")
    add("--tiles", type=int, default=256, help="embedded of each slide")
    add("--batch", type=int, default=16, help="tiles at once")
    add("--encoder", default="vim_tiny_patch16_224", help="that embeds them")
    add("--threads", type=int, default=1, help="of torch")
    add("--slide", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.slide:
        print(json.dumps(measure(Path(args.slide), args)))
        return 0
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{side}.tif"
            write_slide(path, side)
            command = [sys.executable, *sys.argv, "--slide", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{side} pixels failed:\n{done.stderr[-3000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            row |= {
                "threads": args.threads, "side": side, "tile": args.tile, "batch": args.batch,
                "encoder": args.encoder, "file_mb": round(path.stat().st_size / 1e6),
            }  # fmt: skip
            append_rows(args.out / FILE, COLUMNS, [origin() | row])
            print(
                f"{side:,} px: {row['tiles']:,} tiles found in {row['open_seconds']} s and "
                f"{row['open_rise_mib']} MiB; {row['seconds_a_tile']} s a tile, "
                f"{row['embed_rise_mib']} MiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
