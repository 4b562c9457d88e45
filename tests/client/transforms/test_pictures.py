"""Augmented pictures: cut, mirrored and coloured right, and alike in any batch."""

import pickle

import numpy as np
import pytest
import torch

import forebay
from forebay import transforms
from forebay.dataset.transforms import Rows, Transforms

RNG = np.random.default_rng(4)
PICTURES = torch.from_numpy(RNG.integers(0, 256, (23, 12, 10, 3), dtype=np.uint8))
MASKS = PICTURES[..., 0].clone()

STEPS = {
    "crop": transforms.random_crop("image", "mask", size=(8, 6), padding=2),
    "flip": transforms.random_flip("image", "mask"),
    "jitter": transforms.jitter_colors("image", brightness=0.4, contrast=0.4, saturation=0.4),
    "zoom": transforms.random_resized_crop("image", "mask", size=9),
    "resize": transforms.resize("image", "mask", size=(5, 7)),
}
ALL = [STEPS["crop"], STEPS["flip"], STEPS["jitter"], STEPS["zoom"]]


def run(steps, batch, ids, seed=1, epoch=0):
    rows = Rows(seed, epoch, np.asarray(ids), "pictures")
    return Transforms(steps).apply(batch, rows, None, masks=False)[0]


def some(ids, batch=None):
    return {"image": PICTURES[ids], "mask": MASKS[ids]} if batch is None else batch


@pytest.mark.parametrize("steps", [*STEPS.values(), ALL], ids=[*STEPS, "all"])
def test_a_sample_is_treated_alike_in_any_batch(steps):
    ids = np.arange(23)
    whole = run(steps, some(ids), ids)
    shuffled = np.random.default_rng(0).permutation(23)
    for size in (1, 5, 23):
        for start in range(0, 23, size):
            part = shuffled[start : start + size]
            found = run(steps, some(part), part)
            for name in ("image", "mask"):
                assert torch.equal(found[name], whole[name][part])
    listed = run(steps, {"image": list(PICTURES), "mask": list(MASKS)}, ids)
    for name in ("image", "mask"):
        assert len(listed[name]) == 23
        assert all(map(torch.equal, listed[name], whole[name]))


@pytest.mark.parametrize("name", ["crop", "flip", "jitter", "zoom"])
def test_seed_epoch_row_and_place_in_the_list_change_it(name):
    step = STEPS[name]
    ids = np.arange(23)
    first = run(step, some(ids), ids)["image"]
    assert torch.equal(first, run(pickle.loads(pickle.dumps(step)), some(ids), ids)["image"])  # noqa: S301
    for other in (
        run(step, some(ids), ids, seed=2),
        run(step, some(ids), ids, epoch=1),
        run(step, some(ids), ids + 100),
        run([lambda batch: batch, step], some(ids), ids),
    ):
        assert not torch.equal(other["image"], first)


def test_crops_are_pieces_of_the_picture_and_of_its_mask():
    ids = np.arange(23)
    found = run(transforms.random_crop("image", "mask", size=(8, 6)), some(ids), ids)
    places = set()
    for row in range(23):
        [place] = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(PICTURES[row, top : top + 8, left : left + 6], found["image"][row])
        ]
        top, left = place
        assert torch.equal(MASKS[row, top : top + 8, left : left + 6], found["mask"][row])
        places.add(place)
    assert len({top for top, _ in places}) == len({left for _, left in places}) == 5


def test_padding_is_zeros_around():
    bright = torch.full((40, 4, 4), 255, dtype=torch.uint8)
    found = run(transforms.random_crop("p", size=4, padding=2), {"p": bright}, np.arange(40))["p"]
    shares = found.float().mean(dim=(1, 2))
    assert float(shares.min()) < 150
    assert float(shares.max()) > 150
    assert set(found.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(("direction", "axis"), [("horizontal", 2), ("vertical", 1)])
def test_about_half_are_mirrored(direction, axis):
    pictures = torch.from_numpy(RNG.integers(0, 256, (1000, 3, 2), dtype=np.uint8))
    step = transforms.random_flip("p", direction=direction)
    found = run(step, {"p": pictures}, np.arange(1000))["p"]
    is_flipped = (found == pictures.flip(axis)).all(dim=(1, 2))
    assert bool((is_flipped | (found == pictures).all(dim=(1, 2))).all())
    assert 400 < int(is_flipped.sum()) < 600
    for chance in (0.0, 1.0):
        all_alike = transforms.random_flip("p", direction=direction, chance=chance)
        expected = pictures.flip(axis) if chance else pictures
        assert torch.equal(run(all_alike, {"p": pictures}, np.arange(1000))["p"], expected)


def test_colours_change_within_their_bounds():
    grey = torch.full((500, 2, 2, 3), 100, dtype=torch.uint8)
    found = run(transforms.jitter_colors("p", brightness=0.2), {"p": grey}, np.arange(500))["p"]
    assert 80 <= int(found.min()) < 85
    assert 115 < int(found.max()) <= 120
    same = run(
        transforms.jitter_colors("p", contrast=0.5, saturation=0.5), {"p": grey}, np.arange(500)
    )
    assert torch.equal(same["p"], grey), "what has neither contrast nor colour"
    red = grey * torch.tensor([2, 0, 0], dtype=torch.uint8)
    pale = run(transforms.jitter_colors("p", saturation=1.0), {"p": red}, np.arange(500))["p"]
    assert int(pale[..., 1].max()) > 0
    assert torch.equal(
        run(transforms.jitter_colors("p"), some([0], {"p": PICTURES}), np.arange(23))["p"], PICTURES
    )


def test_channels_may_come_first():
    ids = np.arange(23)
    first = PICTURES.permute(0, 3, 1, 2).contiguous()
    for make in (
        lambda **given: transforms.random_crop("image", size=6, **given),
        lambda **given: transforms.random_flip("image", **given),
        lambda **given: transforms.jitter_colors("image", contrast=0.5, saturation=0.5, **given),
        lambda **given: transforms.random_resized_crop("image", size=6, **given),
    ):
        found = run(make(layout="CHW"), {"image": first}, ids)["image"]
        assert torch.equal(found.permute(0, 2, 3, 1), run(make(), some(ids), ids)["image"])


def test_pictures_of_all_sizes_and_holes_are_stacked_once_they_fit():
    pictures = [PICTURES[0], None, PICTURES[1, :9, :8]]
    found = run(transforms.resize("p", size=6), {"p": pictures}, np.arange(3))["p"]
    assert found.shape == (3, 6, 6, 3)
    assert not found[1].any()
    flipped = run(transforms.random_flip("p"), {"p": pictures}, np.arange(3))["p"]
    assert [None if one is None else one.shape for one in flipped] == [
        None if one is None else one.shape for one in pictures
    ]


def test_resizing_keeps_what_is_even():
    even = torch.full((2, 30, 20, 3), 77, dtype=torch.uint8)
    found = run(transforms.resize("p", size=(7, 9)), {"p": even}, np.arange(2))["p"]
    assert torch.equal(found, torch.full((2, 7, 9, 3), 77, dtype=torch.uint8))


def test_outside_of_a_loader_any_generator_will_do():
    batch = {"image": PICTURES, "mask": MASKS}
    one = STEPS["crop"](batch, np.random.default_rng(1))["image"]
    assert torch.equal(one, STEPS["crop"](batch, np.random.default_rng(1))["image"])
    assert not torch.equal(one, STEPS["crop"](batch, np.random.default_rng(2))["image"])
    assert batch["image"] is PICTURES


@pytest.mark.parametrize("shape", [(300, 40, 40, 3), (3, 300, 300, 3)])
def test_large_batches_are_treated_in_parts_and_come_whole(shape):
    pictures = torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))
    ids = np.arange(len(pictures))
    jitter = STEPS["jitter"]
    whole = run(jitter, {"image": pictures}, ids)["image"]
    listed = run(jitter, {"image": list(pictures)}, ids)["image"]
    assert all(map(torch.equal, whole, listed))
    scaled = transforms.standardize("p", mean=3.0, std=2.0)({"p": pictures})["p"]
    assert torch.equal(scaled, (pictures.float() - 3) / 2)


def test_drawn_numbers_are_spread_evenly():
    draw = Rows(3, 1, np.arange(20_000), "x").draws(0)
    numbers = np.concatenate((draw(2), draw(1)), axis=1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20)[0] / 3000 - 1).max() < 0.1
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transforms.random_crop(size=3), "at least one column"),
        (lambda: transforms.random_crop("p", size=0), "at least 1"),
        (lambda: transforms.random_flip("p", direction="up"), "up"),
        (lambda: transforms.random_flip("p", chance=2), "from 0 to 1"),
        (lambda: transforms.jitter_colors("p", contrast=2), "from 0 to 1"),
        (lambda: transforms.random_resized_crop("p", size=2, scale=(1, 0.5)), "scale"),
        (lambda: transforms.resize("p", size=2, layout="WHC"), "WHC"),
        (
            lambda: run(transforms.random_crop("p", size=13), {"p": PICTURES}, np.arange(23)),
            "does not fit",
        ),
        (lambda: run(transforms.random_flip("q"), {"p": PICTURES}, np.arange(23)), "it has p"),
        (lambda: run(transforms.jitter_colors("p"), {"p": MASKS.float()}, np.arange(23)), "uint8"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make()
