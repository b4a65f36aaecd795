"""Small encoders of timm for tests: a vision transformer, a CNN and a Swin, with fresh weights."""

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
VIT = ("timm:vit_tiny_patch16_224", SIZE)
CNN = ("timm:resnet10t", {"channels": (8, 16, 24, 32)})
SWIN = (
    "timm:swin_tiny_patch4_window7_224",
    {"img_size": 32, "embed_dim": 8, "window_size": 4, "depths": (1, 1, 1, 1),
     "num_heads": (1, 1, 1, 1)},
)  # fmt: skip
# Of this class, with two tokens before the patches and two classifiers.
DISTILLED = ("timm:deit_tiny_distilled_patch16_224", SIZE)
REGISTERS = ("timm:vit_tiny_patch16_224", SIZE | {"reg_tokens": 2, "no_embed_class": True})
AVERAGED = ("timm:vit_tiny_patch16_224", SIZE | {"global_pool": "avg"})
POOLED = ("timm:vit_base_patch16_siglip_224", SIZE)  # attention pooling, no class token
CONVNEXT = ("timm:convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)})
EVA = ("timm:eva02_tiny_patch14_224", SIZE)  # by default the mean, with the norm after it
BEIT = ("timm:beit_base_patch16_224", SIZE)

TOKENS = {"vit": VIT, "deit": DISTILLED, "registers": REGISTERS, "avg": AVERAGED, "map": POOLED}
WHOLE = {"cnn": CNN, "swin": SWIN}
EVERY = TOKENS | WHOLE


def flags(args: dict) -> list[str]:
    """The arguments of an encoder as words of ``--model-args``."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}
    return [f"{key}={value}".replace(" ", "") for key, value in values.items()]
