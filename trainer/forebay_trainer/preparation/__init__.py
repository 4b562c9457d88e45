"""What a recipe's ``prepare.py`` returns: how raw rows become a dataset.

    read → clean → normalise → duplicates out → split → learn → tokenise → augment → written

Every step takes and gives a pyarrow Table: a chunk of rows, as `Preparation.read` cuts them. The
steps but ``read`` and ``learn`` run in worker processes, which make a `Preparation` of their own:
nothing may be kept in it from one call to the next. The rows of the dataset lie in the order of
``read``, and are the same for every number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa

from forebay_trainer.preparation.sources import Source

SPLIT: Final = "split"
"""Column: the name of the split that a row belongs to, given by the rows or drawn. It is stored as
the number of the name, int8, and the names as the dataset's metadata."""

GROUP: Final = "group"
"""Column: rows of one group belong to the same split, as pieces of one text."""

TRAIN: Final = "train"
"""The split that is learnt from, and augmented."""

Type = str | tuple[str, tuple[int, ...]]


class Preparation:
    """A recipe subclasses this; `schema` and `read` are needed, all else has a default."""

    schema: ClassVar[Mapping[str, Type]]
    """Columns of the dataset: ``{"tokens": "list[int32]", "image": ("uint8", (28, 28))}``. Others
    that the rows have are left out, and ``split`` is added."""

    sources: ClassVar[Sequence[Source]] = ()
    """Packages that the data are in: what ``--fetch`` fetches."""

    splits: Mapping[str, float] = {TRAIN: 0.9, "test": 0.1}
    """Names, and the shares that rows, or groups of them, are drawn for. Where the rows have a
    column ``split``, which names one of these, the shares do not count."""

    unique: str | None = None
    """Column of which every value is kept once, the first time."""

    grows_by: ClassVar[Sequence[str]] = ("source",)
    """Settings that may differ, and one of which has to, where rows are appended to a dataset."""

    def read(self) -> Iterator[pa.Table]:
        """The raw rows, some hundreds or thousands at a time: what one worker gets."""
        raise NotImplementedError

    def clean(self, rows: pa.Table) -> pa.Table:
        """Drops what is broken, and what is not meant."""
        return rows

    def normalise(self, rows: pa.Table) -> pa.Table:
        """Gives one spelling to what means the same."""
        return rows

    def learn(self, rows: Iterable[pa.Table]) -> Mapping[str, Any]:
        """What `tokenise` and the model need to know of the data: a vocabulary, names of classes.
        From rows of the split ``train`` alone. JSON; it becomes the dataset's metadata."""
        return {}

    def tokenise(self, rows: pa.Table, learnt: Mapping[str, Any]) -> pa.Table:
        """Makes the columns of the dataset."""
        return rows

    def augment(
        self, rows: pa.Table, learnt: Mapping[str, Any], random: np.random.Generator
    ) -> pa.Table:
        """Changes rows of the split ``train`` or adds to them; *random* is the chunk's own."""
        return rows


def overrides(preparation: Preparation, step: str) -> bool:
    """Whether the recipe says anything of a step."""
    return getattr(type(preparation), step) is not getattr(Preparation, step)
