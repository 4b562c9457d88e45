"""Over TLS a client elsewhere gets control calls and bytes alike."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess

pytestmark = pytest.mark.needs("openssl")

NUM_ROWS = 3000


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A chain of one for ``localhost``, and its key."""
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", str(key), "-out", str(chain)),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return chain, key


@pytest.fixture
def daemon(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[DaemonProcess]:
    """Serves control calls and bytes over TLS only, beside its Unix sockets."""
    chain, key = certificate
    arguments = [
        *("--listen", "grpcs://localhost:0", "--http-listen", "https://localhost:0"),
        *("--tls-cert", str(chain), "--tls-key", str(key)),
    ]
    with DaemonProcess(tmp_path / "data", *arguments) as found:
        yield found


def test_bytes_written_and_read_over_tls_are_the_same(
    daemon: DaemonProcess, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_TLS_CA", str(certificate[0]))
    noise = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, 1024), dtype=np.uint8)
    schema = {"noise": forebay.Array("uint8", (1024,))}
    with forebay.connect(daemon.address()["tcp"], token=daemon.token()) as client:
        with client.create_dataset("d", schema=schema) as writer:
            for row in noise:
                writer.write(noise=row)
        found = client.dataset("d").take(np.arange(NUM_ROWS))
    assert np.array_equal(found["noise"], noise)


def test_certificate_that_nobody_vouches_for_is_refused(daemon: DaemonProcess) -> None:
    with pytest.raises(forebay.ForebayError):
        forebay.connect(daemon.address()["tcp"], token=daemon.token(), timeout=3)
