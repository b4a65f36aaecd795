"""Finding images by captions and captions by images, of any number."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vim_ssl.data.images import BadImage
from vim_ssl.evaluation.extract import Readable
from vim_ssl.objectives.clip import Clip

CHUNK = 4096  # queries, and a sixteenth of the keys, compared at once: a gigabyte


@dataclass
class PairFeatures:
    """Images (n, d) and all their captions (m, d), of length 1; ``owner`` (m,) int64 says which
    image each caption belongs to. ``skipped``: images that could not be read or have none."""

    images: Tensor
    texts: Tensor
    owner: Tensor
    ids: list[str]
    captions: list[str]
    skipped: list[str]


class _Pairs(Readable):
    """Images with all their captions; what is no pair becomes its error's text."""

    def __getitem__(self, index: int):
        try:
            captions = self.data.captions(index)
            if not captions:
                return f"{self.data.ids[index]}: it has no caption"
            return self.transform(self.data[index]["image"]), captions, self.data.ids[index]
        except BadImage as bad:
            return str(bad)


@torch.no_grad()
def embed_pairs(
    clip: Clip,
    data,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> PairFeatures:
    """The features of a data set's images and of all their captions.

    Args:
        clip: with a tokenizer; left in the mode (training or not) it comes in.
        data: map-style, with captions.
    Raises: ValueError for data without a pair.
    """
    training = clip.training
    clip.eval()
    loader = DataLoader(
        _Pairs(data, clip.transform), batch_size, num_workers=workers, collate_fn=list
    )
    images, texts, owner, ids, words, skipped = [], [], [], [], [], []  # type: ignore[var-annotated]
    for rows in loader:
        skipped += [row for row in rows if isinstance(row, str)]
        rows = [row for row in rows if not isinstance(row, str)]
        if not rows:
            continue
        pixels, captions, names = zip(*rows, strict=True)
        images.append(clip.encode_image(torch.stack(pixels).to(device)).cpu())
        for row, own in enumerate(captions, start=len(ids)):
            owner += [row] * len(own)
        flat = [caption for own in captions for caption in own]
        texts += [clip.encode_text(flat[i : i + batch_size]).cpu()
                  for i in range(0, len(flat), batch_size)]  # fmt: skip
        ids += names
        words += flat
    clip.train(training)
    if not images:
        raise ValueError(f"{data.name} holds no image with a caption: {skipped[:3]}")
    return PairFeatures(
        torch.cat(images), torch.cat(texts), torch.tensor(owner), ids, words, skipped
    )


def nearest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the keys (m, d) most similar to each query (n, d), the nearest first.

    No more than a chunk of the (n, m) similarities is ever held. With m below k, k is m.
    """
    k, wide = min(k, len(keys)), 16 * CHUNK
    found = []
    for part in queries.split(CHUNK):
        values = part.new_empty(len(part), 0)
        places = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for first in range(0, len(keys), wide):
            more = part @ keys[first : first + wide].T
            top = more.topk(min(k, more.shape[1]), dim=1)
            joined = torch.cat([values, top.values], 1)
            places = torch.cat([places, top.indices + first], 1)
            values, order = joined.topk(min(k, joined.shape[1]), dim=1)
            places = places.gather(1, order)
        found.append(places)
    return torch.cat(found)


def found_in(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Tensor]:
    """Whether each query's own match is among the k nearest, both ways: (n,) or (m,) bool.

    An image is answered by any of its captions. Keys ``image_to_text_r1``, ``text_to_image_r1`` …
    """
    texts_of = pairs.owner[nearest(pairs.images, pairs.texts, max(ks))]  # (n, k): their images
    images_of = nearest(pairs.texts, pairs.images, max(ks))  # (m, k)
    own = torch.arange(len(pairs.images))
    ways = {
        "image_to_text": texts_of == own[:, None],
        "text_to_image": images_of == pairs.owner[:, None],
    }
    return {f"{way}_r{k}": hits[:, :k].any(1) for way, hits in ways.items() for k in ks}


def recall(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """`found_in` as per cent of the queries."""
    return {name: 100 * hits.double().mean().item() for name, hits in found_in(pairs, ks).items()}
