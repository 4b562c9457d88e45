"""What is said of generations whose tensors lie in several packs, cut in any way."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import forebay
from forebay.checkpoint import export_dcp, export_safetensors
from forebay.checkpoint.diff import CHANGED, UNCHANGED, UNKNOWN, compare, compare_exactly
from forebay.checkpoint.find import Found, find, fingerprints_of
from forebay.checkpoint.service import CheckpointService, PackTerms
from forebay.checkpoint.snapshot import Part, build_pack
from forebay.checkpoint.tensor_bytes import TensorReader, raw_bytes
from forebay.checkpoint.upload import PackUpload
from forebay.client import Client
from forebay.waiting import Deadline
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import GenerationId

Cut = Callable[[str, torch.Tensor], list[tuple[tuple[int, ...], torch.Tensor]]]
"""Name and tensor to the parts of each rank: offsets and values."""


def by(dimension: int, num_ranks: int) -> Cut:
    def cut(name: str, tensor: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        parts, start = [], 0
        for part in tensor.chunk(num_ranks, dimension):
            offsets = tuple(start if axis == dimension else 0 for axis in range(tensor.ndim))
            parts.append((offsets, part.contiguous()))
            start += part.shape[dimension]
        return parts

    return cut


def save(
    client: Client, run: str, tensors: Mapping[str, torch.Tensor], cut: Cut, num_ranks: int
) -> Found:
    service = CheckpointService(client, run)
    generation = GenerationId(run, service.begin_attempt(None, num_ranks), 1)
    for rank in range(num_ranks):
        parts = []
        for name, tensor in tensors.items():
            pieces = cut(name, tensor)
            if rank < len(pieces):
                offsets, piece = pieces[rank]
                parts.append(Part(name, tuple(tensor.shape), offsets, piece))
        structure = {name: tuple(name.split(".")) for name in tensors} if rank == 0 else {}
        upload = PackUpload(
            service, PackTerms(generation, rank, num_ranks), build_pack(parts, {}, structure)
        )
        upload.copy(Deadline(60.0))
        upload.seal()
        upload.close()
    service.wait(generation, "local", 60.0)
    return find(client, run, f"{generation.attempt}/1")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    with (
        DaemonProcess(tmp_path_factory.mktemp("sharded") / "data") as process,
        forebay.connect(process.address()["rpc"]) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found = {"a.big": torch.randn(60, 44, 5), "a.half": torch.randn(33, 40).bfloat16()}
    found["a.big"][50, 40, 4] = math.inf
    found["a.big"][0, 0, 0] = math.nan
    return found


@pytest.fixture(scope="module")
def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"a.big": tensors["a.big"] * 1.001, "a.half": tensors["a.half"].clone()}


def test_the_same_cut_compares_by_sketches(client: Client, tensors, moved) -> None:
    a = save(client, "same-a", tensors, by(1, 3), 3)
    b = save(client, "same-b", moved, by(1, 3), 3)
    found = compare(
        a.committed(), b.committed(), *(fingerprints_of(client, one, 60.0) for one in (a, b))
    )
    big, half = {one.name: one for one in found.tensors}.values()
    assert (big.name, big.status, big.is_exact) == ("a.big", CHANGED, False)
    assert big.relative_change == pytest.approx(0.001, rel=0.35)
    assert big.a is not None
    finite = tensors["a.big"][torch.isfinite(tensors["a.big"])].double()
    assert (big.a.norm, big.a.num_inf) == (pytest.approx(float(finite.norm())), 1)
    assert (half.status, half.relative_change) == (UNCHANGED, 0.0)
    assert not found.is_equal


def test_another_cut_is_said_and_read_exactly(client: Client, tensors, moved) -> None:
    a = save(client, "cut-a", tensors, by(0, 4), 4)
    b = save(client, "cut-b", moved, by(1, 3), 3)
    quick = compare(
        a.committed(), b.committed(), *(fingerprints_of(client, one, 60.0) for one in (a, b))
    )
    for one in quick.tensors:
        assert (one.status, one.relative_change) == (UNKNOWN, None)
        assert "--exact" in one.note
        assert one.a is not None
        assert one.b is not None
        assert one.a.num_inf == one.b.num_inf == (one.name == "a.big")
    with (
        TensorReader(client.transfer, a.committed()) as reader_a,
        TensorReader(client.transfer, b.committed()) as reader_b,
    ):
        told: list[tuple[int, int]] = []
        exact = compare_exactly(reader_a, reader_b, lambda *both: told.append(both))
    by_name = {one.name: one for one in exact.tensors}
    assert by_name["a.half"].status == UNCHANGED
    before, after = (one["a.big"].double().reshape(-1) for one in (tensors, moved))
    finite = torch.isfinite(before)
    apart = (after - before)[finite]
    big = by_name["a.big"]
    assert big.relative_change == pytest.approx(float(apart.norm() / before[finite].norm()))
    assert big.max_abs == pytest.approx(float(apart.abs().max()))
    assert told[-1][0] == told[-1][1] == sum(one.nbytes for one in tensors.values())


@pytest.mark.parametrize("cut", [by(0, 4), by(1, 3), by(1, 4)])
def test_exports_put_the_parts_together(
    client: Client, tensors, tmp_path: Path, cut: Cut, request: pytest.FixtureRequest
) -> None:
    run = f"whole-{abs(hash(request.node.name))}"
    found = save(client, run, tensors, cut, 4)
    with TensorReader(client.transfer, found.committed()) as reader:
        for name, tensor in tensors.items():
            info = found.committed().tensor(name)
            raw = b"".join(bytes(raw_bytes(data)) for _, data in reader.stream(info, 700))
            assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert reader.bytes_read >= tensor.nbytes
    export_safetensors(client, run, tmp_path / "m.safetensors")
    export_dcp(client, run, tmp_path / "dcp")
    safetensors = pytest.importorskip("safetensors.torch")
    loaded = safetensors.load_file(tmp_path / "m.safetensors")
    target = {"a": {"big": torch.zeros(60, 44, 5), "half": torch.zeros(33, 40).bfloat16()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in tensors.items():
        for one in (loaded[name], target["a"][name.split(".")[1]]):
            assert torch.equal(one.view(torch.uint8), tensor.view(torch.uint8))


def test_what_a_reader_reads_is_what_is_needed(client: Client, tensors) -> None:
    found = save(client, "ranges", tensors, by(1, 3), 3).committed()
    info = found.tensor("a.big")
    with TensorReader(client.transfer, found) as reader:
        from forebay.checkpoint.tensor_bytes import blocks

        (block,) = blocks(info.shape, info.item_bytes, rows=(7, 9))
        data = reader.read(info, block)
        assert reader.bytes_read == data.nbytes == 2 * 44 * 5 * 4
    values = np.ascontiguousarray(data).view(np.float32).reshape(2, 44, 5)
    assert (values == tensors["a.big"][7:9].numpy()).all()


@pytest.mark.slow
def test_fingerprints_of_an_encoded_copy_when_the_other_is_damaged(tmp_path: Path) -> None:
    """Nobody asked before the damage: the object tier's copy is read, decoded."""
    options = ("--fingerprint-bytes-per-second", "0")
    with (
        DaemonProcess(tmp_path / "data", *options) as process,
        forebay.connect(process.address()["rpc"]) as client,
    ):
        steady = {"x": torch.arange(700_000, dtype=torch.float32) / 7}
        found = save(client, "one", steady, by(0, 1), 1)
        CheckpointService(client, "one").wait(found.id, "remote", 60.0)
        assert fingerprints_of(client, found) is None
        needle = steady["x"].numpy().tobytes()[:64]
        [file] = [
            one
            for one in (tmp_path / "data" / "ssd" / "files").rglob("*")
            if one.is_file() and needle in one.read_bytes()
        ]
        content = file.read_bytes()
        with file.open("r+b") as raw:
            raw.seek(content.index(needle) + 1000)
            raw.write(b"\xff")
        for one in (tmp_path / "data" / "object" / "data").iterdir():
            assert needle not in one.read_bytes()  # encoded
        known = fingerprints_of(client, found, 60.0)
        assert known is not None
        [[one]] = known.values()
        assert one.norm == pytest.approx(float(steady["x"].double().norm()), rel=1e-12)
        assert one.max == float(steady["x"][-1])
        assert "is quarantined" in process.log()
