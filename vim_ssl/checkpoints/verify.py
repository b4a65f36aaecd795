"""`vim-ssl verify`: describe a checkpoint and check every key, every value and a forward pass."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vim_ssl.checkpoints import files as checkpoint_files
from vim_ssl.checkpoints.adapt import adapt_state, compare_keys, grid_of
from vim_ssl.checkpoints.files import Stored
from vim_ssl.checkpoints.loading import DEFAULTS, config_of, encoder_class, find_file
from vim_ssl.checkpoints.released import RELEASED_FILES
from vim_ssl.checkpoints.timm_models import is_timm, load_timm, parse_timm, timm_settings
from vim_ssl.models.presets import PRESETS
from vim_ssl.models.timm_encoder import TimmEncoder
from vim_ssl.models.video import VideoEncoder


@dataclass
class Report:
    """Description of a checkpoint and its problems; ``str(report)`` is the printed text."""

    source: str
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def loads(self) -> bool:
        """True if every key matches, every value is a finite number, and a forward pass works."""
        return not self.problems

    def __str__(self) -> str:
        width = max(map(len, self.facts), default=0)
        lines = [self.source, *(f"  {name:<{width}}  {fact}" for name, fact in self.facts.items())]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*lines, "loads completely" if self.loads else "does NOT load completely"])


def verify(source: str | os.PathLike, **layout: Any) -> Report:
    """Describe a checkpoint, and check every key, every value and one forward pass.

    Args:
        source: a path, a Hub id or timm:NAME, as in `load_encoder`; the weights and their EMA copy
            are both checked.
        layout: ``img_size`` and ``stride``, for a file that does not store them; not for timm's.
    Returns: a report that lists the file's problems; they are not raised.
    """
    report = Report(str(source))
    if is_timm(source):
        return _verify_timm(report)
    try:
        folder, name = find_file(source)
        stored = checkpoint_files.read(folder, name, ema=False)
        copies = {"weights": stored}
        if stored.has_ema:
            copies["EMA copy"] = checkpoint_files.read(folder, name, ema=True)
        config, report.notes = config_of(stored, layout)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    if "timm" in config:
        report.facts |= _facts(
            f"vim_ssl file of timm's {config['timm']}", stored.state, config["num_classes"]
        )
    else:
        _describe(report, stored, config)
    for which, copy in copies.items():
        _check_copy(report, which, copy, config)
    return report


def _facts(kind: str, state: Mapping[str, Tensor], classes: int) -> dict[str, str]:
    return {
        "kind": kind,
        "parameters": f"{sum(tensor.numel() for tensor in state.values()):,}",
        "classes": str(classes or "none: features only"),
    }


def _verify_timm(report: Report) -> Report:
    """Load ``timm:NAME…``, whose keys timm checks, and encode once."""
    try:
        classes = timm_settings(report.source)["num_classes"]
        encoder, _ = load_timm(report.source, {}, classes)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return report
    kind = f"a {type(encoder.model).__name__} of timm"
    report.facts = _facts(kind, encoder.state_dict(), classes)
    parsed = parse_timm(report.source)
    if not (parsed.pretrained or parsed.file):
        report.notes.append("the weights are fresh; give ?pretrained or ?file=PATH to check some")
    report.problems += _try(report, "weights", encoder)
    return report


def _describe(report: Report, stored: Stored, config: Mapping[str, Any]) -> None:
    ours = stored.config is not None
    size, (rows, columns) = grid_of(config)
    averaged = config["divide_out"] or config["norm_after_scan"]
    guessed = any("divide_out" in note for note in report.notes)
    report.facts |= {
        "kind": "vim_ssl file" if ours else "Vim checkpoint in the format of the original code",
        "model name": stored.model_name or ("given by its config" if ours else "none stored"),
        "architecture": f"{_preset_of(config) or 'no preset'}: embed_dim {config['embed_dim']}, "
        f"depth {config['depth']}, d_state {config['d_state']}, patch {config['patch_size']}, "
        f"stride {config['stride'] or config['patch_size']}, channels {config['in_chans']}, "
        f"directions {config['directions']}"
        + (" with one convolution" if config["shared_conv"] else ""),
        "parameters": f"{sum(tensor.numel() for tensor in stored.state.values()):,}",
        "classes": str(config["num_classes"] or "none: features only"),
        "directions' sum": ("divided by 2" if averaged else "not divided")
        + (", ASSUMED" if guessed else ", as its name or config says"),
        "positions": f"{rows}x{columns} patches of {size[0]}x{size[1]} px, class token "
        f"{config['cls_position']}"
        if config["use_pos_embed"]
        else f"no table; class token {config['cls_position']}",
        "EMA copy": "yes: load_encoder(…, ema=True)" if stored.has_ema else "none",
    }
    if "frames" in config:
        report.facts["clips"] = f"{config['frames']} frames, {config['tubelet']} per tubelet"
    if stored.made_by:
        hidden = ("classes", "trainings")
        made = {key: value for key, value in stored.made_by.items() if key not in hidden}
        report.facts["made by"] = json.dumps(made)
    if stored.path.name in RELEASED_FILES:
        model, top1 = RELEASED_FILES[stored.path.name]
        report.facts["released as"] = f"{model}, top-1 {top1} % on ImageNet-1k as published"


def _check_copy(report: Report, which: str, stored: Stored, config: dict[str, Any]) -> None:
    try:
        if "timm" in config:
            encoder: Any = TimmEncoder(**config)
            state = dict(stored.state)
        else:
            encoder = encoder_class(config)(**(config | {"scan_backend": "auto"}))
            state = adapt_state(stored.path, stored.state, config, encoder)
    except ValueError as error:
        report.problems.append(f"{which}: {error}")
        return
    kinds = zip(("missing", "unexpected", "wrong shape"), compare_keys(encoder, state), strict=True)
    wrong = [f"{which}: {kind}: {key}" for kind, keys in kinds for key in keys]
    wrong += [
        f"{which}: non-finite values: {key}"
        for key, tensor in state.items()
        if not torch.isfinite(tensor).all()
    ]
    wrong += [
        f"{which}: number type {state[key].dtype}: {key}"
        for key, tensor in encoder.state_dict().items()
        if key in state and state[key].is_floating_point() != tensor.is_floating_point()
    ]
    if not wrong:
        encoder.load_state_dict(state)
        wrong = _try(report, which, encoder)
    report.problems += wrong


def _try(report: Report, which: str, encoder: Any) -> list[str]:
    """Encode random values once; return the problems."""
    shape = list(encoder.data_config["input_size"])
    if isinstance(encoder, VideoEncoder):
        shape.insert(1, encoder.frames)
    with torch.inference_mode():
        out = encoder.eval()(torch.randn(1, *shape))
    if not torch.isfinite(out).all():
        return [f"{which}: the output on random input is not finite"]
    report.facts[f"{which} tried"] = f"{tuple(out.shape)} from {(1, *shape)}, finite"
    return []


def _preset_of(config: Mapping[str, Any]) -> str | None:
    """Return the preset with these shapes, regardless of its head."""
    names = ("embed_dim", "depth", "patch_size", "in_chans", "d_state", "d_conv", "expand")
    for preset, args in PRESETS.items():
        full = DEFAULTS | args
        strides = (c["stride"] or c["patch_size"] for c in (full, config))
        if len({*strides}) == 1 and all(full[name] == config[name] for name in names):
            return preset
    return None


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Return 0 if the checkpoint loads completely, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="vim-ssl verify", description="Describe a checkpoint and check that it loads."
    )
    parser.add_argument("file", help="a checkpoint, a run directory, a Hub id or timm:NAME")
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="PX",
        help="image side, or height and width, of the position table, if not stored",
    )  # fmt: skip
    parser.add_argument("--stride", type=int, help="patch stride in pixels, if not stored")
    args = parser.parse_args(argv)
    if args.img_size and len(args.img_size) > 2:
        parser.error("--img-size takes one number, or height and width")
    size = args.img_size and (args.img_size[0], args.img_size[-1])
    report = verify(args.file, img_size=size, stride=args.stride)
    print(report)
    return 0 if report.loads else 1
