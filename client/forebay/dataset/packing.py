"""Documents packed into windows of equally many tokens, for loaders to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from forebay.dataset.dataset import Dataset
from forebay.dataset.mixture import Mixture
from forebay_wire.errors import InvalidRequest
from forebay_wire.packing import Packing

if TYPE_CHECKING:
    from forebay.dataset.reading import OrderOptions, Reading

MAX_GROUP_SAMPLES = 1 << 20


class Packed:
    """Lists of tokens, end to end, in windows of *length*: what a loader's batches consist of.

        packed = forebay.Packed(dataset, column="tokens", length=2048, separator=2)
        loader = forebay.DataLoader(packed, global_batch_size=64, shuffle="full", seed=0)

    A batch has, each of the shape ``(rows, length)``: the *column* itself; ``_documents``, int32:
    which document of the window a token belongs to, from 0, and -1 for padding; ``_positions``,
    int32: from 0 on in each document's piece; ``_mask``: False for padding; and the columns that
    are packed *beside* it (labels, a loss mask). With ``include_ids``
    also the row that a token is from (``_ids``, of a mixture ``_dataset``), -1 for padding.

    Windows are packed from groups of *group_samples* consecutive samples of the order, and never
    from two groups: so a state names a group and a token in it, and goes on there at once, on any
    ranks, workers, batch size, and (but for "best") any *length*. Immutable, picklable,
    thread-safe.
    """

    def __init__(
        self,
        samples: Dataset | Mixture,
        column: str = "tokens",
        length: int = 2048,
        *,
        group_samples: int = 1024,
        separator: int | None = None,
        pad: int = 0,
        fit: str = "cut",
        tail: str = "pad",
        beside: Mapping[str, float] | None = None,
    ) -> None:
        """*separator* is put after each document, as a token of it.

        *fit*: "cut" fills every window, documents are cut where it ends and go on in the next;
        "whole" cuts only those that are longer than a window, and pads with *pad*; so does "best",
        which puts together those documents of a group that fill windows best (best-fit decreasing),
        and pads far less. *tail*: what becomes of the last window of a group (of "best": the
        emptiest) if it is not full, "pad" or "drop" (whose tokens are not read in this epoch).
        Empty documents are left out.

        *beside*: further columns of lists, each as long as that of tokens in the same row, and what
        stands in them at separators and padding: ``{"labels": -100, "loss_mask": 0}``.
        """
        if not isinstance(samples, Dataset | Mixture):
            raise InvalidRequest(
                "packing takes a dataset from client.dataset(...) or a forebay.Mixture, not "
                f"{type(samples).__name__}"
            )
        if not 1 <= group_samples <= MAX_GROUP_SAMPLES:
            raise InvalidRequest(f"group_samples={group_samples}: 1 to {MAX_GROUP_SAMPLES}")
        self.samples = samples
        self.column = column
        self.packing = Packing(length, fit, tail)  # type: ignore[arg-type] # it checks both
        self.group_samples = group_samples
        self.separator = separator
        self.pad = pad
        self.beside = dict(beside or {})
        """Columns that are packed like the tokens, and what stands in them where none are."""
        if column in self.beside:
            raise InvalidRequest(f"column {column!r} cannot be packed beside itself")

    @property
    def packed_columns(self) -> tuple[str, ...]:
        """All that are packed, that of the tokens first."""
        return (self.column, *self.beside)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.packing.width

    def __repr__(self) -> str:
        return f"<Packed windows of {self.length} {self.column} of {self.samples!r}>"

    def followed(self) -> tuple[Dataset, ...]:
        """The datasets that a loader moves on with ``follow="latest"``."""
        return self.samples.followed()

    def moved_to(self, datasets: Sequence[Dataset]) -> Packed:
        """The same windows of other versions of its datasets."""
        return Packed(
            self.samples.moved_to(datasets),
            self.column,
            self.length,
            group_samples=self.group_samples,
            separator=self.separator,
            pad=self.pad,
            fit=self.packing.fit,
            tail=self.packing.tail,
            beside=self.beside,
        )

    def arranged(self, options: OrderOptions) -> Reading:
        """What a loader reads of it, in the order that its *options* say."""
        from forebay.dataset.packed import PackedReading

        return PackedReading(self, options)
