"""zarr's own tests of stores, over a session that is not committed; and over one that goes on from
a version, where what is set lies over what was committed."""

from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import Buffer, cpu
from zarr.core.sync import sync
from zarr.testing.store import StoreTests

from forebay.zarr import ForebayStore
from forebay.zarr_session import Session, State, read_value
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import new_random_name


class TestSession(StoreTests[ForebayStore, cpu.Buffer]):
    store_cls = ForebayStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, daemon: DaemonProcess, tmp_path: Path) -> dict[str, Any]:
        name = f"zarr-{new_random_name()}"
        return {"name": name, "address": daemon.address()["rpc"], "session": tmp_path / "session"}

    async def set(self, store: ForebayStore, key: str, value: Buffer) -> None:
        self.layer(store)
        session = Session(store.session)
        session.put(session.state, key, value.to_bytes())

    async def get(self, store: ForebayStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(bytes(read_value(self.layer(store) / "set" / key)))

    def layer(self, store: ForebayStore) -> Path:
        session = Session(store.session)
        session.begin(State(), 0, "")  # unless it has begun
        return store.session / "layers" / session.state().layers[-1]

    def test_store_repr(self, store: ForebayStore) -> None:
        assert repr(store).startswith("ForebayStore('zarr-")
        assert str(store).startswith("forebay://datasets/zarr-")

    def test_store_supports_writes(self, store: ForebayStore) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: ForebayStore) -> None:
        assert store.supports_listing


class TestSessionOverAVersion(TestSession):
    """All of it again, where a version with other keys, all deleted since, lies below."""

    @pytest.fixture
    def store_kwargs(self, daemon: DaemonProcess, tmp_path: Path) -> dict[str, Any]:
        name = f"zarr-{new_random_name()}"
        kwargs = {"name": name, "address": daemon.address()["rpc"], "session": tmp_path / "session"}
        store = ForebayStore(**kwargs)
        keys = ("foo", "c/0", "zarr.json", "k", "k2", "foo-bar/zarr.json")
        for key in keys:
            sync(store.set(key, self.buffer_cls.from_bytes(b"before")))
        store.commit()
        for key in keys:
            sync(store.delete(key))
        return kwargs
