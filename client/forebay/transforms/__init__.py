"""Ready-made transforms: what is done to columns of a batch on its way to the trainer.

Each function returns a ``transform=`` for loaders, or an element of a list of them. It makes a
batch (a dict) of a batch, can be pickled and used by several threads at once. What draws random
numbers draws the same ones for the same sample on any ranks, workers and batch sizes.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401 - first, so that its absence is said once and clearly
except ModuleNotFoundError as _error:
    raise ImportError("forebay.transforms needs PyTorch: pip install 'forebay[torch]'") from _error

from forebay.dataset.images import decode_images
from forebay.dataset.transforms import per_sample
from forebay.transforms.audio import decode_audio
from forebay.transforms.pictures import (
    jitter_colors,
    random_crop,
    random_flip,
    random_resized_crop,
    resize,
)
from forebay.transforms.scaling import normalize, standardize
from forebay.transforms.text import STOP_WORDS, clean_text
from forebay.transforms.tokens import tokenize
from forebay.transforms.words import count_words, hash_words, vocabulary

__all__ = [
    "STOP_WORDS",
    "clean_text",
    "count_words",
    "decode_audio",
    "decode_images",
    "hash_words",
    "jitter_colors",
    "normalize",
    "per_sample",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "resize",
    "standardize",
    "tokenize",
    "vocabulary",
]
