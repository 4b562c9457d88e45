"""Folders of images: the first folder of each path is the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import blake3

from forebay.dataset.schema import Schema
from forebay.importers.files import File, read_file
from forebay.importers.piece import Block, Options
from forebay.importers.samples import Sample, blocks
from forebay_wire.errors import InvalidRequest

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
FILES_OF_A_PIECE: Final = 256
HINTS: Final = {"image": "image", "label": "int64", "path": "string"}


@dataclass(frozen=True)
class ImagesPiece:
    """Some files of a folder, with the numbers of their classes."""

    folder: str
    files: tuple[File, ...]
    labels: tuple[int, ...]
    """None at all: the images have no classes."""

    @property
    def name(self) -> str:
        return f"{self.files[0].path} and the {len(self.files) - 1} after it"

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def stamp(self) -> str:
        hasher = blake3.blake3()
        for file in self.files:
            hasher.update(f"{file.path}\0{file.num_bytes}\0{file.stamp}\n".encode())
        return hasher.hexdigest()[:32]

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        yield from blocks(self._samples(), schema, options, self.folder, HINTS.get)

    def _samples(self) -> Iterator[Sample]:
        done = 0
        for number, file in enumerate(self.files):
            done += file.num_bytes
            path = relative(file, self.folder)
            columns: dict[str, Any] = {"image": read_file(file.path)}
            if self.labels:
                columns["label"] = self.labels[number]
            yield path, {**columns, "path": path}, done


def relative(file: File, folder: str) -> str:
    """The path below *folder*."""
    return file.path.removeprefix(folder.rstrip("/")).lstrip("/")


def is_image(file: File) -> bool:
    return file.path.lower().endswith(SUFFIXES)


def image_pieces(files: Sequence[File], folder: str) -> tuple[list[ImagesPiece], list[str]]:
    """Pieces in the order of paths, and the names of the classes in order; none if the images lie
    in *folder* itself."""
    images = [file for file in files if is_image(file)]
    folders = [relative(file, folder).split("/")[:-1] for file in images]
    classes = sorted({path[0] for path in folders if path})
    if classes and not all(folders):
        stray = next(file for file, path in zip(images, folders, strict=True) if not path)
        raise InvalidRequest(
            f"{stray.path} lies in no folder, other images do: folders are classes here, so give "
            "it one, or import it alone"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    pieces = []
    for start in range(0, len(images), FILES_OF_A_PIECE):
        some = slice(start, start + FILES_OF_A_PIECE)
        labels = tuple(numbers[path[0]] for path in folders[some] if path)
        pieces.append(ImagesPiece(folder, tuple(images[some]), labels))
    return pieces, classes
