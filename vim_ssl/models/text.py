"""Text encoders for pretraining from captions; see `tokenizers` for their inputs.

>>> tokenizer = train_bpe(captions, vocab_size=8192)
>>> tokens = tokenizer(["a dog", "two cats on a mat"])                          # (2, 77)
>>> TextEncoder(tokenizer.vocab_size, eos_id=tokenizer.eos_id)(tokens)          # (2, 512)

A caption becomes ``start, its tokens, end, padding``. The encoders ignore everything after the
first end token, regardless of the padding's id.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vim_ssl.models.tokenizers import CONTEXT_LENGTH, import_transformers, load_from_hub


class TextEncoder(nn.Module):
    """A causal transformer whose output is its state at the first end-of-text token.

    Args:
        vocab_size, eos_id, context_length: those of the tokenizer.
        width, depth, heads: width, number and heads of the blocks; by default as in CLIP's ViT-B.
        dropout: dropout on attention weights and residual branches; CLIP has none.
    Raises: ValueError if the width is not divisible by the heads, for a depth of 0 (the output
        would not depend on the caption), and for a dropout outside [0, 1).
    Reference: CLIP, arXiv:2103.00020, section 2.4. (CLIP locates the end with argmax, as the
        largest id; other vocabularies do not guarantee this.)
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        eos_id: int,
        context_length: int = CONTEXT_LENGTH,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        dropout: float = 0.0,
    ):
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads.")
        if depth < 1 or not 0 <= dropout < 1:
            raise ValueError(f"depth {depth} must be 1 or more, dropout {dropout} in [0, 1).")
        self.config = {
            "vocab_size": vocab_size, "eos_id": eos_id, "context_length": context_length,
            "width": width, "depth": depth, "heads": heads, "dropout": dropout,
        }  # fmt: skip
        self.eos_id, self.context_length, self.num_features = eos_id, context_length, width
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, context_length, width))
        self.layers = nn.ModuleList(_Block(width, heads, depth, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l) int64, l up to context_length -> (b, width).

        Raises: ValueError for longer rows.
        """
        if tokens.shape[1] > self.context_length:
            raise ValueError(
                f"captions have {tokens.shape[1]} tokens; expected at most {self.context_length}. "
                "Use the tokenizer that the text encoder was trained with."
            )
        ends = first_end(tokens, self.eos_id)  # (b,)
        # Attention is causal, so tokens after the last end are not needed. (On a GPU, computing
        # that index would require a synchronisation.)
        if tokens.device.type == "cpu" and len(tokens):
            tokens = tokens[:, : int(ends.max()) + 1]
        x = self.token_embed(tokens) + self.pos_embed[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)  # (b, l, width)
        return x[torch.arange(len(x), device=x.device), ends]


class _Block(nn.Module):
    """Pre-norm causal attention, then an MLP."""

    def __init__(self, width: int, heads: int, depth: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, 4 * width)
        # CLIP's initialisation: residual branches shrink with the number of blocks.
        branch = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.proj.weight, std=branch)
        nn.init.normal_(self.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.fc2.weight, std=branch)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)  # (b, h, l, d)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.mlp(self.norm2(x)), p)


class HubText(nn.Module):
    """A text model of transformers, pooled by the mean of its last states up to the first end.

    Args:
        model: model from `AutoModel`.
        name: its Hub id or folder.
        eos_id: end token of the tokenizer.
    """

    def __init__(self, model: nn.Module, name: str, eos_id: int):
        super().__init__()
        self.model, self.eos_id = model, eos_id
        settings: Any = model.config
        self.num_features = settings.hidden_size
        self.config = {"hf": name, "eos_id": eos_id, "model": settings.to_dict()}
        if (pooler := getattr(model, "pooler", None)) is not None:
            pooler.requires_grad_(False)  # unused, so it has no gradient

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l) int64 -> (b, hidden_size)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        keep = (positions <= first_end(tokens, self.eos_id)[:, None]).long()  # 1 = attended
        states = self.model(input_ids=tokens, attention_mask=keep).last_hidden_state
        weight = keep.to(states.dtype)[..., None]
        return (states * weight).sum(1) / weight.sum(1)


def load_hub_text(name: str, eos_id: int) -> HubText:
    """Load the pretrained model NAME from the Hub or a local folder.

    Raises: ImportError without transformers; OSError as in `load_from_hub`.
    """
    return HubText(load_from_hub("AutoModel", name), name, eos_id)


def build_text(config: dict[str, Any]) -> TextEncoder | HubText:
    """Build an untrained text encoder with this ``config``, to load weights into."""
    if "hf" not in config:
        return TextEncoder(**config)
    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(**config["model"])
    return HubText(transformers.AutoModel.from_config(settings), config["hf"], config["eos_id"])


def first_end(tokens: Tensor, eos_id: int) -> Tensor:
    """(b, l) -> (b,) int64: index of each row's first end token, or of its last token if none."""
    ends = tokens == eos_id
    ends[:, -1] = True
    return ends.int().argmax(1)
