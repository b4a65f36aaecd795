"""The data configuration of an encoder: size, mean, std, crop and bands."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Configured(Protocol):
    """What has a ``data_config``, such as an encoder."""

    @property
    def data_config(self) -> Mapping[str, Any]: ...


IMAGENET_DATA: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "bands": ("R", "G", "B"),
}
MNIST_DATA: dict[str, Any] = {"mean": (0.1307,), "std": (0.3081,), "crop_pct": 1.0}


def complete_data_config(given: dict | None, in_chans: int, img_size: tuple[int, int]) -> dict:
    """Complete the caller's data config; mean, std and bands need one entry per channel."""
    config = dict(IMAGENET_DATA, input_size=(in_chans, *img_size))
    if in_chans != 3:
        config["mean"] = (sum(IMAGENET_DATA["mean"]) / 3,) * in_chans
        config["std"] = (sum(IMAGENET_DATA["std"]) / 3,) * in_chans
        config["bands"] = ("L",) if in_chans == 1 else tuple(f"band{i}" for i in range(in_chans))
    for key, value in (given or {}).items():
        if key not in config:
            raise ValueError(f"data_config has no {key!r}; it has {', '.join(config)}.")
        config[key] = tuple(value) if isinstance(value, list | tuple) else value
    for key in ("mean", "std", "bands"):
        if len(config[key]) != in_chans:
            raise ValueError(f"data_config[{key!r}] has {len(config[key])} entries; "
                             f"in_chans is {in_chans}.")  # fmt: skip
    return config


def timm_cfg(data_config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The ``pretrained_cfg`` of an encoder, by which timm knows its input and its first and last
    layer. timm has no field for bands."""
    data = {key: value for key, value in data_config.items() if key != "bands"}
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return data | {"num_classes": num_classes} | layers


_COLOURS = {
    "R": "R", "RED": "R", "B04": "R", "G": "G", "GREEN": "G", "B03": "G", "B": "B", "BLUE": "B",
    "B02": "B",
}  # fmt: skip


def colour_of(band: str) -> str:
    """Return "R", "G" or "B" for a band's name that means this colour, else ""."""
    return _COLOURS.get(band.upper(), "")


def band_positions(known: Sequence[str], requested: Sequence[str]) -> list[int | None] | None:
    """The position of each requested band among the known ones, None for an unknown band. Return
    None instead of the list if all are unknown."""
    names, others = (
        [_COLOURS.get(name.upper(), name.upper()) for name in bands] for bands in (known, requested)
    )
    positions = [names.index(name) if name in names else None for name in others]
    return positions if any(position is not None for position in positions) else None


def band_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the encoder's band names. Default: ("L",) for one channel, ("R", "G", "B") for
    three, otherwise ()."""
    given = (config.get("data_config") or {}).get("bands")
    return tuple(given or {1: ("L",), 3: ("R", "G", "B")}.get(config["in_chans"], ()))


def adapt_data(
    data: Mapping[str, Any], chans: int, bands: Sequence[str] | None = None
) -> dict[str, Any]:
    """Adapt mean and std to other channels in the same way as `adapt_patch_embed`."""
    adapted = dict(data)
    positions = band_positions(data.get("bands", ()), bands or ())
    for key in ("mean", "std"):
        if key in data:
            known = data[key]
            one = sum(known) / len(known)
            if positions:
                adapted[key] = tuple(one if i is None else known[i] for i in positions)
            elif chans == 1:
                adapted[key] = (one,)
            else:
                adapted[key] = tuple(known[i % len(known)] for i in range(chans))
    adapted["bands"] = tuple(bands or ()) or {1: ("L",), 3: ("R", "G", "B")}.get(
        chans, tuple(f"band{i}" for i in range(chans))
    )
    return adapted


def data_config_of(encoder_or_config: Any) -> Mapping[str, Any]:
    config = getattr(encoder_or_config, "data_config", encoder_or_config)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"Expected a data_config mapping or an encoder that has one, got "
            f"{type(encoder_or_config).__name__}."
        )
    if missing := {"input_size", "mean", "std"} - set(config):
        raise ValueError(f"data_config has no {', '.join(sorted(missing))}.")
    return config
