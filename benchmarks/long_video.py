"""A real video of 795 frames in one scan and as a stream; overfit on short real clips.

    python benchmarks/long_video.py                      # some minutes of one core
    python benchmarks/long_video.py --only both --out FOLDER

`both` inflates `--encoder` and encodes all frames of the sample set `pedestrians` in one scan.
`forward` does this with a forward-only encoder, first as a stream in pieces of `--piece` frames,
then in one pass; the target is a difference below 1e-5 x (1 + |value|). Memory is the increase of
the peak resident set while tokens are embedded and encoded, after decoding. `overfit` trains
downstream/video.py from scratch on 30 clips of 8 frames, squares cropped from the two videos of
`carphone`, pristine and distorted, and tests on the same clips; package registries have no larger
set of labelled clips. The target is 99 %. Each part runs in a fresh process. Rows are appended to
results/long_video.csv, or to --out.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from process import peak_mib, reset_peak, run_apart
from rows import ORIGIN, append_rows, origin, results_parser

FILE = "long_video.csv"
PARTS = ("both", "forward", "overfit")
COLUMNS = (
    *ORIGIN, "threads", "what", "video", "encoder", "img_size", "frames", "tokens", "piece",
    "cpu_seconds", "rise_mib", "peak_mib", "largest_difference", "clips", "epochs", "top1",
)  # fmt: skip
FRAMES = 795
CLIP, SQUARE = 8, (16, 0, 160, 144)  # frames of a clip, crop of `carphone` (176 x 144)
LEARNER = "vim_nano_patch8_64"


def encode(part: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Encode the whole video with an inflated image encoder; return the rows."""
    import torch

    from vim_ssl import create_transform, load_encoder
    from vim_ssl.data import open_data
    from vim_ssl.models.video import inflate

    kind = {"directions": "forward", "cls_position": "first"} if part == "forward" else {}
    images = load_encoder(args.encoder, img_size=args.img_size, **kind)
    encoder = inflate(images, frames=FRAMES, tubelet=1).eval()
    clip = create_transform(encoder)(open_data(f"sample:pedestrians?frames={FRAMES}")[0]["image"])
    rows: list[dict[str, Any]] = []

    def measured(what: str, run) -> Any:
        reset_peak()
        before, began = peak_mib(), time.process_time()
        out = run()
        rows.append({
            "what": what, "video": "sample:pedestrians", "encoder": args.encoder,
            "img_size": args.img_size, "frames": FRAMES, "tokens": out.shape[1],
            "cpu_seconds": round(time.process_time() - began, 1),
            "rise_mib": round(peak_mib() - before, 1), "peak_mib": round(peak_mib()),
        })  # fmt: skip
        return out

    def stream():
        state, outputs = None, []
        for first in range(0, FRAMES, args.piece):
            piece = clip[None, :, first : first + args.piece]
            out, state = encoder.forward_stream(
                encoder.embed(piece, first=first, frames=FRAMES), state
            )
            outputs.append(out)
        return torch.cat(outputs, 1)

    with torch.no_grad():
        encoder.forward_tokens(encoder.embed(clip[None, :, :2]))  # compiles
        if part == "both":
            measured("one scan, both directions", lambda: encoder.forward_features(clip[None]))
            return rows
        streamed = measured("a stream, forward", stream)
        whole = measured(
            "one scan, forward", lambda: encoder.forward_tokens(encoder.embed(clip[None]))
        )
    difference = ((streamed - whole).abs() / (1 + whole.abs())).max().item()
    rows[0] |= {"piece": args.piece, "largest_difference": f"{difference:.1e}"}
    return rows


def overfit(epochs: int, threads: int, root: Path) -> list[dict[str, Any]]:
    """Train and test on the same clips; return the row."""
    from vim_ssl.data import open_data
    from vim_ssl.downstream import video

    data, clips = open_data("sample:carphone?frames=120"), 0
    for item in data:
        (frames,) = item["image"].clips()
        for i in range(len(frames) // CLIP * CLIP):
            for split in ("train", "test"):
                folder = root / split / data.classes[item["label"]] / f"{i // CLIP:02}"
                folder.mkdir(parents=True, exist_ok=True)
                frames[i].crop(SQUARE).save(folder / f"{i:03}.png")
        clips += len(frames) // CLIP
    began = time.process_time()
    # Crop to about the size at which clips are tested: other sizes would change the contrast.
    metrics = video.run(video.Config(
        encoder=LEARNER, data=f"video:{root}?frames={CLIP}", crop_scale=(0.7, 0.9), hflip=0.0,
        epochs=epochs, warmup_epochs=2, batch_size=10, base_lr=1e-3, lr_reference_batch=10,
        layer_decay=None, threads=threads, trackers=("none",), output=str(root / "run"),
    ))  # fmt: skip
    return [{
        "what": "clips learned by heart", "video": "sample:carphone", "encoder": LEARNER,
        "img_size": 64, "frames": CLIP, "clips": clips, "epochs": epochs, "top1": metrics["top1"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }]  # fmt: skip


def measure(part: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a part in this process; return the rows."""
    import torch

    torch.set_num_threads(args.threads)
    if part != "overfit":
        return encode(part, args)
    with tempfile.TemporaryDirectory() as root:
        return overfit(args.epochs, args.threads, Path(root))


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--only", nargs="+", default=PARTS, choices=PARTS, help="parts to run")
    add("--encoder", default="vim_mini_patch8_96.offline_rgb", help="image encoder")
    add("--img-size", type=int, default=32, help="side of a frame in pixels")
    add("--piece", type=int, default=15, help="frames per piece of the stream")
    add("--epochs", type=int, default=12, help="epochs of overfit")
    add("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    good = True
    for part in args.only:
        rows = [row | {"threads": args.threads} for row in run_apart(measure, part, args)]
        append_rows(args.out / FILE, COLUMNS, [origin() | row for row in rows])
        for row in rows:
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            good &= float(row.get("largest_difference", 0)) <= 1e-5 and row.get("top1", 100) >= 99
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
