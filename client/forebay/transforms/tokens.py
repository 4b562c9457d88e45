"""Text to token ids, by Hugging Face's tokenizers, which let other threads run meanwhile."""

from __future__ import annotations

from itertools import chain
from os import PathLike
from typing import Any

import numpy as np
import torch

from forebay.dataset.lists import Lists
from forebay.dataset.ragged import Ragged
from forebay.dataset.transforms import Batch
from forebay.transforms.columns import required, texts_of
from forebay_wire.errors import InvalidRequest


class Tokenize:
    """See :func:`tokenize`. Thread-safe, picklable."""

    def __init__(
        self, column: str, into: str, tokenizer: Any, max_length: int | None, ragged: Ragged
    ) -> None:
        self.column = column
        self.into = into
        self.add_special_tokens = True
        self._ragged = ragged
        # A copy: truncation and padding are settings of the tokenizer, which is the user's.
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if max_length is not None:
            if max_length < 1:
                raise InvalidRequest(f"max_length={max_length}: at least one token")
            self._tokenizer.enable_truncation(max_length)

    def __call__(self, batch: Batch) -> Batch:
        texts = texts_of(batch, self.column, "tokenize")
        there = [text for text in texts if text is not None]
        encoded = self._tokenizer.encode_batch(there, add_special_tokens=self.add_special_tokens)
        ids = [one.ids for one in encoded]
        present = np.array([text is not None for text in texts], dtype=np.bool_)
        counts = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        values = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(counts.sum()))
        lists = Lists(values, counts).among(present)
        if self._ragged.is_flat:
            return batch | self._ragged.tensors(self.into, lists)
        parts = lists.parts(present)
        return batch | {
            self.into: [None if one is None else torch.from_numpy(one) for one in parts]
        }


def tokenize(
    column: str,
    tokenizer: Any,
    *,
    into: str = "tokens",
    max_length: int | None = None,
    ragged: str = "pad",
    pad_id: int = 0,
    add_special_tokens: bool = True,
) -> Tokenize:
    """A ``transform=`` that adds a column *into* of the int64 token ids of the text in *column*.

    *tokenizer* is a ``tokenizers.Tokenizer``, or the path of its JSON file: ``pip install
    'forebay[text]'``. At most *max_length* tokens of each text are kept, special ones included.
    *ragged* means what it means for loaders: "pad" (by *pad_id*, with ``<into>_lengths``), "nested"
    or "list". Missing texts have no tokens.
    """
    library = required("tokenizers", "text", "tokenize")
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = library.Tokenizer.from_file(str(tokenizer))
    if not isinstance(tokenizer, library.Tokenizer):
        raise InvalidRequest(
            f"tokenize({column!r}): expected a tokenizers.Tokenizer or the path of one, got "
            f"{type(tokenizer).__name__} (of a fast tokenizer of transformers: .backend_tokenizer)"
        )
    made = Tokenize(column, into, tokenizer, max_length, Ragged(ragged, pad_id))
    made.add_special_tokens = add_special_tokens
    return made
