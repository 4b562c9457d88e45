"""Pictures are decoded on their way: the right pixels, of every size and format, or an error."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import forebay
from forebay.dataset import images


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    found = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
    return found if found.ndim == 3 else found[:, :, None]


def differs(found: torch.Tensor, data: bytes, mode: str = "RGB") -> int:
    """By the decoders' rounding."""
    return int(np.abs(found.numpy().astype(int) - pixels(data, mode)).max())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "GRAY"])
def test_pictures_of_one_size_are_one_tensor(kind, mode):
    files = [encoded(picture(48, 64, seed), kind) for seed in range(5)]
    batch = forebay.decode_images("image", mode=mode)({"image": files, "label": torch.arange(5)})
    assert batch["image"].shape == (5, 48, 64, 3 if mode == "RGB" else 1)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == list(range(5))
    for found, data in zip(batch["image"], files, strict=True):
        assert differs(found, data, "RGB" if mode == "RGB" else "L") <= 2


def test_pictures_of_several_sizes_and_formats_are_a_list():
    files = [encoded(picture(48, 64), "JPEG"), encoded(picture(32, 16), "PNG")]
    found = forebay.decode_images("image")({"image": files})["image"]
    assert [tuple(one.shape) for one in found] == [(48, 64, 3), (32, 16, 3)]
    assert all(differs(one, data) <= 2 for one, data in zip(found, files, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_hole_is_black_among_others(kind):
    files = [encoded(picture(8, 8), kind), None, encoded(picture(8, 8), kind)]
    mask = torch.tensor([True, False, True])
    found = forebay.decode_images("image")({"image": files, "_mask": mask})["image"]
    assert found.shape == (3, 8, 8, 3)
    assert found[0].any()
    assert not found[1].any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_missing_picture_is_no_black_one(kind):
    files = [encoded(picture(8, 8), kind), None]
    found = forebay.decode_images("image")({"image": files})["image"]
    assert found[0].shape == (8, 8, 3)
    assert found[1] is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("GRAY", 1)])
def test_of_sixteen_bits_the_upper_eight_are_taken(kind, mode, channels):
    grey = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    found = forebay.decode_images("image", mode=mode)({"image": [encoded(grey, kind)]})["image"]
    assert found.shape == (1, 16, 16, channels)
    for channel in range(channels):
        assert found[0, :, :, channel].flatten().tolist() == list(range(256))


def test_jpeg_of_four_inks_is_decoded_in_either_of_its_forms():
    data = bytearray(encoded(Image.new("CMYK", (8, 8), (10, 120, 200, 40)), "JPEG"))
    for transform in (0, 2):  # of Adobe's segment: CMYK and YCCK
        data[data.index(b"Adobe") + 11] = transform
        found = forebay.decode_images("image")({"image": [bytes(data)]})["image"]
        assert differs(found[0], bytes(data)) == 0


def test_what_has_no_white_is_refused():
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(forebay.IntegrityError, match=r"32 bits \(Pillow's mode 'F'\)"):
        forebay.decode_images("image")({"image": [data]})


@pytest.mark.parametrize(
    ("values", "message"),
    [(torch.arange(3), "holds numbers .torch.int64."), (["a.jpg", None], "holds str")],
)
def test_a_column_without_files_is_refused(values, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        forebay.decode_images("image")({"image": values})


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xe0 no more", b"GIF89a"])
def test_what_is_no_picture_is_an_error_that_says_so(data):
    with pytest.raises(forebay.IntegrityError, match="cannot be decoded"):
        forebay.decode_images("image")({"image": [data]})


def test_a_cut_jpeg_is_an_error():
    data = encoded(picture(200, 200), "JPEG")
    with pytest.raises(forebay.IntegrityError, match="cannot be decoded"):
        forebay.decode_images("image")({"image": [data[: len(data) // 2]]})


def test_a_mistyped_column_or_mode_is_named():
    with pytest.raises(forebay.InvalidRequest, match=r"jpg.*it has image"):
        forebay.decode_images("jpg")({"image": []})
    with pytest.raises(forebay.InvalidRequest, match="CMYK"):
        forebay.decode_images("image", mode="CMYK")


def test_without_the_fast_decoder_pillow_does_it_all(monkeypatch):
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    files = [encoded(picture(16, 16, seed), "JPEG") for seed in range(2)]
    found = forebay.decode_images("image")({"image": files})["image"]
    assert found.shape == (2, 16, 16, 3)
    assert differs(found[1], files[1]) == 0


def write(client, name, files):
    with client.create_dataset(name, schema={"image": "binary", "label": "int64"}) as writer:
        for label, data in enumerate(files):
            writer.write(image=data, label=label)


BAD_HEAD = b"\xff\xd8\xff\xe0 no more"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("way", ["local"], indirect=True)
def test_pictures_that_cannot_be_decoded_are_holes(client, name, kind, caplog):
    good = encoded(picture(100, 100), kind)
    files = [good] * 12
    files[2] = good[: len(good) // 2]
    files[5] = BAD_HEAD
    files[8:12] = [b""] * 4  # a whole batch
    write(client, name, files)
    bad = [2, 5, 8, 9, 10, 11]
    with forebay.DataLoader(
        client.dataset(name),
        global_batch_size=4,
        on_error="mask",
        include_ids=True,
        transform=forebay.decode_images("image"),
    ) as loader:
        for batch in loader:
            rows = batch["_ids"].tolist()
            assert batch["label"].tolist() == rows
            assert batch["_mask"].tolist() == [row not in bad for row in rows]
            assert batch["image"].shape == (4, 100, 100, 3)
            for row, found in zip(rows, batch["image"], strict=True):
                assert differs(found, good) <= 2 if row not in bad else not found.any()
        assert loader.report().bad_samples == tuple(bad)
    assert f"row 2 of {name} is masked: its picture cannot be decoded" in caplog.text


@pytest.mark.parametrize("way", ["local"], indirect=True)
def test_without_masks_the_row_is_named(client, name):
    write(client, name, [encoded(picture(8, 8), "JPEG")] * 3 + [BAD_HEAD])
    loader = forebay.DataLoader(
        client.dataset(name), global_batch_size=2, transform=forebay.decode_images("image")
    )
    with loader, pytest.raises(forebay.IntegrityError, match=f"row 3 of {name}, column 'image'"):
        list(loader)


@pytest.mark.parametrize("on_error", ["raise", "mask"])
@pytest.mark.parametrize("way", ["local"], indirect=True)
def test_a_picture_that_the_dataset_lacks_is_none(client, name, on_error):
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("label", pa.int64())])
    data = encoded(picture(8, 8), "JPEG")
    with client.create_dataset(name, schema=schema) as writer:
        writer.write_table(pa.table({"image": [data, None, data], "label": [0, 1, 2]}))
    with forebay.DataLoader(
        client.dataset(name),
        global_batch_size=3,
        on_error=on_error,
        transform=forebay.decode_images("image"),
    ) as loader:
        (batch,) = loader
    assert [one is None for one in batch["image"]] == [False, True, False]
    assert batch.get("_mask", torch.ones(3, dtype=torch.bool)).all()


@pytest.mark.parametrize("way", ["local"], indirect=True)
def test_a_rank_without_pictures_has_their_column(client, name):
    write(client, name, [encoded(picture(8, 8), "PNG")] * 2)
    for rank, count in ((0, 1), (3, 0)):
        with forebay.DataLoader(
            client.dataset(name),
            global_batch_size=4,
            rank=rank,
            world_size=4,
            transform=forebay.decode_images("image"),
        ) as loader:
            (batch,) = loader
        assert batch["image"].shape == (count, 8, 8, 3)
        assert set(batch) == {"image", "label"}


def test_in_a_loader(client, name):
    files = [encoded(picture(16, 16, seed), "JPEG") for seed in range(10)]
    write(client, name, files)
    loader = forebay.DataLoader(
        client.dataset(name), batch_size=4, transform=forebay.decode_images("image")
    )
    with loader:
        for batch in loader:
            for found, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                assert differs(found, files[label]) <= 2
