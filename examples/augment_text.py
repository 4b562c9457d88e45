"""Makes more training text of what there is: synthetic data and back-translation, by your function.

    python examples/augment_text.py reviews --data data/

Two places to do so. *Ahead*: new rows are written as the next version of the dataset, each with the
row that it comes from, so that a costly model runs once and splits can keep families together. *On
the way*: `forebay.per_sample` changes a share of the texts each epoch, seeded by sample, so that a
run can be repeated on any number of ranks and workers.

Both take any function of a text and a random generator. `swap_synonyms` stands for a model here;
for back-translation give `back_translation` two functions that translate, there and back.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

import forebay
from forebay import transforms

Rewrite = Callable[[str, np.random.Generator], str]

REVIEWS = [
    ("A good film with a quick, funny start.", 1),
    ("The plot is slow and the end is bad.", 0),
    ("Funny and quick: a good end!", 1),
    ("A bad start, and a slow film.", 0),
]

SYNONYMS = {
    "bad": ["poor", "weak"],
    "film": ["movie", "picture"],
    "funny": ["amusing", "witty"],
    "good": ["fine", "great"],
    "quick": ["fast", "brisk"],
    "slow": ["dull", "sluggish"],
}


def swap_synonyms(text: str, rng: np.random.Generator, chance: float = 0.7) -> str:
    """*text* with some of its words replaced: what a language model would do better."""

    def swapped(found: re.Match[str]) -> str:
        others = SYNONYMS.get(found[0].lower())
        if others is None or rng.random() >= chance:
            return found[0]
        other = others[int(rng.integers(len(others)))]
        return other.capitalize() if found[0][0].isupper() else other

    return re.sub(r"\w+", swapped, text)


def back_translation(there: Callable[[str], str], back: Callable[[str], str]) -> Rewrite:
    """A rewrite that translates a text into another language and back."""
    return lambda text, rng: back(there(text))


def synthesize(
    rows: Iterable[tuple[int, Mapping[str, Any]]], rewrite: Rewrite, copies: int, seed: int
) -> Iterable[dict[str, Any]]:
    """*copies* new samples of each of *rows* (number and sample): those that came out different."""
    for number, sample in rows:
        rng = np.random.default_rng([seed, number])  # the same for a row, whoever writes it
        seen = {sample["text"]}
        for _ in range(copies):
            text = rewrite(sample["text"], rng)
            if text not in seen:
                seen.add(text)
                yield {**sample, "text": text, "source": number}


def rewrite_some(
    sample: dict[str, Any], rng: np.random.Generator, *, rewrite: Rewrite, share: float
) -> dict[str, Any]:
    """For `forebay.per_sample`: a *share* of the samples is rewritten, others each epoch."""
    if rng.random() < share:
        sample["text"] = rewrite(sample["text"], rng)
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a dataset of text, and more of it.")
    parser.add_argument("name", help="of the new dataset")
    parser.add_argument("--data", default="data/", help="folder, unix:/… or grpc://host:port")
    parser.add_argument("--copies", type=int, default=3, help="new samples of each, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with forebay.connect(options.data) as client:
        schema = {"text": "string", "label": "int64", "source": "int64"}
        with client.create_dataset(options.name, schema) as writer:
            for number, (text, label) in enumerate(REVIEWS):
                writer.write(text=text, label=label, source=number)
        dataset = client.dataset(options.name)

        # Ahead: the next version has the synthetic samples, too.
        originals = ((number, dataset[number]) for number in range(len(dataset)))
        with client.append_dataset(options.name) as writer:
            for sample in synthesize(originals, swap_synonyms, options.copies, options.seed):
                writer.write(**sample)
        larger = client.dataset(options.name)
        print(f"{options.name}: {len(dataset)} samples, {len(larger)} with the synthetic ones")

        # On the way: half of the texts are rewritten anew each epoch, then cleaned and counted.
        loader = forebay.DataLoader(
            larger,
            global_batch_size=4,
            shuffle="full",
            seed=options.seed,
            include_ids=True,
            transform=[
                forebay.per_sample(partial(rewrite_some, rewrite=swap_synonyms, share=0.5)),
                transforms.clean_text("text", stop_words="english"),
                transforms.hash_words("text", 64),
            ],
        )
        with loader:
            for epoch in loader.epochs(2):
                for batch in epoch:
                    for row, text in zip(batch["_ids"].tolist(), batch["text"], strict=True):
                        print(f"epoch {epoch.number}, row {row}: {text}")


if __name__ == "__main__":
    main()
