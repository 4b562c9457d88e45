"""A bidirectional LSTM that sorts texts into classes. Shape letters: B texts, K classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from forebay_trainer.config import setting
from forebay_trainer.models.lstm import BiLstmClassifier
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Config:
    embedding_features: int = setting(96, "numbers that stand for a word")
    hidden_features: int = setting(96, "of each direction of an LSTM")
    num_layers: int = setting(1, "of LSTMs, one on top of another")
    dropout: float = setting(0.3, "share of features dropped before each layer in training")

    def __post_init__(self) -> None:
        for name in ("embedding_features", "hidden_features", "num_layers"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout}")


def build(config: Config, about: Mapping[str, Any]) -> Task:
    """*about*: what was learnt when the data were prepared: ``words``, ``classes``."""
    missing = {"words", "classes"} - about.keys()
    if missing:
        raise InvalidRequest(
            f"the dataset does not say its {' and '.join(sorted(missing))}: write it with "
            "`python -m forebay_trainer prepare text_lstm`"
        )
    return TextClassification(config, len(about["words"]), len(about["classes"]))


class TextClassification(Task):
    """Cross entropy; accuracy, and F1 as the mean over the classes."""

    def __init__(self, config: Config, vocabulary_size: int, num_classes: int) -> None:
        super().__init__(
            BiLstmClassifier(
                vocabulary_size=vocabulary_size,
                num_classes=num_classes,
                embedding_features=config.embedding_features,
                hidden_features=config.hidden_features,
                num_layers=config.num_layers,
                dropout=config.dropout,
            )
        )
        self._num_classes = num_classes

    def prepare(self, batch: Batch) -> Batch:
        if "tokens_lengths" not in batch:
            raise InvalidRequest("text_lstm needs its texts padded: set data.ragged=pad")
        return batch

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return batch["tokens"], batch["tokens_lengths"]

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["tokens_lengths"].sum())

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["label"], reduction="none")

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        found_B, right_B, weight_B = outputs.argmax(dim=1), batch["label"], batch["weight"]

        def counts(classes_B: Tensor, weight_B: Tensor) -> Tensor:
            chosen_BK = F.one_hot(classes_B, self._num_classes)
            return (chosen_BK * weight_B[:, None]).sum(dim=0)

        return {
            "found": counts(found_B, weight_B),
            "right": counts(right_B, weight_B),
            "hits": counts(right_B, weight_B * (found_B == right_B)),
        }

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        hits = float(sums["hits"].sum())
        return {
            "accuracy": hits / max(1.0, sums["weight"]),
            "macro_f1": macro_f1(sums["hits"], sums["found"], sums["right"]),
        }


def macro_f1(hits_K: Tensor, found_K: Tensor, right_K: Tensor) -> float:
    """The mean of the classes' F1: 2 · hits / (found + right), which is the harmonic mean of
    precision and recall. *found*: texts that the model put into a class; *right*: texts that
    belong there. Classes that neither has do not count."""
    sizes_K = found_K + right_K
    present = sizes_K > 0
    if not present.any():
        return 0.0
    return float((2 * hits_K[present] / sizes_K[present]).mean())
