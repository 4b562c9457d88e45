"""Transforms: the same samples come out whatever the topology; one that fails is one hole."""

import functools
import itertools
import logging

import numpy as np
import pytest
import torch

import forebay
from forebay.testing.numbered import NUM_SAMPLES

SEED = 11


def augment(sample, rng):
    """Draws as many numbers as the sample says, so that a shared generator would show."""
    noise = rng.random(3 + int(sample["number"]) % 3)[-2:]
    return {
        "number": sample["number"],
        "noise": torch.from_numpy(noise),
        "first": float(noise[0]),
        "text": sample["text"].upper(),
        "cut": sample["ragged"][: int(rng.integers(0, 3))],
    }


def rows_of(batches) -> dict[int, tuple]:
    """Row to all that its sample became."""
    found = {}
    for batch in batches:
        for place, row in enumerate(batch["_ids"].tolist()):
            assert row not in found
            found[row] = (
                int(batch["number"][place]),
                tuple(batch["noise"][place].tolist()),
                round(float(batch["first"][place]), 6),
                batch["text"][place],
                tuple(batch["cut"][place].tolist()),
            )
    return found


def options(**changes):
    return {
        "global_batch_size": 16,
        "shuffle": "full",
        "seed": SEED,
        "include_ids": True,
        "columns": ("number", "text", "ragged"),
        "transform": forebay.per_sample(augment),
        **changes,
    }


@pytest.fixture
def way():
    """Reading has its own tests."""
    return "local"


@pytest.fixture
def expected(numbered):
    """Each sample treated by itself: a loader of one sample a batch."""
    with forebay.DataLoader(numbered, **options(global_batch_size=1, num_threads=0)) as loader:
        found = rows_of(loader)
    assert len(found) == NUM_SAMPLES
    assert len({noise for _, noise, *_ in found.values()}) == NUM_SAMPLES
    return found


@pytest.mark.parametrize(("size", "num_threads", "shuffle"), [(16, 0, "full"), (7, 3, "none")])
def test_samples_are_treated_alike_by_any_loader(numbered, expected, size, num_threads, shuffle):
    given = options(global_batch_size=size, num_threads=num_threads, shuffle=shuffle)
    with forebay.DataLoader(numbered, **given) as loader:
        assert rows_of(loader) == expected
        assert rows_of(loader) != expected, "another epoch"


def test_samples_are_treated_alike_on_any_ranks(numbered, expected):
    batches = []
    for rank in range(3):
        with forebay.DataLoader(numbered, **options(rank=rank, world_size=3)) as loader:
            batches += list(loader)
    assert rows_of(batches) == expected


def test_samples_are_treated_alike_by_workers(numbered, expected):
    stream = forebay.StreamingDataset(numbered, **options())
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert rows_of(loader) == expected


def test_samples_of_a_split_are_treated_like_those_of_the_version(train, expected):
    with forebay.DataLoader(train, **options()) as loader:
        found = rows_of(loader)
    assert found == {row: expected[row] for row in found}


def test_another_seed_treats_them_otherwise(numbered, expected):
    with forebay.DataLoader(numbered, **options(seed=SEED + 1)) as loader:
        assert not {one[1] for one in rows_of(loader).values()} & {
            one[1] for one in expected.values()
        }


def shift(batch, rng):
    batch["shift"] = torch.from_numpy(rng.random(len(batch["number"])))
    return batch


def test_a_transform_of_batches_is_seeded_by_their_rows(numbered):
    def shifts(**changes):
        given = options(transform=shift) | changes
        with forebay.DataLoader(numbered, **given) as loader:
            return [batch["shift"].tolist() for batch in loader]

    assert shifts(num_threads=0) == shifts(num_threads=3)
    resumed = forebay.DataLoader(numbered, **options(transform=shift))
    with resumed:
        batches = iter(resumed)
        next(batches)
        state = resumed.state_dict()
    with forebay.DataLoader(numbered, **options(transform=shift)) as loader:
        loader.load_state_dict(state)
        assert [batch["shift"].tolist() for batch in loader] == shifts()[1:]
    assert shifts(seed=SEED + 1) != shifts()


def add(batch, *, by):
    batch["number"] = batch["number"] + by
    return batch


def test_several_transforms_run_one_after_the_other(numbered):
    steps = [
        functools.partial(add, by=1),
        forebay.per_sample(lambda sample: {"number": sample["number"] * 2}),
        functools.partial(add, by=5),
    ]
    with forebay.DataLoader(numbered, **options(transform=steps)) as loader:
        for batch in loader:
            assert batch["number"].tolist() == [2 * (row + 1) + 5 for row in batch["_ids"]]
            assert set(batch) == {"number", "_ids"}


def fails_sometimes(sample):
    if int(sample["number"]) % 50 == 7:
        raise ValueError("cannot be decoded")
    return {
        "image": torch.full((2, 2), float(sample["number"])),
        "size": np.array([1, 2], np.int16),
        "name": sample["text"],
    }


def fails_at_seven(sample):
    if int(sample["number"]) == 14:  # doubled
        raise ValueError("it is the seventh")
    return sample


BAD = [row for row in range(NUM_SAMPLES) if row % 50 == 7]


@pytest.mark.parametrize("size", [16, 1])
def test_a_sample_whose_transform_fails_is_a_hole(numbered, caplog, size):
    given = options(global_batch_size=size, transform=forebay.per_sample(fails_sometimes))
    with forebay.DataLoader(numbered, on_error="mask", **given) as loader:
        for batch in loader:
            rows = batch["_ids"].tolist()
            assert batch["_mask"].tolist() == [row not in BAD for row in rows]
            values = [0.0 if row in BAD else float(row) for row in rows]
            assert batch["image"].tolist() == [[[value] * 2] * 2 for value in values]
            assert batch["size"].dtype == torch.int16
            assert batch["name"] == [None if row in BAD else f"sample {row}" for row in rows]
        assert loader.report().bad_samples == tuple(BAD)
        assert loader.report().samples == NUM_SAMPLES - len(BAD)
    lines = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert len(lines) == len(BAD)
    assert any("row 57 of numbered is masked" in line for line in lines)


def test_without_masks_the_failure_names_its_sample(numbered):
    given = options(transform=forebay.per_sample(fails_sometimes), shuffle="none")
    with (
        forebay.DataLoader(numbered, **given) as loader,
        pytest.raises(ValueError, match="cannot be decoded") as caught,
    ):
        list(loader)
    assert caught.value.__notes__ == ["in the transform of row 7 of numbered"]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("upper", "transform='upper': expected a function of a batch"),
        ([forebay.per_sample(augment), 3], "transform=3: expected a function"),
    ],
)
def test_what_is_no_transform_is_refused(numbered, transform, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        forebay.DataLoader(numbered, global_batch_size=1, transform=transform)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda sample: None, "returns a dict of columns, not NoneType"),
        (
            lambda sample: {f"column{int(sample['number']) % 2}": 1},
            "returned the columns .* return the same for all",
        ),
    ],
)
def test_what_is_no_sample_is_refused(numbered, function, message):
    given = options(transform=forebay.per_sample(function))
    with (
        forebay.DataLoader(numbered, **given) as loader,
        pytest.raises(forebay.InvalidRequest, match=message),
    ):
        next(iter(loader))


def test_what_stops_an_iteration_is_an_error_that_names_the_transform(numbered):
    def takes_too_many(sample):
        return next(iter(()))

    def takes_too_many_of_a_batch(batch):
        return next(iter(()))

    for transform, name in (
        (forebay.per_sample(takes_too_many), "takes_too_many"),
        (takes_too_many_of_a_batch, "takes_too_many_of_a_batch"),
    ):
        for num_threads in (0, 1):
            given = options(transform=transform, num_threads=num_threads, shuffle="none")
            with (
                forebay.DataLoader(numbered, **given) as loader,
                pytest.raises(RuntimeError, match="a transform raised StopIteration") as caught,
            ):
                list(loader)
            assert any(note.endswith(f"{name}") for note in caught.value.__notes__)


def doubled(batch):
    return {"number": batch["number"] * 2}


@pytest.mark.parametrize("last", [[], [forebay.per_sample(fails_at_seven)]])
def test_a_new_batch_keeps_the_columns_of_the_loader(numbered, last):
    given = options(transform=[doubled, *last], shuffle="none", global_batch_size=16)
    with forebay.DataLoader(numbered, on_error="mask", **given) as loader:
        batch = next(iter(loader))
    assert set(batch) == {"number", "_ids", "_mask"}
    assert batch["_ids"].tolist() == list(range(16))
    assert batch["_mask"].tolist() == [not last or row != 7 for row in range(16)]


def test_a_transform_may_replace_the_columns_of_the_loader(numbered):
    def masked(batch):
        return {"number": batch["number"], "_mask": batch["number"] % 2 == 0}

    with forebay.DataLoader(numbered, **options(transform=masked, shuffle="none")) as loader:
        assert next(iter(loader))["_mask"].tolist() == [row % 2 == 0 for row in range(16)]


def wide(sample):
    return {"wide": sample["number"].to(torch.float16).repeat(3), "name": sample["text"]}


def renamed(batch):
    return {"broad": batch["wide"], "name": batch["name"]}


@pytest.mark.parametrize("on_error", ["raise", "mask"])
@pytest.mark.parametrize("last", [[], [renamed, forebay.per_sample(lambda sample: sample)]])
def test_a_rank_without_samples_has_their_columns(client, name, on_error, last):
    with client.create_dataset(name, schema={"number": "int64", "text": "string"}) as writer:
        for number in range(2):
            writer.write(number=number, text=str(number))
    column = "broad" if last else "wide"
    for rank, count in ((0, 1), (3, 0)):
        with forebay.DataLoader(
            client.dataset(name),
            global_batch_size=4,
            rank=rank,
            world_size=4,
            on_error=on_error,
            transform=[forebay.per_sample(wide), *last],
        ) as loader:
            (batch,) = loader
        assert batch[column].shape == (count, 3)
        assert batch[column].dtype == torch.float16
        assert batch["name"] == ["0"][:count]
        assert set(batch) - {"_mask"} == {column, "name"}


def test_a_first_batch_of_holes_has_the_columns_of_samples(numbered, caplog):
    def late(sample):
        if int(sample["number"]) < 16:
            raise ValueError("too early")
        return wide(sample)

    given = options(transform=forebay.per_sample(late), shuffle="none", num_threads=0)
    with forebay.DataLoader(numbered, on_error="mask", **given) as loader:
        first, second = itertools.islice(loader, 2)
        assert loader.report().bad_samples == tuple(range(16))
    assert first["wide"].shape == second["wide"].shape == (16, 3)
    assert first["wide"].dtype == torch.float16
    assert not first["wide"].any()
    assert first["name"] == [None] * 16
    assert set(first) == set(second)
    assert sum("is masked" in one.message for one in caplog.records) == 16
