"""Vision Mamba again in float64 NumPy, written from the paper and the description of the released
code, one image and one token at a time: slow, plain, and sharing nothing with `vim_ssl`.

It takes the encoder's state dict as arrays and the encoder's `config`, so that every size and
variant can be held against it. Dims: m patches, l tokens of the sequence, d = embed_dim,
e = d_inner, n = d_state.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = dict[str, Array]


def encode(
    state: State,
    config: dict,
    images: NDArray,
    *,
    ids_keep: NDArray | None = None,
    mask: NDArray | None = None,
    directions: str | None = None,
) -> Array:
    """All tokens after the final norm: (b, in_chans, h, w) -> (b, k + class tokens, d).

    Args:
        state: arrays by the released checkpoints' names.
        config: the encoder's arguments.
        ids_keep: (b, k), the patches to read.
        mask: (b, m), True = masked: the content is replaced by the mask token.
        directions: those of the encoder by default.
    """
    return np.stack(
        [
            _encode_one(
                state,
                config,
                image.astype(np.float64),
                None if ids_keep is None else ids_keep[i],
                None if mask is None else mask[i],
                directions or config["directions"],
            )
            for i, image in enumerate(images)
        ]
    )


def predict(state: State, config: dict, images: NDArray) -> Array:
    """Pooled features, through the head if the state has one."""

    def head(x):
        return x @ state["head.weight"].T + state["head.bias"] if "head.weight" in state else x

    tokens = encode(state, config, images)
    if config["global_pool"] == "max-logits":  # the head sees every patch
        return np.stack([head(_split(one, config)[1]).max(0) for one in tokens])
    return head(np.stack([_pool(one, config) for one in tokens]))


def _encode_one(state, config, image, ids_keep, mask, directions) -> Array:
    patches, grid = _patches(state, config, image)
    m = len(patches)
    cls_names = {"double": ["cls_token_head", "cls_token_tail"], "none": []}.get(
        config["cls_position"], ["cls_token"]
    )
    cls = [state[name].reshape(-1) for name in cls_names]

    if mask is not None:
        blank = state["mask_token"].reshape(-1) if config["use_mask_token"] else 0.0
        patches = np.where(mask[:, None], blank, patches)
    if "pos_embed" in state:
        rows, cls_rows = _split_table(state["pos_embed"][0], config["cls_position"])
        patches = patches + resize_table(rows, _grid(config, config["img_size"]), grid)
        cls = [token + row for token, row in zip(cls, cls_rows, strict=True)]
    angles = _angles(config, grid) if config["rope"] else np.zeros((m, patches.shape[1]))
    if ids_keep is not None:
        patches, angles = patches[ids_keep], angles[ids_keep]

    # The sequence, as a list of (kind, content, angles).
    still = np.zeros(patches.shape[1])
    sequence = [("patch", *pair) for pair in zip(patches, angles, strict=True)]
    k = len(sequence)
    for token, place in zip(cls, _cls_places(k, config["cls_position"]), strict=True):
        sequence.insert(place, ("class", token, still))
    length, count = len(sequence), config["num_registers"]
    for i in range(count):  # inserted from the left, so earlier ones have already shifted the rest
        place = (i + 1) * length // (count + 1) + i
        sequence.insert(place, ("register", state["register_tokens"][0, i], still))

    hidden = np.array([content for _, content, _ in sequence])
    turn = np.array([angle for _, _, angle in sequence])
    residual = np.zeros_like(hidden)

    def layer(i, hidden, residual, turn, directions):
        residual = residual + hidden
        normed = _rms_norm(residual, state[f"layers.{i}.norm.weight"])
        mixer = {
            name.removeprefix(f"layers.{i}.mixer."): array
            for name, array in state.items()
            if name.startswith(f"layers.{i}.mixer.")
        }
        if directions == "layer":  # one direction, whose name says nothing of the order
            mixer = {name.replace("_b", ""): array for name, array in mixer.items()}
            directions = "forward"
        return _mix(mixer, config, _rotate(normed, turn), directions), residual

    if directions == "layer":
        for i in range(0, config["depth"], 2):
            first = layer(i, hidden, residual, turn, directions)
            second = layer(i + 1, hidden[::-1], residual[::-1], turn[::-1], directions)
            hidden, residual = (a + b[::-1] for a, b in zip(first, second, strict=True))
    else:
        for i in range(config["depth"]):
            hidden, residual = layer(i, hidden, residual, turn, directions)
    out = _rms_norm(residual + hidden, state["norm_f.weight"])
    return np.array(
        [row for row, (kind, *_) in zip(out, sequence, strict=True) if kind != "register"]
    )


# ---------------------------------------------------------------- the block


def _mix(mixer: State, config: dict, hidden: Array, directions: str) -> Array:
    """One mixer: (l, d) -> (l, d)."""
    x, z = np.split(hidden @ mixer["in_proj.weight"].T, 2, axis=1)
    outputs = []
    if directions in ("both", "forward"):
        outputs.append(_scan(mixer, "", "A_log", _conv(mixer, "", x)))
    if directions in ("both", "backward"):
        if config.get("shared_conv"):  # reads what the forward convolution gives, last to first
            u = _conv(mixer, "", x)
            outputs.append(_scan(mixer, "", "A_b_log", u[::-1])[::-1])
        else:
            outputs.append(_scan(mixer, "_b", "A_b_log", _conv(mixer, "_b", x[::-1]))[::-1])
    y = sum(outputs)
    if config["norm_after_scan"]:  # always the mean of the directions
        y = y / len(outputs)
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        y = y * mixer["layernorm.weight"] + mixer["layernorm.bias"]
    elif config["divide_out"]:
        y = y / len(outputs)
    return (y * _silu(z)) @ mixer["out_proj.weight"].T


def _conv(mixer: State, suffix: str, x: Array) -> Array:
    """Causal convolution of x (l, e), first token to last, and its SiLU."""
    length, e = x.shape
    kernel = mixer[f"conv1d{suffix}.weight"][:, 0]  # (e, taps); the last tap is the token itself
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, e)), x])
    u = sum(padded[k : k + length] * kernel[:, k] for k in range(taps))
    return _silu(u + mixer[f"conv1d{suffix}.bias"])


def _scan(mixer: State, suffix: str, a_log: str, u: Array) -> Array:
    """Selective scan over u (l, e), first token to last."""
    length, e = u.shape
    A = -np.exp(mixer[a_log])  # (e, n)
    n = A.shape[1]
    projected = u @ mixer[f"x_proj{suffix}.weight"].T
    dt, B, C = np.split(projected, [projected.shape[1] - 2 * n, projected.shape[1] - n], axis=1)
    dt = np.logaddexp(0, dt @ mixer[f"dt_proj{suffix}.weight"].T + mixer[f"dt_proj{suffix}.bias"])
    state, y = np.zeros((e, n)), np.empty((length, e))
    for t in range(length):
        state = np.exp(dt[t][:, None] * A) * state + (dt[t] * u[t])[:, None] * B[t]
        y[t] = state @ C[t] + mixer[f"D{suffix}"] * u[t]
    return y


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * weight


def _rotate(x: Array, angles: Array) -> Array:
    """Turn the channel pairs (0, 1), (2, 3), … of x (l, d); a pair has one angle in (l, d)."""
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles[:, 0::2])
    return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)


# ---------------------------------------------------------------- tokens and places


def _patches(state: State, config: dict, image: Array) -> tuple[Array, tuple[int, int]]:
    """Projected patches (m, d) in raster order, and their grid."""
    size, stride = config["patch_size"], config["stride"] or config["patch_size"]
    rows, columns = _grid(config, image.shape[1:])
    weight = state["patch_embed.proj.weight"]
    weight = weight.reshape(len(weight), -1)
    cut = [
        image[:, r * stride : r * stride + size, c * stride : c * stride + size].reshape(-1)
        for r in range(rows)
        for c in range(columns)
    ]
    return np.array(cut) @ weight.T + state["patch_embed.proj.bias"], (rows, columns)


def _grid(config: dict, size: tuple[int, int]) -> tuple[int, int]:
    patch, stride = config["patch_size"], config["stride"] or config["patch_size"]
    return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1


def _cls_places(m: int, cls_position: str) -> list[int]:
    """Indices of the class tokens in the joined sequence of m patches and themselves."""
    return {"middle": [m // 2], "first": [0], "double": [0, m + 1], "none": []}[cls_position]


def _split_table(table: Array, cls_position: str) -> tuple[Array, Array]:
    """The grid's rows of a position table and the class tokens' own rows."""
    count = {"none": 0, "double": 2}.get(cls_position, 1)
    places = _cls_places(len(table) - count, cls_position)
    return np.delete(table, places, axis=0), table[places]


def _angles(config: dict, grid: tuple[int, int]) -> Array:
    """Rotation of every patch, (m, d): first half of the channels by row, second by column, both
    counted in patches."""
    d = config["embed_dim"]
    bands = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    angles = [
        np.repeat(np.concatenate([r * bands, c * bands]), 2)
        for r in range(grid[0])
        for c in range(grid[1])
    ]
    return np.array(angles)


def resize_table(rows: Array, old: tuple[int, int], new: tuple[int, int]) -> Array:
    """Bicubic resampling, antialiased, of a grid: (old patches, d) -> (new patches, d)."""
    table = rows.reshape(*old, -1)
    for axis in (0, 1):
        if old[axis] != new[axis]:
            weights = _cubic_weights(old[axis], new[axis])
            table = np.moveaxis(np.tensordot(weights, table, axes=(1, axis)), 0, axis)
    return table.reshape(new[0] * new[1], -1)


def _cubic_weights(old: int, new: int) -> Array:
    """(new, old): Keys' kernel with a = -1/2, widened when shrinking, cut and renormalised at the
    borders, pixel centres at half integers. With the same size it would be the identity."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / width
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def _split(tokens: Array, config: dict) -> tuple[Array, Array]:
    """(k + class tokens, d) -> the mean of the class tokens, 0 without any; the patches (k, d)."""
    count = {"none": 0, "double": 2}.get(config["cls_position"], 1)
    places = _cls_places(len(tokens) - count, config["cls_position"])
    return tokens[places].sum(0) / max(count, 1), np.delete(tokens, places, axis=0)


def _pool(tokens: Array, config: dict) -> Array:
    """Read (k + class tokens, d) out as ``global_pool`` says."""
    token, patches = _split(tokens, config)
    readouts = {
        "token": [token], "avg": [patches.mean(0)], "token+avg": [token, patches.mean(0)],
        "max": [patches.max(0)],
    }  # fmt: skip
    return np.concatenate(readouts[config["global_pool"]])
