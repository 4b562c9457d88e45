"""Sounds in a column of bytes, decoded on their way to the trainer."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import torch

from forebay.dataset.ragged import lengths_of
from forebay.dataset.transforms import Batch
from forebay.transforms.columns import column_of, joined, required
from forebay_wire.errors import IntegrityError, InvalidRequest

STYLES: Final = ("list", "pad")


class DecodeAudio:
    """See :func:`decode_audio`. Thread-safe, picklable."""

    def __init__(self, column: str, mono: bool, rate: int | None, ragged: str) -> None:
        if ragged not in STYLES:
            raise InvalidRequest(f'ragged={ragged!r}: sounds come as "list" or "pad"')
        required("soundfile", "audio", "decode_audio")
        self.column = column
        self.mono = mono
        self.rate = rate
        self.ragged = ragged

    def __call__(self, batch: Batch) -> Batch:
        files = column_of(batch, self.column, "decode_audio")
        decoded = [None if data is None else self._decoded(data) for data in files]
        rates = torch.tensor([0 if one is None else one[1] for one in decoded], dtype=torch.int64)
        sounds = [None if one is None else one[0] for one in decoded]
        found = {f"{self.column}_rate": rates}
        if self.ragged == "pad":
            return batch | found | self._padded(sounds)
        return batch | found | {self.column: joined(sounds)}

    def _decoded(self, data: bytes) -> tuple[torch.Tensor, int]:
        soundfile = required("soundfile", "audio", "decode_audio")
        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, TypeError) as error:
            raise IntegrityError(
                f"a sound cannot be decoded: {error}; write the sample again, or leave it out"
            ) from error
        if self.rate is not None and rate != self.rate:
            raise InvalidRequest(
                f"decode_audio({self.column!r}): a sound of {rate} Hz where all should have "
                f"{self.rate}: resample it before it is written"
            )
        samples = samples.mean(axis=1, keepdims=True) if self.mono else samples
        return torch.from_numpy(np.ascontiguousarray(samples.T)), rate

    def _padded(self, sounds: list[torch.Tensor | None]) -> dict[str, Any]:
        channels = {len(one) for one in sounds if one is not None}
        if len(channels) > 1:
            raise InvalidRequest(
                f"decode_audio({self.column!r}): sounds of {sorted(channels)} channels do not fit "
                "one tensor: use mono=True"
            )
        lengths = [0 if one is None else one.shape[1] for one in sounds]
        shape = (len(sounds), *(channels or {1}), max(lengths, default=0))
        whole = torch.zeros(shape, dtype=torch.float32)
        for row, sound, length in zip(whole, sounds, lengths, strict=True):
            if sound is not None:
                row[:, :length] = sound
        return {self.column: whole, lengths_of(self.column): torch.tensor(lengths)}


def decode_audio(
    column: str, *, mono: bool = False, rate: int | None = None, ragged: str = "list"
) -> DecodeAudio:
    """A ``transform=`` that decodes the WAV, FLAC, OGG, … files in *column*, and adds their rates
    in Hz as ``<column>_rate``.

    Sounds are float32 tensors ``(channels, frames)`` of -1 to 1, one channel with *mono*: with
    *ragged* "list" one tensor if all of the batch are alike and else a list; with "pad" always one,
    zeros behind the shorter ones, and ``<column>_lengths`` in frames. *rate* is the one that all
    must have. By ``soundfile`` (libsndfile): ``pip install 'forebay[audio]'``. A file that cannot
    be decoded raises IntegrityError.
    """
    return DecodeAudio(column, mono, rate, ragged)
