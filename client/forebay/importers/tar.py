"""WebDataset: tar files of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from forebay.dataset.schema import Schema
from forebay.dataset.tar_layout import columns_of, image_hint, samples
from forebay.importers.files import WholeFile, open_file
from forebay.importers.piece import Block, Options
from forebay.importers.samples import blocks


@dataclass(frozen=True)
class TarPiece(WholeFile):
    """A tar file, compressed or not."""

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        kinds = options.types.items()
        raw = frozenset(name for name, kind in kinds if kind in ("binary", "image"))
        text = frozenset(name for name, kind in kinds if kind == "string")
        if schema is not None:
            raw, text = schema.of_kind("binary"), schema.of_kind("string")
        with open_file(self.file.path) as file:
            decode = partial(columns_of, raw=raw, text=text, where=self.name)
            found = (
                (sample.key, decode(sample), sample.stop) for sample in samples(file, self.name)
            )
            yield from blocks(found, schema, options, self.name, image_hint)
