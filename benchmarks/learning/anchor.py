"""The anchor of transfer.py: timm's ViT of the size of `offline_rgb`, under MAE for the same time.

    python benchmarks/learning/anchor.py                # an hour of one core; goes on after a cut

Images and settings are those of the preset `offline_rgb`, learning rate and mask those that suit
the ViT best in study.py. What a step of both costs is measured first, in turns, and remembered in
results/learning_costs.csv; the ViT trains for as many epochs as the preset's CPU time allows. Its
weights stay in the run, where transfer.py finds them.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from campaign import costs, fit_seconds
from rows import results_parser
from safetensors.torch import load_file, save_file
from study import ARMS
from vit import ViTEncoder, counterpart

from vim_ssl.recipes.mim_pretrain import Config, build_data, build_model, build_objective
from vim_ssl.recipes.mim_pretrain import offline_rgb as preset
from vim_ssl.training.accelerator import make_accelerator

DATA, FOLDER, WEIGHTS = "offline_rgb", Path("runs/offline_vit"), "vit.safetensors"
VIM, VIT = "mae", "mae on ViT"
SIZE = {"embed_dim": 192, "depth": 5, "num_heads": 3}  # 2.3 M parameters; the Vim has 2.2 M


def settings(arm: str, **more) -> Config:
    return replace(preset(), **ARMS[arm], eval_every=1e9, trackers=("none",), **more)


def build(arm: str, config: Config):
    """Objective and samples."""
    torch.manual_seed(config.seed)
    vim = build_model(config)
    objective = build_objective(config, vim) if arm == VIM else counterpart(vim, config, **SIZE)
    return objective, build_data(config, vim)[1]


def steps(arm: str, count: int) -> float:
    """The CPU seconds of so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(arm, max_steps=count, output=folder)
        accelerator = make_accelerator(config)
        return fit_seconds("mim_pretrain", *build(arm, config), config, accelerator)


def train(out: Path, folder: Path) -> float:
    """Train the ViT in ``folder``; returns its epochs."""
    cost = costs(out / "learning_costs.csv", DATA, (VIM, VIT), steps, 10)
    epochs = round(preset().epochs * cost[VIM] / cost[VIT], 2)
    config = settings(VIT, epochs=epochs, output=str(folder), resume="auto")
    accelerator = make_accelerator(config)
    objective, samples = build(VIT, config)
    fit_seconds("mim_pretrain", objective, samples, config, accelerator)
    save_file(objective.encoder.state_dict(), folder / WEIGHTS)
    return epochs


def load(folder: Path = FOLDER) -> ViTEncoder:
    """The ViT that was trained in ``folder``, in eval mode.

    Raises: FileNotFoundError with the command that trains it.
    """
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder / WEIGHTS} is not there; train it: python benchmarks/learning/anchor.py"
        )
    config = settings(VIT)
    encoder = counterpart(build_model(config), config, **SIZE).encoder
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()


def main() -> int:
    parser = results_parser(__doc__, "learning_costs.csv")
    parser.add_argument("--run", type=Path, default=FOLDER, help="where the run is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = train(args.out, args.run)
    print(f"{args.run}: {epochs} epochs; now python benchmarks/transfer.py --encoder vit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
