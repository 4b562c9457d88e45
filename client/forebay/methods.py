"""The daemon's control calls as values, so that callers need no gRPC to name one.

``channel.call(Datasets.GetDataset, GetDatasetRequest(name="mnist"))`` is typed: the answer is that
method's response. Names are those of the ``.proto`` files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from google.protobuf.message import Message

from forebay_wire.limits import MAX_COMMIT_BYTES, MAX_MESSAGE_BYTES
from forebay_wire.v1 import admin_pb2 as admin
from forebay_wire.v1 import blobs_pb2 as blobs
from forebay_wire.v1 import checkpoints_pb2 as checkpoints
from forebay_wire.v1 import datasets_pb2 as datasets
from forebay_wire.v1 import integrity_pb2 as integrity
from forebay_wire.v1 import movement_pb2 as movement
from forebay_wire.v1 import plans_pb2 as plans

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True)
class Method(Generic[Request, Response]):
    """One call of one service."""

    path: str
    """``/package.Service/Method``, as gRPC sends it."""
    request: type[Request]
    response: type[Response]
    max_request_bytes: int = MAX_MESSAGE_BYTES

    @property
    def name(self) -> str:
        """``Service.Method``, for messages."""
        return self.path.removeprefix("/forebay.v1.").replace("/", ".")


class Datasets:
    """Unary calls of ``forebay.v1.Datasets``."""

    ListDatasets: Final = Method(
        "/forebay.v1.Datasets/ListDatasets",
        datasets.ListDatasetsRequest,
        datasets.ListDatasetsResponse,
    )
    GetDataset: Final = Method(
        "/forebay.v1.Datasets/GetDataset", datasets.GetDatasetRequest, datasets.Dataset
    )
    CommitVersion: Final = Method(
        "/forebay.v1.Datasets/CommitVersion",
        datasets.CommitVersionRequest,
        datasets.DatasetVersion,
        MAX_COMMIT_BYTES,
    )
    SealPart: Final = Method(
        "/forebay.v1.Datasets/SealPart", datasets.SealPartRequest, datasets.SealPartResponse
    )
    ListParts: Final = Method(
        "/forebay.v1.Datasets/ListParts", datasets.ListPartsRequest, datasets.ListPartsResponse
    )
    DropParts: Final = Method(
        "/forebay.v1.Datasets/DropParts", datasets.DropPartsRequest, datasets.DropPartsResponse
    )
    DefineSplits: Final = Method(
        "/forebay.v1.Datasets/DefineSplits", datasets.DefineSplitsRequest, datasets.Dataset
    )
    DefineFolds: Final = Method(
        "/forebay.v1.Datasets/DefineFolds", datasets.DefineFoldsRequest, datasets.Dataset
    )
    GetStatistics: Final = Method(
        "/forebay.v1.Datasets/GetStatistics", datasets.GetStatisticsRequest, datasets.Statistics
    )
    StoreStatistics: Final = Method(
        "/forebay.v1.Datasets/StoreStatistics", datasets.StoreStatisticsRequest, datasets.Statistics
    )
    DefineSelections: Final = Method(
        "/forebay.v1.Datasets/DefineSelections",
        datasets.DefineSelectionsRequest,
        datasets.Dataset,
        MAX_COMMIT_BYTES,
    )
    DeleteDataset: Final = Method(
        "/forebay.v1.Datasets/DeleteDataset",
        datasets.DeleteDatasetRequest,
        datasets.DeleteDatasetResponse,
    )
    RegisterOrigins: Final = Method(
        "/forebay.v1.Datasets/RegisterOrigins",
        datasets.RegisterOriginsRequest,
        datasets.RegisterOriginsResponse,
    )
    ListOrigins: Final = Method(
        "/forebay.v1.Datasets/ListOrigins",
        datasets.ListOriginsRequest,
        datasets.ListOriginsResponse,
    )
    PinOrigins: Final = Method(
        "/forebay.v1.Datasets/PinOrigins", datasets.PinOriginsRequest, datasets.DatasetVersion
    )
    WaitVersion: Final = Method(
        "/forebay.v1.Datasets/WaitVersion", datasets.WaitVersionRequest, datasets.DatasetVersion
    )


class Checkpoints:
    """Unary calls of ``forebay.v1.Checkpoints``."""

    BeginAttempt: Final = Method(
        "/forebay.v1.Checkpoints/BeginAttempt",
        checkpoints.BeginAttemptRequest,
        checkpoints.Attempt,
    )
    BeginPack: Final = Method(
        "/forebay.v1.Checkpoints/BeginPack", checkpoints.BeginPackRequest, checkpoints.PackSession
    )
    SealPack: Final = Method(
        "/forebay.v1.Checkpoints/SealPack",
        checkpoints.SealPackRequest,
        checkpoints.SealPackResponse,
    )
    WaitGeneration: Final = Method(
        "/forebay.v1.Checkpoints/WaitGeneration",
        checkpoints.WaitGenerationRequest,
        checkpoints.Generation,
    )
    GetGeneration: Final = Method(
        "/forebay.v1.Checkpoints/GetGeneration",
        checkpoints.GetGenerationRequest,
        checkpoints.Generation,
    )
    ReadFingerprints: Final = Method(
        "/forebay.v1.Checkpoints/ReadFingerprints",
        checkpoints.ReadFingerprintsRequest,
        checkpoints.ReadFingerprintsResponse,
    )
    PreparePack: Final = Method(
        "/forebay.v1.Checkpoints/PreparePack",
        checkpoints.PreparePackRequest,
        checkpoints.PackSession,
    )
    ResolveGeneration: Final = Method(
        "/forebay.v1.Checkpoints/ResolveGeneration",
        checkpoints.ResolveGenerationRequest,
        checkpoints.Generation,
    )
    ListRuns: Final = Method(
        "/forebay.v1.Checkpoints/ListRuns",
        checkpoints.ListRunsRequest,
        checkpoints.ListRunsResponse,
    )
    ListGenerations: Final = Method(
        "/forebay.v1.Checkpoints/ListGenerations",
        checkpoints.ListGenerationsRequest,
        checkpoints.ListGenerationsResponse,
    )
    DeleteGeneration: Final = Method(
        "/forebay.v1.Checkpoints/DeleteGeneration",
        checkpoints.DeleteGenerationRequest,
        checkpoints.DeleteGenerationResponse,
    )
    GetRun: Final = Method(
        "/forebay.v1.Checkpoints/GetRun", checkpoints.GetRunRequest, checkpoints.RunDetail
    )
    SetTag: Final = Method(
        "/forebay.v1.Checkpoints/SetTag", checkpoints.SetTagRequest, checkpoints.RunDetail
    )
    SetPin: Final = Method(
        "/forebay.v1.Checkpoints/SetPin", checkpoints.SetPinRequest, checkpoints.Generation
    )
    SetNote: Final = Method(
        "/forebay.v1.Checkpoints/SetNote", checkpoints.SetNoteRequest, checkpoints.Generation
    )
    SetKeep: Final = Method(
        "/forebay.v1.Checkpoints/SetKeep", checkpoints.SetKeepRequest, checkpoints.RunDetail
    )
    Prune: Final = Method(
        "/forebay.v1.Checkpoints/Prune", checkpoints.PruneRequest, checkpoints.PruneResponse
    )


class Blobs:
    """Calls of ``forebay.v1.Blobs``; ``ReadManifest`` streams its answer."""

    BeginUpload: Final = Method(
        "/forebay.v1.Blobs/BeginUpload", blobs.BeginUploadRequest, blobs.UploadSession
    )
    Append: Final = Method("/forebay.v1.Blobs/Append", blobs.AppendRequest, blobs.AppendResponse)
    Seal: Final = Method("/forebay.v1.Blobs/Seal", blobs.SealRequest, blobs.SealedBlob)
    Renew: Final = Method("/forebay.v1.Blobs/Renew", blobs.RenewRequest, blobs.UploadSession)
    Abort: Final = Method("/forebay.v1.Blobs/Abort", blobs.AbortRequest, blobs.AbortResponse)
    ReadManifest: Final = Method(
        "/forebay.v1.Blobs/ReadManifest", blobs.ReadManifestRequest, blobs.ManifestChunk
    )


class Admin:
    """Calls of ``forebay.v1.Admin``; ``Attach`` streams its answer."""

    Handshake: Final = Method(
        "/forebay.v1.Admin/Handshake", admin.HandshakeRequest, admin.HandshakeResponse
    )
    Status: Final = Method("/forebay.v1.Admin/Status", admin.StatusRequest, admin.StatusResponse)
    Attach: Final = Method("/forebay.v1.Admin/Attach", admin.AttachRequest, admin.AttachEvent)


class Integrity:
    """Calls of ``forebay.v1.Integrity``."""

    Scrub: Final = Method(
        "/forebay.v1.Integrity/Scrub", integrity.ScrubRequest, integrity.ScrubState
    )
    GetScrub: Final = Method(
        "/forebay.v1.Integrity/GetScrub", integrity.GetScrubRequest, integrity.ScrubState
    )
    Fsck: Final = Method("/forebay.v1.Integrity/Fsck", integrity.FsckRequest, integrity.FsckReport)
    ListGarbage: Final = Method(
        "/forebay.v1.Integrity/ListGarbage",
        integrity.ListGarbageRequest,
        integrity.ListGarbageResponse,
    )
    CollectGarbage: Final = Method(
        "/forebay.v1.Integrity/CollectGarbage",
        integrity.CollectGarbageRequest,
        integrity.CollectGarbageResponse,
    )


class Movement:
    """Calls of ``forebay.v1.Movement``."""

    Pin: Final = Method("/forebay.v1.Movement/Pin", movement.PinRequest, movement.PinState)
    GetPin: Final = Method("/forebay.v1.Movement/GetPin", movement.GetPinRequest, movement.PinState)
    ListPins: Final = Method(
        "/forebay.v1.Movement/ListPins", movement.ListPinsRequest, movement.ListPinsResponse
    )
    Unpin: Final = Method(
        "/forebay.v1.Movement/Unpin", movement.UnpinRequest, movement.UnpinResponse
    )
    SetPolicy: Final = Method(
        "/forebay.v1.Movement/SetPolicy", movement.SetPolicyRequest, movement.PolicyAssignment
    )
    ListPolicies: Final = Method(
        "/forebay.v1.Movement/ListPolicies",
        movement.ListPoliciesRequest,
        movement.ListPoliciesResponse,
    )
    ListTrash: Final = Method(
        "/forebay.v1.Movement/ListTrash", movement.ListTrashRequest, movement.ListTrashResponse
    )
    RestoreTrash: Final = Method(
        "/forebay.v1.Movement/RestoreTrash", movement.RestoreTrashRequest, movement.TrashEntry
    )
    EmptyTrash: Final = Method(
        "/forebay.v1.Movement/EmptyTrash", movement.EmptyTrashRequest, movement.EmptyTrashResponse
    )
    ListJobs: Final = Method(
        "/forebay.v1.Movement/ListJobs", movement.ListJobsRequest, movement.ListJobsResponse
    )
    Why: Final = Method("/forebay.v1.Movement/Why", movement.WhyRequest, movement.WhyResponse)


class Plans:
    """Calls of ``forebay.v1.Plans`` for readers whose order the daemon does not know."""

    RegisterPlan: Final = Method(
        "/forebay.v1.Plans/RegisterPlan", plans.RegisterPlanRequest, plans.PlanStanding
    )
    AddRanges: Final = Method(
        "/forebay.v1.Plans/AddRanges", plans.AddRangesRequest, plans.PlanStanding
    )
    AdvancePlan: Final = Method(
        "/forebay.v1.Plans/AdvancePlan", plans.AdvancePlanRequest, plans.PlanStanding
    )
    EndPlan: Final = Method(
        "/forebay.v1.Plans/EndPlan", plans.EndPlanRequest, plans.EndPlanResponse
    )
