"""Caption tokenizers: byte-level BPE trained on the captions, CLIP's, or one from the Hub."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_ssl.utils.files import atomic_write, read_object, reading
from vim_ssl.utils.optional import require

CONTEXT_LENGTH = 77  # CLIP's
SPECIAL = ("<pad>", "<bos>", "<eos>")
LONGEST_TOKEN = 50  # characters; captions are truncated to this many per token of the context


class Tokenizer:
    """Maps captions to rows of token ids. Picklable, for DataLoader workers.

    Attributes:
        name: "bpe", "clip" or "hf:NAME".
        vocab_size: all ids are below this.
        bos_id: the start token, or None.
        eos_id, pad_id: the end token and the padding after it.
        context_length: length of every row of ids.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    _model: Any  # has ``decode``, from ids to text

    def __init__(self, context_length: int = CONTEXT_LENGTH):
        if context_length < 3:
            raise ValueError(
                f"context_length {context_length} has no room for a start, a token and an end; "
                "use 3 or more."
            )
        self.context_length = context_length

    def ids(self, text: str) -> list[int]:
        """Return all token ids of a text, without start and end."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids up to the first end, without start and padding."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self._model.decode([i for i in ids if i not in (self.bos_id, self.pad_id)]).strip()

    def row(self, text: str) -> tuple[list[int], bool]:
        """Return ``context_length`` ids, and True if the text was truncated."""
        text = clean(text)
        read = text[: LONGEST_TOKEN * self.context_length]
        start = [] if self.bos_id is None else [self.bos_id]
        room = self.context_length - len(start) - 1
        ids = self.ids(read)
        kept = [*start, *ids[:room], self.eos_id]
        padding = [self.pad_id] * (self.context_length - len(kept))
        return kept + padding, len(ids) > room or len(read) < len(text)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Encode n texts as (n, context_length) int64. Long texts are truncated, keeping the end
        token."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [self.row(text)[0] for text in texts]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.context_length)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, which `load_tokenizer` reads, into ``folder``."""
        record: dict[str, Any] = {"name": self.name, "context_length": self.context_length}
        text = json.dumps(record | self._stored(), ensure_ascii=False)
        atomic_write(Path(folder) / "tokenizer.json", text.encode())

    def identity(self) -> dict[str, Any]:
        """Everything that the rows depend on, as JSON."""
        sample = [self.ids(text) for text in ("A b,c 1.", "Ünïcode\u0301 ﬁ 漢字 😀")]
        ends = [self.vocab_size, self.bos_id, self.eos_id, self.pad_id]
        known = {"context_length": self.context_length, "ends": ends, "sample": sample}
        return known | self._stored()

    def _stored(self) -> dict[str, Any]:
        return {}


class BytePairs(Tokenizer):
    """Byte-level BPE, which encodes any text in any script.

    Args:
        model: model of the `tokenizers` package, as JSON.
    Raises: ImportError without `tokenizers`.
    """

    name = "bpe"
    pad_id, bos_id, eos_id = range(3)

    def __init__(self, model: str, context_length: int = CONTEXT_LENGTH):
        super().__init__(context_length)
        from tokenizers import Tokenizer as Model

        self.model = model
        self._model = Model.from_str(model)
        self._model.encode_special_tokens = True  # "<eos>" in a caption is plain text
        self.vocab_size = self._model.get_vocab_size()

    def __reduce__(self):
        return BytePairs, (self.model, self.context_length)

    def ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids if text else []

    def _stored(self) -> dict[str, Any]:
        return {"model": json.loads(self.model)}


class ClipBPE(Tokenizer):
    """CLIP's vocabulary of 49,408 tokens, from open-clip-torch.

    Raises: ImportError without open-clip-torch.
    """

    name = "clip"

    def __init__(self, context_length: int = CONTEXT_LENGTH):
        super().__init__(context_length)
        what = "Tokenizers other than 'bpe', which is trained on your captions,"
        self._model = require("open_clip.tokenizer", "clip", what).SimpleTokenizer()
        # Do not encode "<end_of_text>" in a caption as the end token, which would truncate it.
        self._model.cache.clear()
        self.vocab_size = self._model.vocab_size
        self.bos_id, self.eos_id = self._model.sot_token_id, self._model.eot_token_id
        self.pad_id = 0

    def __reduce__(self):
        return ClipBPE, (self.context_length,)

    def ids(self, text: str) -> list[int]:
        return self._model.encode(text)


class HubTokenizer(Tokenizer):
    """Any tokenizer from the Hugging Face Hub or a local folder, through transformers.

    Raises: ImportError without transformers; OSError as in `load_from_hub`; ValueError for a
        tokenizer without an end token.
    """

    def __init__(self, name: str, context_length: int = CONTEXT_LENGTH):
        super().__init__(context_length)
        self.name = f"hf:{name}"
        self._model = load_from_hub("AutoTokenizer", name)

        def first(*kinds: str) -> int | None:
            ids = (getattr(self._model, f"{kind}_token_id") for kind in kinds)
            return next((i for i in ids if i is not None), None)

        eos, bos, pad = first("eos", "sep"), first("bos", "cls"), first("pad")
        if eos is None:
            raise ValueError(f"the tokenizer {self.name} has no end-of-text token.")
        self.vocab_size = len(self._model)
        # A token that is both start and end, as in GPT-2, is used as the end, where features are
        # read.
        self.eos_id, self.bos_id = eos, None if bos == eos else bos
        self.pad_id = eos if pad is None else pad

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"vocabulary": sorted(self._model.get_vocab().items())}

    def ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False, split_special_tokens=True)


def clean(text: str) -> str:
    """Replace white space by single spaces, and lone surrogates, which UTF-8 lacks, by "?"."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def train_bpe(
    captions: Iterable[str], *, vocab_size: int = 8192, context_length: int = CONTEXT_LENGTH
) -> BytePairs:
    """Train byte-level BPE on the captions, in Unicode's NFC form and lower case; deterministic.

    Args:
        vocab_size: maximum size; few captions give fewer tokens.
    Raises: ImportError without `tokenizers`; ValueError for a vocabulary smaller than the bytes, or
        captions without a word.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(SPECIAL):
        raise ValueError(
            f"vocab_size {vocab_size} is too small for the {len(alphabet)} bytes and "
            f"{len(SPECIAL)} special tokens; use {2 * len(alphabet)} or more."
        )
    model = Model(models.BPE())
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator(filter(None, map(clean, captions)), trainer)
    # Training is over: without its threads, forked workers print no warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if model.get_vocab_size() == len(alphabet) + len(SPECIAL):
        raise ValueError("the captions to train a tokenizer on contain no words.")
    return BytePairs(model.to_str(), context_length)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer that `Tokenizer.save` wrote into ``folder``.

    Raises: FileNotFoundError if there is none.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json.")
    stored = read_object(path, "a tokenizer", "copy it again from its run")
    with reading(path, "a tokenizer", "copy it again from its run"):
        name, length = str(stored["name"]), int(stored["context_length"])
        if name == "bpe":
            return BytePairs(json.dumps(stored["model"]), length)
    return named_tokenizer(name, length)


def named_tokenizer(name: str, context_length: int = CONTEXT_LENGTH) -> Tokenizer:
    """Return the tokenizer "clip" or "hf:NAME", which needs no training.

    Raises: ImportError if its package is not installed; ValueError for another name.
    """
    if name == "clip":
        return ClipBPE(context_length)
    if name.startswith("hf:"):
        return HubTokenizer(name.removeprefix("hf:"), context_length)
    raise ValueError(f"Unknown tokenizer {name!r}; expected bpe, clip or hf:NAME.")


def import_transformers() -> Any:
    """Return the module transformers. Raises: ImportError that says what to install."""
    return require("transformers", "clip", "Tokenizers and text encoders of the Hub (hf:NAME)")


def load_from_hub(kind: str, name: str) -> Any:
    """Load NAME with transformers' class ``kind``. Raises: OSError, in one line, for a name that is
    unknown, or not available without a network."""
    maker = getattr(import_transformers(), kind)
    try:
        return maker.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"hf:{name} cannot be loaded: {' '.join(str(error).split())}") from error
