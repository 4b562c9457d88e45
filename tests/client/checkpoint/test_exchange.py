"""Generations as foreign checkpoints, and foreign checkpoints as generations."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict

import forebay
from forebay.checkpoint import export_dcp, export_safetensors, import_checkpoint
from forebay.checkpoint.find import find
from forebay.checkpoint.importing import read_foreign
from forebay.checkpoint.safetensors_format import INDEX_FILE
from forebay.checkpoint.tensor_bytes import blocks
from forebay.client import Client
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import (
    AlreadyExists,
    IntegrityError,
    InvalidRequest,
    NotFound,
    UnsupportedObject,
)
from forebay_wire.failpoints import CLIENT_EXPORT, VARIABLE

safetensors = pytest.importorskip("safetensors", reason="compares with the reference reader")
safetensors_torch = pytest.importorskip("safetensors.torch")


def state() -> dict[str, Any]:
    """Every dtype that safetensors has, shapes at the edges, tied tensors, objects."""
    weight = torch.randn(70, 33)
    kinds = {
        "f64": torch.randn(3, dtype=torch.float64),
        "f16": torch.randn(5).half(),
        "bf16": torch.randn(7, 3).bfloat16(),
        "e4m3": torch.randn(9).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(9).to(torch.float8_e5m2),
        "i64": torch.arange(11),
        "u8": torch.arange(200, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "c64": torch.randn(4, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    model = {"weight": weight, "tied": weight, "layer": kinds}
    return {"model": model, "epoch": 3, "rng": b"x" * 2000, "inner": [torch.arange(3), "text"]}


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory):
    with DaemonProcess(tmp_path_factory.mktemp("exchange") / "data") as process:
        yield process


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    torch.manual_seed(1)
    return state()


@pytest.fixture(scope="module")
def client(process: DaemonProcess, saved: dict[str, Any], tmp_path_factory):
    """Connected; the run ``run`` holds the state, as torch.save wrote it."""
    file = tmp_path_factory.mktemp("foreign") / "state.pt"
    torch.save(saved, file)
    with forebay.connect(process.address()["rpc"]) as client:
        import_checkpoint(client, "run", file, step=7)
        yield client


def tensors(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = saved["model"]
    flat = {f"model.layer.{name}": tensor for name, tensor in model["layer"].items()}
    return {"model.weight": model["weight"], "model.tied": model["tied"], **flat}


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.numel():
        return True
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*raw)


@pytest.mark.parametrize("limit", [5 * 10**9, 5000])
def test_safetensors_are_what_the_reference_reads(
    client: Client, saved: dict[str, Any], tmp_path: Path, limit: int
) -> None:
    done = export_safetensors(
        client, "run@7", tmp_path / "out", only=["model.*"], strip_prefix="model.",
        max_shard_bytes=limit,
    )  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    files = [file for file in done.files if file.suffix == ".safetensors"]
    for file in files:
        found.update(safetensors_torch.load_file(file))
    expected = {name.removeprefix("model."): one for name, one in tensors(saved).items()}
    assert done.tied == {"weight": "tied"}
    del expected["weight"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert equal(found[name], tensor), name
    assert (tmp_path / "out" / INDEX_FILE).is_file() == (len(files) > 1) == (limit == 5000)
    if limit == 5000:
        index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
        for file in files:
            with safetensors.safe_open(file, "pt") as opened:
                assert all(index["weight_map"][name] == file.name for name in opened.keys())  # noqa: SIM118
        assert index["metadata"]["total_size"] == done.num_bytes
        assert file.name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"


def test_safetensors_go_round(client: Client, saved: dict[str, Any], tmp_path: Path) -> None:
    export_safetensors(client, "run", tmp_path / "m.safetensors", only=["model.*"])
    told: list[tuple[int, int]] = []
    done = import_checkpoint(
        client, "again", tmp_path / "m.safetensors", progress=lambda *both: told.append(both)
    )
    assert told[-1] == (done.num_bytes, done.num_bytes)
    flat = read_foreign(tmp_path / "m.safetensors")
    assert set(flat.items) == tensors(saved).keys()
    found = forebay.checkpoint.open(client, "again")
    for name, tensor in tensors(saved).items():
        assert equal(found[name][...], tensor), name
    places = find(client, "again").committed().tensors
    assert places["model.tied"].places == places["model.weight"].places
    assert done.num_tensors == len(tensors(saved))


def test_dcp_loads_what_was_exported(client: Client, saved: dict[str, Any], tmp_path: Path) -> None:
    export_dcp(client, "run", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        ".metadata", "__0_0.distcp"
    ]  # fmt: skip
    blank = {name: torch.zeros_like(one) for name, one in saved["model"]["layer"].items()}
    target: dict[str, Any] = {
        "model": {"weight": torch.zeros(70, 33), "tied": torch.zeros(70, 33), "layer": blank},
        "epoch": 0,
        "rng": b"",
        "inner": [torch.zeros(3, dtype=torch.int64), ""],
    }
    dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert equal(target["model"]["weight"], saved["model"]["weight"])
    for name, tensor in saved["model"]["layer"].items():
        assert equal(blank[name], tensor), name
    assert (target["epoch"], target["rng"]) == (3, b"x" * 2000)
    assert equal(target["inner"][0], saved["inner"][0])
    assert target["inner"][1] == "text"
    dcp.save(saved, checkpoint_id=tmp_path / "stock", no_dist=True)
    ours, stock = (
        dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("out", "stock")
    )
    assert ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()


def test_dcp_goes_round_with_names_and_paths(
    client: Client, saved: dict[str, Any], tmp_path: Path
) -> None:
    dcp.save(
        {"model": saved["model"], "epoch": 3},
        checkpoint_id=tmp_path / "dcp",
        no_dist=True,
    )
    import_checkpoint(client, "dcp", tmp_path / "dcp", step=2)
    export_dcp(client, "dcp@2", tmp_path / "out", only=["model.*"], strip_prefix="model.")
    target = {"layer": {"bf16": torch.zeros(7, 3).bfloat16()}, "weight": torch.zeros(70, 33)}
    dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert equal(target["layer"]["bf16"], saved["model"]["layer"]["bf16"])
    assert equal(target["weight"], saved["model"]["weight"])


def test_plain_weights_come_into_a_checkpointer_as_the_page_says(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "checkpoints" / "inspecting.md"
    found = re.search(
        r"^```python\n(torch\.save.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    wanted = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters())
    save, _, restore = found[1].partition("checkpointer = ")
    names = {"torch": torch, "forebay": forebay, "client": client}
    names |= {"model": model, "optimizer": optimizer}
    monkeypatch.chdir(tmp_path)
    exec(save, names)  # noqa: S102
    with torch.no_grad():
        model[0].weight.zero_()
    exec(f"checkpointer = {restore}", names)  # noqa: S102
    names["checkpointer"].close()
    assert equal(model[0].weight, wanted)

    export_safetensors(client, "pretrained", tmp_path / "plain.safetensors", strip_prefix="model.")
    import_checkpoint(client, "bare", tmp_path / "plain.safetensors")
    import_checkpoint(client, "round", tmp_path / "plain.safetensors", add_prefix="model.")
    other = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with (
        forebay.Checkpointer(client, "bare", model=other) as one,
        pytest.raises(forebay.InvalidRequest, match=r"only 0.bias, 0.weight; .*add-prefix model\."),
    ):
        one.restore()
    with forebay.Checkpointer(client, "round", model=other) as one:
        one.restore()
    assert equal(other[0].weight, wanted)
    with pytest.raises(forebay.InvalidRequest, match="empty part"):
        import_checkpoint(client, "none", tmp_path / "weights.pt", add_prefix="model..")


def test_a_checkpointer_restores_what_was_imported(client: Client, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    names = get_state_dict(model, optimizer)
    dcp.save(
        {"model": names[0], "optimizer": names[1]}, checkpoint_id=tmp_path / "dcp", no_dist=True
    )
    import_checkpoint(client, "trained", tmp_path / "dcp", step=5)
    other = torch.nn.Linear(4, 3)
    moments = torch.optim.AdamW(other.parameters())
    with forebay.Checkpointer(client, "trained", model=other, optimizer=moments) as checkpointer:
        resumed = checkpointer.restore("latest")
        assert resumed is not None
        assert resumed.step == 5
    assert equal(other.weight, model.weight)
    state_of = [one.state[p] for one, p in ((optimizer, model.weight), (moments, other.weight))]
    assert equal(state_of[0]["exp_avg"], state_of[1]["exp_avg"])
    export_dcp(client, "trained", tmp_path / "out")
    again = torch.nn.Linear(4, 3)
    blank = get_state_dict(again, torch.optim.AdamW(again.parameters()))
    target = {"model": blank[0], "optimizer": blank[1]}
    dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert equal(target["optimizer"]["state"]["weight"]["exp_avg"], state_of[0]["exp_avg"])
    assert target["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_what_would_run_code_is_refused_by_name(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harm()}, tmp_path / "harm.pt")
    with pytest.raises(UnsupportedObject, match="mkdir"):
        import_checkpoint(client, "harm", tmp_path / "harm.pt")
    dcp.save({"x": torch.zeros(2), "y": Harm()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UnsupportedObject, match=r"y holds posix\.mkdir"):
        import_checkpoint(client, "harm", tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UnsupportedObject, match="mkdir"):
        import_checkpoint(client, "harm", tmp_path / "dcp")
    assert not (tmp_path / "harm").exists()
    assert "harm" not in {one.run for one in client.runs()}


@pytest.mark.parametrize("name", ["os.mkdir", "dataclass", "Sequence"])
def test_what_torch_s_descriptions_import_is_none_of_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.distcp").touch()
    module = b"torch.distributed.checkpoint.metadata"
    text = [bytes([0x8C, len(one)]) + one for one in (module, name.encode())]
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"".join(text) + b"\x93.")
    with pytest.raises((UnsupportedObject, IntegrityError)) as raised:
        read_foreign(tmp_path)
    assert "Metadata" not in str(raised.value)


class Named:
    """Pickled as Python before 3.11.4 pickles members of enumerations."""

    def __init__(self, kind: type, name: str) -> None:
        self.found = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.found


@pytest.mark.parametrize(
    ("named", "error"),
    [
        (Named(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"), "holds a _MEM_FORMAT_ENCODING"),
        (Named(_MEM_FORMAT_ENCODING, "mro"), "names mro of <enum '_MEM_FORMAT_ENCODING'>"),
        (Named(Metadata, "__init__"), "names __init__ of <class"),
    ],
)
def test_members_of_torch_s_enumerations_alone_are_named(
    tmp_path: Path, named: Named, error: str
) -> None:
    (tmp_path / "x.distcp").touch()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(named))
    with pytest.raises((UnsupportedObject, IntegrityError), match=error):
        read_foreign(tmp_path)


@pytest.mark.parametrize("export", [export_safetensors, export_dcp])
def test_an_export_that_fails_leaves_nothing(client: Client, tmp_path: Path, export: Any) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for output in ("out", "out.safetensors")[: 1 + (export is export_safetensors)]:
        with pytest.raises(BaseException):  # noqa: B017 - torch wraps it
            export(client, "run", tmp_path / output, only=["model.*"], progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_cut_or_no_checkpoint_is_refused(client: Client, tmp_path: Path) -> None:
    export_safetensors(client, "run", tmp_path / "out", only=["model.*"], max_shard_bytes=5000)
    file = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    content = file.read_bytes()
    for size in (4, 40, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(IntegrityError, match=r"cut short|no safetensors"):
            import_checkpoint(client, "cut", tmp_path / "out")
    file.unlink()
    with pytest.raises(NotFound, match="incomplete"):
        import_checkpoint(client, "cut", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidRequest, match="no checkpoint"):
        import_checkpoint(client, "cut", tmp_path / "nothing")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    with pytest.raises((IntegrityError, UnsupportedObject)):
        import_checkpoint(client, "cut", tmp_path / "junk.pt")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(IntegrityError, match=r"what is imported is a folder of .*safetensors"):
        import_checkpoint(client, "cut", tmp_path / "notes.txt")
    with pytest.raises(NotFound, match=r"there is no file or folder .*absent"):
        import_checkpoint(client, "cut", tmp_path / "absent")


def test_exports_say_what_does_not_fit(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nope"):
        export_safetensors(client, "run", tmp_path / "out", only=["nope.*"])
    (tmp_path / "there").mkdir()
    with pytest.raises(AlreadyExists):
        export_safetensors(client, "run", tmp_path / "there")
    with pytest.raises(InvalidRequest, match="name a folder"):
        export_safetensors(client, "run", tmp_path / "m.safetensors", max_shard_bytes=100)
    torch.save({"wide": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "wide.pt")
    import_checkpoint(client, "wide", tmp_path / "wide.pt")
    with pytest.raises(InvalidRequest, match=r"wide .complex128"):
        export_safetensors(client, "wide", tmp_path / "out")
    done = export_safetensors(client, "run", tmp_path / "out")
    assert sorted(done.left_out) == ["epoch", "inner", "rng"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there", "wide.pt"]


@pytest.mark.parametrize(
    ("form", "point"),
    [
        ("safetensors", CLIENT_EXPORT[0]),
        pytest.param("safetensors", CLIENT_EXPORT[1], marks=pytest.mark.slow),
        pytest.param("dcp", CLIENT_EXPORT[1], marks=pytest.mark.slow),  # torch writes its files
    ],
)
def test_a_killed_export_leaves_nothing_that_looks_whole(
    process: DaemonProcess, client: Client, tmp_path: Path, point: str, form: str
) -> None:
    arguments = ["checkpoint", "export", "run@7", str(tmp_path / "out"), "--format", form]
    ended = subprocess.run(
        [sys.executable, "-m", "forebay.cli", *arguments, "--data", str(process.data)],
        env={**os.environ, VARIABLE: point},
        timeout=60,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())
    export_safetensors(client, "run@7", tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (4, 6, 5), (1, 700), (300, 1)])
@pytest.mark.parametrize("limit", [1, 8, 64, 10**6])
def test_blocks_cover_a_tensor_in_order(shape: tuple[int, ...], limit: int) -> None:
    whole = torch.arange(int(torch.Size(shape).numel())).reshape(shape)
    found = []
    for block in blocks(shape, 8, limit):
        part = whole
        for dimension, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
            part = part.narrow(dimension, offset, size)
        assert part.numel() * 8 <= max(limit, 8)
        found += part.reshape(-1).tolist()
    assert found == list(range(whole.numel()))
