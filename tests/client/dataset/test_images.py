"""Pictures are decoded on their way: the right pixels, of every size and format, or an error."""

import io

import numpy as np
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


def test_a_hole_is_black_among_others():
    files = [encoded(picture(8, 8), "JPEG"), None, encoded(picture(8, 8), "JPEG")]
    found = forebay.decode_images("image")({"image": files})["image"]
    assert found.shape == (3, 8, 8, 3)
    assert not found[1].any()


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


def test_in_a_loader(client, name):
    files = [encoded(picture(16, 16, seed), "JPEG") for seed in range(10)]
    with client.create_dataset(name, schema={"image": "binary", "label": "int64"}) as writer:
        for label, data in enumerate(files):
            writer.write(image=data, label=label)
    loader = forebay.DataLoader(
        client.dataset(name), batch_size=4, transform=forebay.decode_images("image")
    )
    with loader:
        for batch in loader:
            for found, label in zip(batch["image"], batch["label"].tolist(), strict=True):
                assert differs(found, files[label]) <= 2
