"""Cost of a training step of each objective on one batch, and the encoder's part of the cost.

    python benchmarks/objectives.py                     # Vim-S, 196 tokens, minutes on a CPU

Forward and backward, without an optimiser, on random images. The objectives take turns; the median
of the rounds counts. `mae` and `distill` mask 75 %, `simmim` 60 %; decoders are those of the paper
presets. `distill` is its own teacher. Rows are appended to results/objectives.csv, or to --out.
"""

import statistics
import time

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl import load_encoder
from vim_ssl.objectives.ar import AutoRegressive
from vim_ssl.objectives.distill import Distill
from vim_ssl.objectives.mae import MAE
from vim_ssl.objectives.masking import RandomMask, visible_ids
from vim_ssl.objectives.simmim import SimMIM

COLUMNS = (*ORIGIN, "device", "threads", "encoder", "batch", "what", "seconds", "of_simmim")
SIZE = 224


def objectives(name: str, batch: int, device: str) -> dict:
    """Name -> a function that runs one forward and backward pass."""

    def encoder(**args):
        return load_encoder(name, device=device, **args).train()

    masks = {}
    for ratio in (0.6, 0.75):
        draw = RandomMask(load_encoder(name).grid_size, ratio)
        masks[ratio] = torch.stack([draw() for _ in range(batch)]).to(device)
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    models = {
        "mae": (MAE(encoder()), 0.75),
        "simmim": (SimMIM(encoder(use_mask_token=True)), 0.6),
        "ar": (AutoRegressive(encoder(directions="forward"), cluster=2), 0.75),
        "distill": (Distill(encoder(use_mask_token=True)), 0.75),
    }

    def step(model, ratio):
        def run():
            model.zero_grad()
            model({"image": images, "mask": masks[ratio]}).loss_sum.backward()

        return run

    steps = {key: step(model.to(device), ratio) for key, (model, ratio) in models.items()}
    alone = encoder()
    tokens = alone.embed(images).detach()

    def read(keep):
        def run():
            alone.zero_grad()
            alone.forward_tokens(tokens, ids_keep=keep).sum().backward()

        return run

    steps["encoder, visible tokens"] = read(visible_ids(masks[0.75]))
    steps["encoder, all tokens"] = read(None)
    return steps


def main() -> None:
    parser = results_parser(__doc__, "objectives.csv")
    add = parser.add_argument
    add("--encoder", default="vim_small_patch16_224", help="preset of 224 px")
    add("--batch", type=int, default=4, help="images")
    add("--rounds", type=int, default=5, help="timed steps of each objective")
    add("--threads", type=int, default=2, help="of torch")
    add("--only", default="", help="measurements whose name begins with this, such as encoder")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = objectives(args.encoder, args.batch, device)
    steps = {what: run for what, run in steps.items() if what.startswith(args.only)}
    seconds: dict[str, list[float]] = {what: [] for what in steps}
    for turn in range(args.rounds + 1):  # the first warms up
        for what, run in steps.items():
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[what].append(time.perf_counter() - began)
    median = {what: statistics.median(times) for what, times in seconds.items()}
    rows = []
    for what, value in median.items():
        against = "encoder, all tokens" if what.startswith("encoder") else "simmim"
        ratio = value / median.get(against, float("nan"))
        print(f"{what:26} {value:8.3f} s   {1 / ratio:5.2f} x as fast as {against}", flush=True)
        rows.append({
            "device": device, "threads": args.threads, "encoder": args.encoder,
            "batch": args.batch, "what": what, "seconds": round(value, 4),
            "of_simmim": "" if what.startswith("encoder") else round(ratio, 4),
        })  # fmt: skip
    append_rows(args.out / "objectives.csv", COLUMNS, [origin() | row for row in rows])


if __name__ == "__main__":
    main()
