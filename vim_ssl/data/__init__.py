"""Data: one spec string, many sources, items as dicts.

>>> from vim_ssl.data import open_data
>>> data = open_data("photos/")             # or "hf:owner/name", "sample:mnist5k?split=test"
>>> data[0]["image"], data.labels, data.classes
"""

from vim_ssl.data.bands import band_arguments, band_statistics
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage, clean_image, decode_image
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.open import open_data
from vim_ssl.data.spec import DataSpec, parse_spec
from vim_ssl.data.split import stratified_split
from vim_ssl.data.train_test import boxed_splits, labelled_splits, masked_splits
from vim_ssl.data.transforms.image import create_transform, pretrain_transform

__all__ = [
    "BadImage",
    "DataSpec",
    "ImageData",
    "ImageStream",
    "band_arguments",
    "band_statistics",
    "boxed_splits",
    "clean_image",
    "create_transform",
    "decode_image",
    "labelled_splits",
    "masked_splits",
    "open_data",
    "parse_spec",
    "pretrain_transform",
    "stratified_split",
]
