"""A pack that a restarted daemon lacks is offered again, as long as that is right; else never.

All ranks are in this process: what they do is in the order in which the test says it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

import forebay
from forebay.checkpoint import save
from forebay.checkpoint.handle import Saved
from forebay.checkpoint.service import CheckpointService, PackTerms
from forebay.checkpoint.snapshot import Part, build_pack
from forebay.checkpoint.upload import PackUpload, past_restart
from forebay.waiting import Deadline
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.ids import GenerationId

NUM_RANKS = 2
SECONDS = 60.0


class Job:
    """The ranks of one generation, which save one tensor each."""

    def __init__(self, client: forebay.Client) -> None:
        self.client = client
        self.service = CheckpointService(client, "run")
        attempt = self.service.begin_attempt(None, NUM_RANKS)
        self.generation = GenerationId("run", attempt, 1)

    def upload(self, rank: int) -> PackUpload:
        tensor = torch.full((1000,), float(rank))
        pack = build_pack([Part(f"t{rank}", (1000,), (0,), tensor)], {}, {})
        terms = PackTerms(self.generation, rank, NUM_RANKS)
        return PackUpload(self.service, terms, pack)

    def copied(self, rank: int) -> PackUpload:
        upload = self.upload(rank)
        deadline = Deadline(SECONDS)
        past_restart(self.service, upload.terms, lambda: upload.copy(deadline), deadline)
        return upload

    def saved(self, upload: PackUpload) -> Saved:
        return Saved(self.service, self.generation, upload, SECONDS)


@pytest.fixture
def job(own_daemon: DaemonProcess, way: str) -> Iterator[Job]:
    with forebay.connect(own_daemon.address()["rpc"]) as client:
        yield Job(client)


def test_a_rank_that_copies_after_the_restart_joins_those_that_copied_before(
    own_daemon: DaemonProcess, job: Job
) -> None:
    first = job.copied(0)
    own_daemon.restart()
    second = job.copied(1)  # it cannot wait for rank 0, which waits for it
    for upload in (first, second):
        save.seal(upload)
    for upload in (first, second):
        job.saved(upload).wait("local", SECONDS)


def test_a_restart_that_another_thread_noticed_first_is_no_refusal(
    own_daemon: DaemonProcess, job: Job
) -> None:
    uploads = [job.copied(rank) for rank in range(NUM_RANKS)]
    own_daemon.restart()
    job.client.status()  # from here on the connection is that to the new daemon
    for upload in uploads:
        save.seal(upload)
    job.saved(uploads[0]).wait("local", SECONDS)


def test_memory_that_a_later_save_was_given_is_never_offered(
    own_daemon: DaemonProcess, job: Job, way: str
) -> None:
    if way == "http":
        pytest.skip("over HTTP each upload has memory of its own")
    upload = job.copied(0)
    assert upload._session is not None
    later = job.service.slot(upload._session)  # as if the daemon lent that slot once more
    upload.seal()
    saved = job.saved(upload)
    own_daemon.restart()
    with pytest.raises(forebay.Conflict, match="a later save has been given the memory"):
        saved.wait("local", SECONDS)
    assert later.is_intact
    later.close()


def test_what_was_deleted_is_not_offered_again(job: Job) -> None:
    upload = job.copied(0)
    upload.seal()
    saved = job.saved(upload)
    generation = job.generation
    job.client.delete_checkpoints("run", attempt=generation.attempt, step=generation.step)
    with pytest.raises(forebay.NotFound):
        saved.wait("local", SECONDS)
    assert job.client.checkpoints("run") == []


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "not sealed"])
def test_a_seal_without_an_answer_counts_if_all_ranks_have_sealed(
    own_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, is_sealed: bool
) -> None:
    real: Callable[..., bool] = CheckpointService.seal_pack
    lost: list[object] = []

    def seal_pack(self: CheckpointService, request: object) -> bool:
        if lost:
            return real(self, request)
        if is_sealed:
            real(self, request)
        lost.append(request)
        raise forebay.DeadlineExceeded("no answer")

    monkeypatch.setattr(CheckpointService, "seal_pack", seal_pack)
    model = torch.nn.Linear(10, 10)
    with (
        forebay.connect(own_daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "run", model=model) as checkpointer,
    ):
        if not is_sealed:
            with pytest.raises(forebay.DeadlineExceeded, match="no answer"):
                checkpointer.save(1)
            assert client.checkpoints("run") == []
        for step in (1, 2):
            checkpointer.save(step).wait("local", SECONDS)
        assert [one.state for one in client.checkpoints("run")] == ["committed"] * 2
