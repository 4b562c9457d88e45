"""A bidirectional LSTM that classifies texts. Shape letters: B texts, T tokens of the longest one,
E features of a token, H features of a direction, K classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BiLstmClassifier(nn.Module):
    """Embeddings, layers of LSTMs in both directions, mean and maximum over a text, one linear
    layer (Graves and Schmidhuber, 2005, for both directions).

    What stands behind the end of a text has no influence: neither on the states, for the texts are
    packed, nor on what is pooled. A text without tokens is a row of zeros before the last layer.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        num_classes: int,
        embedding_features: int,
        hidden_features: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_features)
        # torch's N(0, 1) would make most of the first steps go into shrinking it.
        nn.init.normal_(self.embedding.weight, std=0.1)
        widths = [embedding_features] + [2 * hidden_features] * num_layers
        # One module a layer: an nn.LSTM of several drops out in a way of its own between them.
        self.layers = nn.ModuleList(
            nn.LSTM(width, hidden_features, batch_first=True, bidirectional=True)
            for width in widths[:-1]
        )
        self.dropouts = nn.ModuleList(nn.Dropout(dropout) for _ in range(num_layers + 1))
        self.classifier = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Tokens, and how many of each row are real; the logits (B, K)."""
        tokens_BT = F.pad(tokens_BT, (0, max(0, 1 - tokens_BT.shape[1])))
        # Packing takes no empty rows: they get a token here, and lose it in the pooling.
        packed_lengths = lengths_B.clamp(min=1).cpu()
        x_BTE = self.embedding(tokens_BT)
        dropouts = iter(self.dropouts)
        for layer in self.layers:
            packed = pack_padded_sequence(
                next(dropouts)(x_BTE), packed_lengths, batch_first=True, enforce_sorted=False
            )
            states, _ = layer(packed)
            x_BTE, _ = pad_packed_sequence(
                states, batch_first=True, total_length=tokens_BT.shape[1]
            )
        logits_BK: Tensor = self.classifier(next(dropouts)(pooled(x_BTE, lengths_B)))
        return logits_BK


def pooled(x_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    """Mean and maximum over the real tokens of each row, side by side: (B, 2 H)."""
    places_T = torch.arange(x_BTH.shape[1], device=x_BTH.device)
    is_real_BT1 = (places_T < lengths_B[:, None])[..., None]
    num_tokens_B1 = lengths_B.clamp(min=1)[:, None].to(x_BTH.dtype)
    mean_BH = torch.where(is_real_BT1, x_BTH, 0.0).sum(dim=1) / num_tokens_B1
    largest_BH = torch.where(is_real_BT1, x_BTH, -torch.inf).amax(dim=1)
    is_empty_B1 = (lengths_B == 0)[:, None]
    return torch.cat([mean_BH, torch.where(is_empty_B1, 0.0, largest_BH)], dim=1)
