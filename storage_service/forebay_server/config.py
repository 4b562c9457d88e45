"""Every setting of the daemon, declared once; flags, file, environment and docs derive from it.

Order: argument > environment > file > default. In the environment a setting is called
``FOREBAY_SERVER_<NAME>`` (and the data folder also ``FOREBAY_DATA``, as clients call it); in the
file it has the name of its flag. A key that is none of these is an error with a suggestion.
"""

# ruff: noqa: RUF009 - _option returns a dataclass field

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from forebay_server.addresses import Address, parse_address
from forebay_server.model.encodings import AUTO, SETTINGS
from forebay_server.model.placement import Policy
from forebay_server.model.watermarks import Watermarks
from forebay_server.object_options import ObjectOptions
from forebay_server.policy_file import DEFAULT, all_policies, parse_policies
from forebay_server.setting_values import (
    parse_bool,
    parse_path,
    parse_seconds,
    parse_size,
    parse_text,
    parse_texts,
    parse_watermarks,
)
from forebay_server.tier_folders import VOLATILE, check_folders, folder_of
from forebay_wire.errors import InvalidRequest

ENVIRONMENT_PREFIX: Final = "FOREBAY_SERVER_"
DATA_VARIABLE: Final = "FOREBAY_DATA"
CONFIG_FILE_NAME: Final = "forebay.toml"
NONE: Final = "none"
"""Turns off a tier that a path or URL setting would name."""

POLICIES: Final = "policies"
"""The file's tables of named policies; they cannot be given elsewhere."""


@dataclass(frozen=True)
class Option:
    """One setting as a user meets it."""

    name: str
    """With hyphens: the flag without its dashes, and the key in the file."""
    unit: str
    default: Any
    meaning: str
    parse: Callable[[object], Any]
    choices: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it; the first one present wins."""
        own = ENVIRONMENT_PREFIX + self.field.upper()
        return (own, DATA_VARIABLE) if self.name == "data" else (own,)

    @property
    def repeatable(self) -> bool:
        return self.parse is parse_texts

    @property
    def is_flag(self) -> bool:
        return self.parse is parse_bool

    def read(self, value: object, origin: str) -> Any:
        """The value of what a user wrote in *origin*; :class:`InvalidRequest` names both."""
        try:
            parsed = self.parse(value)
        except ValueError as error:
            shown = "..." if self.parse == ObjectOptions.parse else repr(value)
            raise InvalidRequest(f"{self.name} = {shown} from {origin}: {error}") from error
        if self.choices and parsed not in self.choices:
            raise InvalidRequest(
                f"{self.name} = {value!r} from {origin}: choose one of {', '.join(self.choices)}"
            )
        return parsed


def _option(
    default: Any,
    parse: Callable[[object], Any],
    unit: str,
    meaning: str,
    choices: tuple[str, ...] = (),
) -> Any:
    metadata = {"parse": parse, "unit": unit, "meaning": meaning, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one daemon; each field is one option of the table :data:`OPTIONS`."""

    data: Path = _option(
        Path("data"), parse_path, "folder", "Holds the catalog, the lock and the default tiers."
    )
    catalog: str = _option(
        "",
        parse_text,
        "URL",
        "Where the catalog lies: postgresql://USER@HOST:PORT/DATABASE, without a password; empty: "
        "in an SQLite file of the data folder.",
    )
    listen: tuple[str, ...] = _option(
        (),
        parse_texts,
        "grpc://HOST:PORT",
        "Also take control calls on this TCP address (may be repeated; grpcs:// for TLS). "
        "Beyond loopback it needs tls-cert and tls-key, or insecure.",
    )
    http_listen: str = _option(
        "",
        parse_text,
        "HOST:PORT",
        "Where byte ranges and /metrics are served; empty: a free port, on the host of the first "
        "listen address beyond loopback, else on 127.0.0.1.",
    )
    advertise_host: str = _option(
        "",
        parse_text,
        "host name",
        "The name under which others reach this machine where an address is a wildcard like "
        "0.0.0.0; empty: its host name.",
    )
    tls_cert: Path | None = _option(
        None, parse_path, "PEM file", "Certificate chain of the TCP addresses beyond loopback."
    )
    tls_key: Path | None = _option(None, parse_path, "PEM file", "Private key of tls-cert.")
    insecure: bool = _option(
        False, parse_bool, "", "Allow addresses beyond loopback without TLS: tokens travel bare."
    )
    ram_bytes: int = _option(
        0,
        parse_size,
        "bytes",
        "Shared memory for upload slots and decoded windows; 0: a quarter of the memory that "
        "this process may use.",
    )
    ssd_path: str = _option(
        "", parse_text, "folder", 'Folder of the ssd tier; empty: DATA/ssd; "none": no ssd tier.'
    )
    ssd_bytes: int = _option(
        0, parse_size, "bytes", "Most bytes in the ssd tier; 0: only the file system limits it."
    )
    hdd_path: str = _option(
        "", parse_text, "folder", 'Folder of the hdd tier; empty: DATA/hdd; "none": no hdd tier.'
    )
    hdd_bytes: int = _option(
        0, parse_size, "bytes", "Most bytes in the hdd tier; 0: only the file system limits it."
    )
    hdd_encoding: str = _option(
        AUTO,
        parse_text,
        "",
        "How copies are kept in the hdd tier; new bytes land there raw. auto: as each blob gets "
        "smallest, and raw where that saves less than a sixteenth.",
        SETTINGS,
    )
    replaced: tuple[str, ...] = _option(
        (),
        parse_texts,
        "tier",
        "For one start: what this tier (ssd, hdd or object) held is lost for good, and the empty "
        "place that it has now is to take over. What has copies elsewhere comes back, the rest is "
        "given up.",
    )
    object_url: str = _option(
        "",
        parse_text,
        "fsspec URL",
        'Where the object tier lies; empty: file://DATA/object; "none": no object tier, and '
        "nothing ever becomes remote. A store that cannot create conditionally caches only.",
    )
    object_client: Literal["s3fs", "obstore"] = _option(
        "s3fs",
        parse_text,
        "",
        "Who speaks with S3: s3fs, or obstore, which reads faster (install forebay[obstore]).",
        ("s3fs", "obstore"),
    )
    object_options: ObjectOptions = _option(
        ObjectOptions(),
        ObjectOptions.parse,
        "name=value,…",
        "Options of the object store: for S3 endpoint_url, region, key, secret, token, profile, "
        "addressing_style and ca_file; else those of the fsspec file system. In the file a table. "
        "What is not given comes from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and so on.",
    )
    object_encoding: str = _option(
        AUTO,
        parse_text,
        "",
        "How blobs are kept in the object tier; auto as for hdd-encoding. What is there already "
        "stays as it is.",
        SETTINGS,
    )
    object_deltas: bool = _option(
        True,
        parse_bool,
        "",
        "Whether checkpoints lie in the object tier as lossless differences from the ones before, "
        "where that takes a quarter less; not with object-encoding raw. What is there already "
        "stays as it is.",
    )
    origin_prefixes: tuple[str, ...] = _option(
        (),
        parse_texts,
        "folder or URL",
        "Where clients may have the daemon read files in place, with its own rights: absolute "
        "paths and URLs of folders (may be repeated). Without one: nowhere.",
    )
    origin_options: ObjectOptions = _option(
        ObjectOptions(),
        ObjectOptions.parse,
        "name=value,…",
        "Like object-options, for the URLs of origin-prefixes.",
    )
    reserve_bytes: int = _option(
        256 << 20,
        parse_size,
        "bytes",
        "Bytes that the daemon leaves free on every file system it writes to.",
    )
    ssd_move_bytes_per_second: int = _option(
        0,
        parse_size,
        "bytes per second",
        "Most that background work moves through the ssd tier; 0: no limit. It steps back while "
        "readers wait for the tier in any case.",
    )
    hdd_move_bytes_per_second: int = _option(
        0,
        parse_size,
        "bytes per second",
        "Most that background work moves through the hdd tier; 0: no limit. It steps back while "
        "readers wait for the tier in any case.",
    )
    object_move_bytes_per_second: int = _option(
        0,
        parse_size,
        "bytes per second",
        "Most that background work moves through the object tier; 0: no limit. It steps back while "
        "readers wait for the tier in any case.",
    )
    scrub_interval_seconds: float = _option(
        7 * 86400.0,
        parse_seconds,
        "seconds",
        "From the end of one background scrub, which reads every copy and compares it with its "
        "digests, to the next one; 0: none.",
    )
    scrub_bytes_per_second: int = _option(
        32 << 20,
        parse_size,
        "bytes per second",
        "Most that the background scrub reads from each tier; 0: no limit.",
    )
    fingerprint_bytes_per_second: int = _option(
        256 << 20,
        parse_size,
        "bytes per second",
        "How fast new checkpoints are read for their fingerprints; 0: not until somebody asks.",
    )
    watermarks: str = _option(
        "85,92,97",
        parse_watermarks,
        "percent",
        "LOW,HIGH,STOP of a local tier: above HIGH copies that another tier has are evicted down "
        "to LOW; above STOP the cache adds nothing, which leaves room for checkpoints.",
    )
    lease_seconds: float = _option(
        60.0,
        parse_seconds,
        "seconds",
        "An upload whose client neither writes nor renews for this long ends and is reclaimed.",
    )
    default_policy: str = _option(
        DEFAULT.name,
        parse_text,
        "policy",
        "The policy of datasets and runs that none is assigned to.",
    )
    trash_seconds: float = _option(
        86400.0,
        parse_seconds,
        "seconds",
        "How long a deleted dataset, run or generation can be restored (`forebay trash`); 0: it "
        "goes at once.",
    )
    drain_seconds: float = _option(
        30.0,
        parse_seconds,
        "seconds",
        "How long a stopping daemon finishes sealed packs and running work before it ends.",
    )
    idle_exit: float = _option(
        0.0,
        parse_seconds,
        "seconds",
        "End after this long without a client, once nothing is below local; 0: never.",
    )
    log_level: str = _option(
        "info",
        parse_text,
        "",
        "The least important log lines that are written.",
        ("debug", "info", "warning", "error"),
    )
    log_format: str = _option(
        "text", parse_text, "", "Log lines for people or for machines.", ("text", "json")
    )
    reflection: bool = _option(
        False, parse_bool, "", "Serve gRPC reflection (grpcurl and friends; it needs a token)."
    )

    @property
    def ssd_folder(self) -> Path | None:
        return self._tier_folder(self.ssd_path, "ssd")

    @property
    def hdd_folder(self) -> Path | None:
        return self._tier_folder(self.hdd_path, "hdd")

    @property
    def cache_marks(self) -> Watermarks:
        """Fill levels of the local tiers."""
        return Watermarks.parse(self.watermarks)

    @property
    def object_location(self) -> str | None:
        """URL of the object tier, None without one."""
        if self.object_url == NONE:
            return None
        return self.object_url or f"file://{self.data.resolve() / 'object'}"

    policies: Mapping[str, Policy] = field(default_factory=dict)
    """Of the tables ``[policies.NAME]`` in the file."""

    @property
    def all_policies(self) -> dict[str, Policy]:
        """The built-in policies and the file's own, by name."""
        return all_policies(self.policies)

    @property
    def move_rates(self) -> dict[str, float]:
        """Tier to the bytes per second that background work may move through it; 0: no limit."""
        return {
            "ssd": self.ssd_move_bytes_per_second,
            "hdd": self.hdd_move_bytes_per_second,
            "object": self.object_move_bytes_per_second,
        }

    @property
    def certificate(self) -> tuple[Path, Path] | None:
        """The files of chain and key for TLS, None without."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return self.tls_cert, self.tls_key

    @property
    def rpc_addresses(self) -> tuple[Address, ...]:
        return tuple(self._address(text, "listen", "grpc", "grpcs") for text in self.listen)

    @property
    def http_address(self) -> Address:
        if self.http_listen:
            return self._address(self.http_listen, "http-listen", "http", "https")
        # Who reaches the control calls from elsewhere has to reach the bytes too.
        public = [address for address in self.rpc_addresses if not address.is_loopback]
        if not public:
            return Address("http", "127.0.0.1", 0, tls=False)
        return Address("https" if public[0].tls else "http", public[0].host, 0, tls=public[0].tls)

    def _tier_folder(self, path: str, default: str) -> Path | None:
        if path == NONE:
            return None
        return Path(path).expanduser() if path else self.data / default

    def _address(self, text: str, option: str, plain: str, secure: str) -> Address:
        address = parse_address(text, option, plain, secure)
        if address.tls and self.tls_cert is None:
            raise InvalidRequest(f"{option} = {text!r}: TLS needs tls-cert and tls-key")
        if address.is_loopback or address.tls:
            return address
        if self.tls_cert is not None:
            return Address(secure, address.host, address.port, tls=True)
        if self.insecure:
            return address
        raise InvalidRequest(
            f"{option} = {text!r} can be reached from other machines: give tls-cert and tls-key, "
            "or insecure if the network is trusted"
        )

    def check(self) -> Config:
        """This configuration if its parts fit together; else :class:`InvalidRequest`."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidRequest("tls-cert and tls-key belong together: give both or neither")
        for option, path in (("tls-cert", self.tls_cert), ("tls-key", self.tls_key)):
            if path is not None and not path.is_file():
                raise InvalidRequest(f"{option} = {str(path)!r}: no such file")
        if self.ssd_folder is None and self.hdd_folder is None:
            raise InvalidRequest(
                "ssd-path and hdd-path are both none: new bytes have nowhere to land"
            )
        if self.lease_seconds < 1:
            raise InvalidRequest("lease-seconds: at least 1, clients renew within a third of it")
        for name in set(self.replaced) - {"ssd", "hdd", "object"}:
            raise InvalidRequest(f"replaced = {name!r}: tiers are ssd, hdd and object")
        if self.default_policy not in self.all_policies:
            names = ", ".join(sorted(self.all_policies))
            raise InvalidRequest(
                f"default-policy = {self.default_policy!r}: there is no such policy; there are "
                f"{names}"
            )
        _ = (self.rpc_addresses, self.http_address)
        location = self.object_location
        if location is not None and location.startswith(VOLATILE):
            raise InvalidRequest(
                f"object-url = {location!r}: that is the daemon's own memory, gone with it; use a "
                'place that lasts, or "none"'
            )
        check_folders(
            self.data,
            {
                "ssd-path": self.ssd_folder,
                "hdd-path": self.hdd_folder,
                "object-url": None if location is None else folder_of(location),
            },
        )
        return self


OPTIONS: Final[dict[str, Option]] = {
    option.name: option
    for option in (
        Option(
            name=part.name.replace("_", "-"),
            unit=part.metadata["unit"],
            default=part.default,
            meaning=part.metadata["meaning"],
            parse=part.metadata["parse"],
            choices=part.metadata["choices"],
        )
        for part in fields(Config)
        if "parse" in part.metadata
    )
}
"""Flag name to option, in the order of the docs."""


@dataclass(frozen=True)
class Configured:
    """A checked configuration that remembers where each value is from."""

    config: Config
    origins: dict[str, str]
    """Option name to ``argument``, the variable's name, the file's path, or ``default``."""


def load_config(
    arguments: Mapping[str, object],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> Configured:
    """Put a configuration together: argument > environment > file > default.

    *arguments* holds what was given, by option name. Without *file*, ``forebay.toml`` in the data
    folder is read if it exists. Raises :class:`InvalidRequest` for a key or value that is wrong.
    """
    values, origins = _given(arguments, environment)
    if file is not None:
        _add_file(values, origins, file, file_names_data=True)
    else:
        folder = values.get("data", OPTIONS["data"].default)
        beside = folder / CONFIG_FILE_NAME
        if beside.is_file():
            _add_file(values, origins, beside, file_names_data=False)
    for name, option in OPTIONS.items():
        origins.setdefault(name, "default")
        values.setdefault(name, option.default)
    policies = values.pop(POLICIES, {})
    by_field = {OPTIONS[name].field: value for name, value in values.items()}
    return Configured(
        Config(**by_field, policies=policies).check(), {name: origins[name] for name in OPTIONS}
    )


def _given(
    arguments: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins of what arguments and environment say."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value in arguments.items():
        option = _find(key, "the arguments")
        values[option.name], origins[option.name] = option.read(value, "argument"), "argument"
    known = {variable for option in OPTIONS.values() for variable in option.variables}
    for variable in environment:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            raise _unknown(variable, known, "the environment")
    for option in OPTIONS.values():
        for variable in option.variables:
            if variable in environment and option.name not in values:
                values[option.name] = option.read(environment[variable], variable)
                origins[option.name] = variable
    return values, origins


def _add_file(
    values: dict[str, Any], origins: dict[str, str], file: Path, *, file_names_data: bool
) -> None:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read the configuration {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the configuration {file} is not TOML: {error}") from error
    for key, value in content.items():
        if key == POLICIES:
            values[POLICIES] = parse_policies(value, str(file))
            continue
        option = _find(key, str(file))
        if option.name == "data" and not file_names_data:
            raise InvalidRequest(f"{file} lies in a data folder and cannot name another: drop data")
        parsed = option.read(value, str(file))
        if option.name not in values:
            values[option.name], origins[option.name] = parsed, str(file)


def _find(key: str, where: str) -> Option:
    if (option := OPTIONS.get(key.replace("_", "-"))) is None:
        raise _unknown(key, OPTIONS, where)
    return option


def _unknown(key: str, known: Mapping[str, Any] | set[str], where: str) -> InvalidRequest:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
    return InvalidRequest(f"unknown setting {key!r} in {where}: {advice}")
