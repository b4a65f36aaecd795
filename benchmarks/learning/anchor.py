"""Train the reference of transfer.py: timm's ViT with the size, MAE and time of `offline_rgb`.

    python benchmarks/learning/anchor.py                # an hour of one core; resumes after a kill

Images and settings are those of the preset `offline_rgb`, except for the learning rate and mask
ratio, which were best for the ViT in study.py. The cost of a step of both is measured first, in
turns, and stored in results/learning_costs.csv; the ViT trains for as many epochs as fit into the
preset's CPU time. transfer.py reads its weights from the run directory.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import study
import torch
from campaign import costs
from rows import results_parser

from vim_ssl import load_encoder, save_encoder
from vim_ssl.models.timm_encoder import TimmEncoder
from vim_ssl.recipes.mim_pretrain import Config
from vim_ssl.recipes.mim_pretrain import offline_rgb as preset

DATA, FOLDER = "offline_rgb", Path("runs/offline_vit")
VIM, VIT = "mae", "mae on ViT"
SIZE = {"embed_dim": 192, "depth": 5, "num_heads": 3}  # 2.3 M parameters; the Vim has 2.2 M


def settings(arm: str, **more) -> Config:
    return replace(preset(), **study.ARMS[arm], eval_every=1e9, trackers=("none",), **more)


def steps(arm: str, count: int) -> float:
    """CPU seconds of ``count`` steps."""
    return study.train(arm, settings(arm, max_steps=count), SIZE)[1]


def train(out: Path, folder: Path) -> float:
    """Train the ViT in ``folder``; return its epochs."""
    cost = costs(out / "learning_costs.csv", DATA, (VIM, VIT), steps, 10)
    epochs = round(preset().epochs * cost[VIM] / cost[VIT], 2)
    config = settings(VIT, epochs=epochs, output=str(folder), resume="auto")
    encoder, _ = study.train(VIT, config, SIZE)
    save_encoder(encoder, folder)
    return epochs


def load(folder: Path = FOLDER) -> TimmEncoder:
    """Load the ViT that was trained in ``folder``, in eval mode.

    Raises: FileNotFoundError with the command that trains it.
    """
    if not (folder / "encoder.json").exists():
        raise FileNotFoundError(
            f"{folder} has no encoder; train it: python benchmarks/learning/anchor.py"
        )
    return load_encoder(folder)


def main() -> int:
    parser = results_parser(__doc__, "learning_costs.csv")
    parser.add_argument("--run", type=Path, default=FOLDER, help="directory of the run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = train(args.out, args.run)
    print(f"{args.run}: {epochs} epochs; next: python benchmarks/transfer.py --encoder vit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
