"""Settings: which source wins, what is refused, what is computed from them."""

from pathlib import Path

import pytest

from forebay_server.addresses import parse_address
from forebay_server.config import OPTIONS, load_config
from forebay_server.setting_values import parse_size
from forebay_wire.errors import InvalidRequest


def load(tmp_path: Path, arguments=None, environment=None, file=None):
    return load_config({"data": str(tmp_path), **(arguments or {})}, environment or {}, file)


def test_defaults_name_themselves_as_origin(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.config.drain_seconds == 30.0
    assert found.origins["drain-seconds"] == "default"
    assert found.origins["data"] == "argument"


def test_argument_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text('ram-bytes = "1MiB"\nssd_bytes = "2MiB"\nhdd-bytes = 3145728\n')
    found = load(
        tmp_path,
        {"ram-bytes": "10MiB"},
        {"FOREBAY_SERVER_RAM_BYTES": "5MiB", "FOREBAY_SERVER_SSD_BYTES": "6MiB"},
    )
    config = found.config
    assert (config.ram_bytes, config.ssd_bytes, config.hdd_bytes) == (10 << 20, 6 << 20, 3 << 20)
    assert found.origins["ram-bytes"] == "argument"
    assert found.origins["ssd-bytes"] == "FOREBAY_SERVER_SSD_BYTES"
    assert found.origins["hdd-bytes"] == str(file)


def test_given_file_replaces_the_one_in_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text("idle-exit = 1\n")
    given = tmp_path / "other.toml"
    given.write_text("drain-seconds = 2.5\n")
    config = load(tmp_path, file=given).config
    assert (config.idle_exit, config.drain_seconds) == (0.0, 2.5)


def test_client_variable_names_the_data_folder_too(tmp_path: Path) -> None:
    found = load_config({}, {"FOREBAY_DATA": str(tmp_path)})
    assert found.config.data == tmp_path
    assert found.origins["data"] == "FOREBAY_DATA"
    both = {"FOREBAY_DATA": "elsewhere", "FOREBAY_SERVER_DATA": str(tmp_path)}
    assert load_config({}, both).config.data == tmp_path


@pytest.mark.parametrize(
    ("arguments", "environment", "content", "sentence"),
    [
        ({"ram-byte": "1"}, {}, "", "unknown setting 'ram-byte' in the arguments.*'ram-bytes'"),
        ({}, {"FOREBAY_SERVER_RAM_BYTE": "1"}, "", "'FOREBAY_SERVER_RAM_BYTES'"),
        ({}, {}, "lisen = []", "unknown setting 'lisen' in .*forebay.toml: did you mean 'listen'"),
        ({}, {}, 'data = "x"', "lies in a data folder"),
        ({}, {}, "a = = 1", "not TOML"),
        ({}, {"FOREBAY_SERVER_SSD_BYTES": "lots"}, "", "'lots' from FOREBAY_SERVER_SSD_BYTES"),
        ({"log-level": "loud"}, {}, "", "choose one of debug, info"),
        ({"drain-seconds": "-1"}, {}, "", "0 or more"),
        ({"lease-seconds": "0.1"}, {}, "", "at least 1"),
        ({"tls-cert": "/x"}, {}, "", "belong together"),
        ({"tls-cert": "/no/such", "tls-key": "/no/such"}, {}, "", "no such file"),
        ({"ssd-path": "none", "hdd-path": "none"}, {}, "", "nowhere to land"),
        ({"listen": ["grpc://0.0.0.0:70"]}, {}, "", "reached from other machines"),
        ({"listen": ["grpcs://127.0.0.1:70"]}, {}, "", "TLS needs tls-cert"),
        ({"http-listen": "0.0.0.0:0"}, {}, "", "reached from other machines"),
        ({"listen": ["tcp://127.0.0.1:1"]}, {}, "", "is no address"),
        ({"listen": ["127.0.0.1:70000"]}, {}, "", "is no address"),
    ],
)
def test_wrong_setting_is_refused_with_a_sentence(
    tmp_path: Path, arguments, environment, content: str, sentence: str
) -> None:
    if content:
        (tmp_path / "forebay.toml").write_text(content)
    with pytest.raises(InvalidRequest, match=sentence):
        load(tmp_path, arguments, environment)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("10GB", 10**10), (5, 5)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1QB", "-1", -1, True, 1.5])
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_tiers_lie_in_the_data_folder_unless_told_otherwise(tmp_path: Path) -> None:
    config = load(tmp_path).config
    assert config.ssd_folder == tmp_path / "ssd"
    assert config.object_location == f"file://{tmp_path / 'object'}"
    config = load(tmp_path, {"hdd-path": "none", "object-url": "none"}).config
    assert config.hdd_folder is None
    assert config.object_location is None


def test_addresses_beyond_loopback_use_tls_once_there_is_a_certificate(tmp_path: Path) -> None:
    certificate = {"tls-cert": str(tmp_path / "c"), "tls-key": str(tmp_path / "k")}
    for path in certificate.values():
        Path(path).touch()
    listen = {"listen": ["grpc://[::]:7070", "127.0.0.1:7071"]}
    everywhere, loopback = load(tmp_path, {**certificate, **listen}).config.rpc_addresses
    assert (everywhere.scheme, everywhere.tls) == ("grpcs", True)
    assert (loopback.scheme, loopback.tls) == ("grpc", False)
    assert everywhere.url(7070, "machine") == "grpcs://machine:7070"


def test_insecure_allows_addresses_beyond_loopback(tmp_path: Path) -> None:
    (address,) = load(tmp_path, {"listen": ["0.0.0.0:7"], "insecure": True}).config.rpc_addresses
    assert not address.tls


def test_bytes_are_served_where_the_control_calls_can_be_reached(tmp_path: Path) -> None:
    assert load(tmp_path).config.http_address.target == "127.0.0.1:0"
    listen = {"listen": ["127.0.0.1:7", "10.0.0.5:7"], "insecure": True}
    assert load(tmp_path, listen).config.http_address.target == "10.0.0.5:0"
    own = {**listen, "http-listen": "127.0.0.1:99"}
    assert load(tmp_path, own).config.http_address.target == "127.0.0.1:99"


def test_address_with_ipv6_keeps_its_brackets() -> None:
    assert parse_address("grpc://[::1]:7", "listen", "grpc", "grpcs").target == "[::1]:7"


def test_every_option_says_what_it_means() -> None:
    for option in OPTIONS.values():
        assert option.meaning.endswith("."), option.name
