"""What `import forebay` offers: growth is a decision."""

import subprocess
import sys

import pytest

import forebay

PUBLIC = [
    *("AlreadyExists", "AlreadyRunning", "Array", "Checkpointer", "Client", "Conflict"),
    *("DaemonUnavailable", "DataLoader", "Dataset", "DatasetWriter", "DeadlineExceeded"),
    *("Durability", "Fenced", "ForebayError", "IntegrityError", "InvalidRequest", "Keep"),
    *("LimitExceeded", "Mixture"),
    *("NotFound", "OriginChanged", "Packed"),
    *("PermissionDenied", "ResourceExhausted", "SampleTooLarge", "SchemaMismatch", "Stage"),
    *("StorageError", "StreamingDataset", "TooManyBadSamples", "Unauthenticated"),
    "UnsupportedObject",
    *("VersionMismatch", "WriteSession", "connect", "decode_images", "per_sample"),
]


def test_public_names_are_exactly_these() -> None:
    assert forebay.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(forebay, name).__doc__
    assert name in dir(forebay)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dataloader'"):
        forebay.dataloader  # noqa: B018 - the access is the test


def test_only_the_classes_that_need_torch_load_it() -> None:
    code = (
        "import forebay, sys; forebay.connect, forebay.Client, forebay.Array, forebay.Dataset;"
        "assert 'torch' not in sys.modules; forebay.DataLoader; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
