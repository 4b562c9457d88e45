"""Numbers on a common scale, by the statistics of a version or given ones; all in a loader."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import forebay
from forebay import transforms
from forebay.dataset.dataset import Dataset
from forebay_server.testing.daemon import DaemonProcess

RNG = np.random.default_rng(0)
NUMBERS = RNG.normal(7, 3, 200).astype(np.float32)
IMAGES = RNG.integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def client():
    with (
        tempfile.TemporaryDirectory() as folder,
        DaemonProcess(Path(folder) / "data") as process,
        forebay.connect(process.data) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def dataset(client):
    schema = {
        "x": "float32",
        "image": forebay.Array("uint8", (6, 6, 3)),
        "same": "int64",
        "text": "string",
        "ragged": "list[int32]",
        "word": "string",
    }
    with client.create_dataset("numbers", schema) as writer:
        for row, (x, image) in enumerate(zip(NUMBERS, IMAGES, strict=True)):
            text = f"<b>Text</b> {row}"
            writer.write(
                x=x,
                image=image,
                same=5,
                text=text,
                ragged=list(range(row % 3)),
                word="Rare" if row < 5 else "often",
            )
    client.dataset("numbers").define_splits({"train": 0.5, "test": 0.5}, seed=1)
    return client.dataset("numbers")


def test_values_get_mean_0_and_deviation_1(dataset):
    step = transforms.standardize("x", dataset)
    found = step({"x": torch.from_numpy(NUMBERS)})["x"].numpy()
    assert np.abs(found - (NUMBERS - NUMBERS.mean()) / NUMBERS.std()).max() < 1e-5
    again = pickle.loads(pickle.dumps(step))({"x": torch.from_numpy(NUMBERS)})["x"]  # noqa: S301
    assert np.array_equal(again.numpy(), found)


def test_values_lie_between_0_and_1(dataset):
    found = transforms.normalize("image", dataset)({"image": torch.from_numpy(IMAGES)})["image"]
    assert found.dtype == torch.float32
    low, high = int(IMAGES.min()), int(IMAGES.max())
    assert np.allclose(found.numpy(), (IMAGES - float(low)) / (high - low), atol=1e-6)


def test_statistics_are_those_of_the_split(client, dataset):
    train = client.dataset("numbers", split="train")
    own = train.statistics(["x"])["x"]
    step = transforms.standardize("x", train)
    assert step.shift.item() == pytest.approx(own.mean, rel=1e-6)
    assert own.mean != pytest.approx(float(NUMBERS.mean()), rel=1e-6)


@pytest.fixture(scope="module")
def chain(client):
    """Folds within ``train``, and selections within their parts."""
    with client.create_dataset("chain", {"x": "float64"}) as writer:
        for x in range(200):
            writer.write(x=float(x))
    whole = client.dataset("chain")
    whole.define_selection("low", filter=[("x", "<", 150.0)])
    whole.define_splits({"train": 0.8, "test": 0.2}, seed=0)
    client.dataset("chain", split="train").define_folds(2)
    for part in ("train", "test"):
        fold = client.dataset("chain", split=f"train-fold0-{part}")
        fold.define_buckets("x", [100.0], prefix=f"{part}-part")
    client.dataset("chain", split="train-part0").define_folds(2)
    client.dataset("chain", split="train-part0").define_selection("few", filter=[("x", "<", 50.0)])
    client.dataset("chain", split="test").define_folds(2)
    client.dataset("chain", split="test-part0").define_selection("tiny", filter=[("x", "<", 50.0)])
    return client


@pytest.mark.parametrize(
    ("split", "trained"),
    [
        ("train", "train"),
        ("test", "train"),
        ("low", "train"),
        ("train-fold0-train", "train-fold0-train"),
        ("train-fold0-test", "train-fold0-train"),
        ("train-part0", "train-fold0-train"),
        ("train-part1", "train-fold0-train"),
        ("few", "train-fold0-train"),
        ("test-part0", "train-fold0-train"),
        ("tiny", "train-fold0-train"),
        ("train-part0-fold1-test", "train-part0-fold1-train"),
    ],
)
def test_figures_are_of_the_innermost_training_part(chain, split, trained):
    step = transforms.standardize("x")
    read = chain.dataset("chain", split=split)
    forebay.DataLoader(read, global_batch_size=4, transform=step).close()
    assert step.source == f"chain v1 split {trained}"
    if split.startswith("train-"):
        held_out = chain.dataset("chain", split="train-fold0-test")
        tests = held_out.rows_at(np.arange(len(held_out)))
        part = chain.dataset("chain", split=trained)
        assert not np.isin(part.rows_at(np.arange(len(part))), tests).any()


@pytest.mark.parametrize("split", ["test-fold0-train", "test-fold1-test"])
def test_a_training_part_of_what_is_held_out_is_refused(chain, split):
    read = chain.dataset("chain", split=split)
    with pytest.raises(forebay.InvalidRequest, match="give the split to take them of"):
        forebay.DataLoader(read, global_batch_size=4, transform=transforms.standardize("x"))


def test_one_transform_is_not_of_two_folds(chain):
    step = transforms.standardize("x")
    first, second, whole = (
        chain.dataset("chain", split=split)
        for split in ("train-fold0-train", "train-fold1-train", None)
    )
    forebay.DataLoader(first, global_batch_size=4, transform=step).close()
    for other in (second, whole, chain.dataset("chain", split="test")):
        with pytest.raises(forebay.InvalidRequest, match="make one for each fold"):
            forebay.DataLoader(other, global_batch_size=4, transform=step)
    for same in ("train-fold0-test", "train-part1"):
        read = chain.dataset("chain", split=same)
        forebay.DataLoader(read, global_batch_size=4, transform=step).close()
    whole.add_columns(lambda rows: {"y": rows["x"]}, columns=["x"])
    newer = chain.dataset("chain", split="train-fold0-train")
    assert newer.version == 2
    forebay.DataLoader(newer, global_batch_size=4, transform=step).close()
    assert step.source == "chain v1 split train-fold0-train"
    read = chain.dataset("chain", split="train-fold1-train")
    with pytest.raises(forebay.InvalidRequest, match="make one for each fold"):
        forebay.DataLoader(read, global_batch_size=4, transform=step)


@pytest.mark.parametrize(
    ("dtype", "shift"),
    [
        (torch.int32, 1_700_000_000),
        (torch.int64, 1_700_000_000),
        (torch.float64, 1e9),
        (torch.float32, 1_600_000.0),
        (torch.uint16, 60_000),
        (torch.uint8, 200),
    ],
)
@pytest.mark.parametrize("shape", [(50,), (10, 5)])
def test_what_is_far_from_0_keeps_its_distances(dtype, shift, shape):
    values = (torch.arange(50, dtype=torch.float64) + shift).to(dtype).reshape(shape)
    numbers = values.double().numpy()
    step = transforms.standardize("x", mean=numbers.mean(), std=numbers.std())
    found = step({"x": values})["x"]
    assert found.dtype == torch.float32
    expected = (numbers - numbers.mean()) / numbers.std()
    assert np.abs(found.numpy() - expected).max() < 1e-5
    found = transforms.normalize("x", low=numbers.min(), high=numbers.max())({"x": values})["x"]
    assert np.abs(found.numpy().ravel() - np.arange(50) / 49).max() < 1e-5
    assert (found.min().item(), found.max().item()) == (0.0, 1.0)


def test_numbers_too_large_for_a_mean_are_not_called_infinite(client):
    with client.create_dataset("huge", {"x": "float64", "wide": "float64"}) as writer:
        for sign in (1, 1, -1):
            writer.write(x=1e308, wide=sign * 1e308)
    huge = client.dataset("huge")
    for make, column in ((transforms.standardize, "x"), (transforms.normalize, "wide")):
        with pytest.raises(forebay.InvalidRequest, match="too large for float64 to scale by"):
            make(column, huge)
    same = torch.full((4,), 1e308, dtype=torch.float64)
    assert transforms.normalize("x", huge)({"x": same})["x"].tolist() == [0.0] * 4


def test_statistics_are_read_once(dataset, monkeypatch):
    transforms.standardize("x", dataset)
    reads = []
    monkeypatch.setattr(Dataset, "statistics", lambda *given: reads.append(given))
    transforms.normalize("x", dataset)
    assert reads == []


def test_channels_have_figures_of_their_own():
    batch = {"image": torch.from_numpy(IMAGES)}
    mean, std = [100.0, 120.0, 140.0], [50.0, 60.0, 70.0]
    expected = (IMAGES - np.array(mean)) / np.array(std)
    last = transforms.standardize("image", mean=mean, std=std)
    assert np.allclose(last(batch)["image"].numpy(), expected, atol=1e-5)
    first = transforms.standardize("image", mean=mean, std=std, dim=1)
    found = first({"image": batch["image"].permute(0, 3, 1, 2)})["image"].permute(0, 2, 3, 1)
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    listed = first({"image": [batch["image"][0].permute(2, 0, 1), None]})["image"]
    assert np.allclose(listed[0].permute(1, 2, 0).numpy(), expected[0], atol=1e-5)
    assert listed[1] is None
    assert batch["image"].dtype == torch.uint8


def test_what_is_always_the_same_becomes_0(dataset):
    same = {"same": torch.full((4,), 5)}
    assert transforms.standardize("same", dataset)(same)["same"].tolist() == [0.0] * 4
    assert transforms.normalize("same", dataset)(same)["same"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda dataset: transforms.standardize("x")({"x": torch.zeros(3)}), "give a dataset"),
        (lambda dataset: transforms.standardize("x", mean=1.0), "both figures"),
        (lambda dataset: transforms.standardize("x", dataset, mean=1.0), "give a dataset"),
        (lambda dataset: transforms.standardize("text", dataset), "has no numbers"),
        (lambda dataset: transforms.standardize("y", dataset), "no column 'y'"),
        (lambda dataset: transforms.normalize("x", low=[[1.0]], high=[[2.0]]), "for each channel"),
        (
            lambda dataset: transforms.normalize("x", low=[1.0, 2.0], high=[2.0, 3.0])(
                {"x": torch.zeros(3, 5)}
            ),
            "do not fit dimension -1",
        ),
    ],
)
def test_mistakes_are_named(dataset, make, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make(dataset)


def test_a_vocabulary_has_the_most_frequent_words(dataset):
    assert transforms.vocabulary(dataset, "text", 3, stop_words=["B"]) == ["text", "0", "1"]
    assert transforms.vocabulary(dataset, "text", min_count=2) == ["b", "text"]
    assert transforms.vocabulary(dataset, "word") == ["often", "rare"]


def pipeline(dataset, tokenizer):
    return [
        transforms.random_flip("image"),
        transforms.random_crop("image", size=4),
        transforms.standardize("image", dataset),
        transforms.standardize("ragged", mean=1.0, std=2.0),
        transforms.clean_text("text"),
        transforms.tokenize("text", tokenizer, into="tokens", max_length=4),
        transforms.hash_words("text", 32),
    ]


@pytest.fixture
def tokenizer():
    words = {"[UNK]": 0, "text": 1} | {str(number): number + 2 for number in range(200)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def rows_of(batches):
    found = {}
    for batch in batches:
        ragged = batch["ragged"]
        ragged = ragged.unbind(0) if ragged.is_nested else ragged
        for place, row in enumerate(batch["_ids"].tolist()):
            assert batch["tokens"][place].tolist() == [1, row + 2]
            assert batch["text"][place] == f"text {row}"
            assert ragged[place].tolist() == [(one - 1) / 2 for one in range(row % 3)]
            found[row] = (batch["image"][place].numpy().tobytes(), batch["words"][place].tolist())
    return found


def test_a_list_of_them_does_the_same_on_any_topology(dataset, tokenizer):
    given = {
        "shuffle": "full",
        "seed": 3,
        "ragged": "nested",
        "include_ids": True,
        "transform": pipeline(dataset, tokenizer),
    }
    with forebay.DataLoader(dataset, global_batch_size=32, num_threads=3, **given) as loader:
        expected = rows_of(loader)
    assert sorted(expected) == list(range(200))
    batches = []
    for rank in range(2):
        options = {"global_batch_size": 14, "rank": rank, "world_size": 2, **given}
        with forebay.DataLoader(dataset, num_threads=0, **options) as loader:
            batches += list(loader)
    assert rows_of(batches) == expected
    stream = forebay.StreamingDataset(dataset, global_batch_size=50, **given)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert rows_of(loader) == expected
