"""Sounds are decoded on their way: the right samples and rates, of every length, or an error."""

import io
import pickle

import numpy as np
import pytest
import soundfile
import torch

import forebay
from forebay import transforms


def sound(frames: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    steps = np.cumsum(np.random.default_rng(seed).normal(0, 0.01, (frames, channels)), axis=0)
    return np.clip(steps, -0.9, 0.9).astype(np.float32)


def encoded(samples: np.ndarray, kind: str, rate: int = 8000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "error"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.1)])
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_of_one_length_are_one_tensor(kind, error, channels):
    sounds = [sound(2000, channels, seed) for seed in range(3)]
    files = [encoded(one, kind, 16_000) for one in sounds]
    found = transforms.decode_audio("s")({"s": files})
    assert found["s"].shape == (3, channels, 2000)
    assert found["s"].dtype == torch.float32
    assert found["s_rate"].tolist() == [16_000] * 3
    for one, other in zip(found["s"].numpy(), sounds, strict=True):
        assert np.abs(one - other.T).max() <= error


BATCH = {"s": [encoded(sound(300), "WAV"), None, encoded(sound(120, seed=1), "FLAC", 4000)]}


def test_sounds_of_several_lengths_are_a_list():
    found = transforms.decode_audio("s")(BATCH)
    assert [None if one is None else tuple(one.shape) for one in found["s"]] == [
        (1, 300),
        None,
        (1, 120),
    ]
    assert found["s_rate"].tolist() == [8000, 0, 4000]


def test_sounds_of_several_lengths_are_padded():
    step = pickle.loads(pickle.dumps(transforms.decode_audio("s", ragged="pad")))  # noqa: S301
    found = step(BATCH)
    assert found["s"].shape == (3, 1, 300)
    assert found["s_lengths"].tolist() == [300, 0, 120]
    assert torch.equal(found["s"][2, :, :120], transforms.decode_audio("s")(BATCH)["s"][2])
    assert not found["s"][2, :, 120:].any()
    assert not found["s"][1].any()
    assert step({"s": []})["s"].shape == (0, 1, 0)


def test_channels_are_averaged():
    stereo = sound(50, 2)
    found = transforms.decode_audio("s", mono=True)({"s": [encoded(stereo, "WAV")]})["s"]
    assert found.shape == (1, 1, 50)
    assert np.abs(found[0, 0].numpy() - stereo.mean(axis=1)).max() < 1e-4


def test_what_is_no_sound_is_an_error_that_says_so():
    for data in (b"", b"RIFF but no more"):
        with pytest.raises(forebay.IntegrityError, match="cannot be decoded"):
            transforms.decode_audio("s")({"s": [data]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transforms.decode_audio("s", ragged="nested"), "nested"),
        (lambda: transforms.decode_audio("s", rate=8000)(BATCH), "of 4000 Hz"),
        (lambda: transforms.decode_audio("t")(BATCH), "it has s"),
        (
            lambda: transforms.decode_audio("s", ragged="pad")(
                {"s": [encoded(sound(5), "WAV"), encoded(sound(5, 2), "WAV")]}
            ),
            "mono=True",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        make()
