"""Pieces of a source, and the parts that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol, Self

import blake3
import pyarrow as pa

from forebay.dataset.schema import Schema
from forebay_wire.errors import InvalidRequest

MAX_PARTS = 10_000
"""Of one source: what is larger gets larger parts."""


class Block(NamedTuple):
    """Rows in order, a few MiB of them."""

    batch: pa.RecordBatch
    done_bytes: int
    """How much of its piece has been read with them, for a progress bar."""


@dataclass(frozen=True)
class Options:
    """What a format does not tell of itself."""

    types: Mapping[str, Any] = field(default_factory=dict)
    """Column to type (``"float32"``, ``"string"``, …) where the inferred one is not wanted."""
    delimiter: str = ","
    """Between the fields of a CSV file."""
    has_header: bool = True
    """Whether a CSV file begins with the names of its columns."""

    def schema(self, found: pa.Schema) -> Schema:
        """The schema of data that was inferred as *found*: :attr:`types` wins."""
        inferred = Schema.from_arrow(found)
        self.check_names(inferred.names)
        wanted = Schema.of(self.types) if self.types else None
        return Schema(
            tuple(
                column if wanted is None or column.name not in self.types else wanted[column.name]
                for column in inferred.columns
            )
        )

    def check_names(self, found: Sequence[str]) -> None:
        """InvalidRequest if a type is given for another column than those *found*."""
        unknown = self.types.keys() - set(found)
        if unknown:
            raise InvalidRequest(
                f"a type is given for {', '.join(sorted(unknown))}; the columns are "
                f"{', '.join(found)}"
            )


class Piece(Protocol):
    """A file, or a range of one, that can be read by itself; picklable."""

    @property
    def name(self) -> str:
        """For people: path, and which range of it."""
        ...

    @property
    def num_bytes(self) -> int:
        """Roughly, of the file."""
        ...

    @property
    def stamp(self) -> str:
        """Changes when the file does."""
        ...

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        """The rows in order; of *schema*, or if that is None as they come.

        SchemaMismatch naming column and row, InvalidRequest for a damaged file, IntegrityError
        where the format has a sum that does not fit.
        """
        ...


@dataclass(frozen=True)
class Part:
    """A run of pieces that is read, sealed and counted as one."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True)
class Source:
    """What is to be imported: its format, and its pieces in order."""

    kind: str
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the format says of all rows, such as the names of classes."""

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def can_travel(self) -> bool:
        """Whether the pieces can be read by other processes."""
        return all(getattr(piece, "can_travel", True) for piece in self.pieces)

    def schema(self, options: Options) -> Schema:
        """Of the first rows, or where the format tells nothing, of all. InvalidRequest if there are
        none."""
        of_all = getattr(self.pieces[0], "schema_of", None) if self.pieces else None
        if of_all is not None:
            found: Schema = of_all(self.pieces, options)
            return found
        for block in chain.from_iterable(piece.read(None, options) for piece in self.pieces):
            return options.schema(block.batch.schema)
        raise InvalidRequest("there are no rows to import, so no columns either")

    def parts(self, part_bytes: int) -> list[Part]:
        """Runs of pieces of about *part_bytes*: the same for the same pieces."""
        least = max(part_bytes, self.num_bytes // MAX_PARTS)
        runs: list[list[Piece]] = []
        filled = least
        for piece in self.pieces:
            if filled >= least:
                runs.append([])
                filled = 0
            runs[-1].append(piece)
            filled += piece.num_bytes
        return [Part(f"part-{number:06d}", tuple(run)) for number, run in enumerate(runs)]

    def digest(self, *also: str) -> str:
        """Changes with any piece, its file, and *also*: what names an import that can be resumed.

        Empty if a piece does not tell whether it changed.
        """
        if not all(piece.stamp for piece in self.pieces):
            return ""
        hasher = blake3.blake3()
        for piece in self.pieces:
            hasher.update(f"{piece.name}\0{piece.num_bytes}\0{piece.stamp}\n".encode())
        hasher.update("\0".join([self.kind, *also]).encode())
        return hasher.hexdigest()[:32]

    @classmethod
    def of(cls, kind: str, pieces: Sequence[Piece], **metadata: Any) -> Self:
        return cls(kind, tuple(pieces), metadata)
