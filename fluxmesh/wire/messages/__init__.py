"""What coordinator, agent and engine say to one another: one frozen dataclass a message. Pure.

`protocol.py` turns them into a msgpack header and raw frames and back, and holds each field to the
bounds in its annotation; the transports carry them. An array travels as a frame of its own,
uncopied.

    coordinator ── request ──► agent ── work ──► engine
    coordinator ◄── answer, report ── agent ◄── report ── engine

Every request of a coordinator gets one answer, matched by the `seq` of the envelope (`Refused`
where it can't be done). Reports come by themselves, between the answers. What changes a host
(`Changing`) carries the `fence` of the sender's lease, and an agent refuses an old one. Work
carries `job` and `ring_generation`; reports repeat them, so that what is left over from another job
or ring is recognised and dropped.

    base          what every message is, and the fields that many have
    conversation  what any trusted coordinator may ask, and the answers
    status        how a host and its engine stand
    lease         who may change a host, and what the holder may send beside work
    parcel        how a checkpoint goes from one host to another
    unit          what all units of work have in common, and all reports of an engine
    ring          how engines become one ring
    work          the units that make pictures, each with its reports
    training      the units of a training: not here by name, but as `messages.training`

A new unit of work is a class in `work`, `training` or a module beside them: what agent, engine and
coordinator need to know of it stands on the class (`unit.EngineUnit`).
"""

# ruff: noqa: F401  (this is the one namespace of all that stands below)
from fluxmesh.wire.messages import training
from fluxmesh.wire.messages.base import Changing, Features, Message, Report
from fluxmesh.wire.messages.conversation import (
    AskLogs,
    AskStatus,
    Done,
    Heartbeat,
    Hello,
    Keep,
    LeaveRing,
    LinkRate,
    ListenForLink,
    Logs,
    NoteSize,
    Ports,
    ProbeLink,
    Refused,
    ShutDown,
    Welcome,
)
from fluxmesh.wire.messages.lease import (
    AskLease,
    Cancel,
    Found,
    Granted,
    HasFile,
    Kill,
    LeaseQueued,
    LeaveQueue,
    Lost,
    PutFile,
    TellProgress,
)
from fluxmesh.wire.messages.parcel import (
    AskModel,
    ModelAwaited,
    ModelHere,
    ModelParcel,
    ModelProgress,
    ParcelFile,
    ReceiveModel,
    SendModel,
    StopModel,
)
from fluxmesh.wire.messages.ring import AskPorts, Join, Joined, ring_name
from fluxmesh.wire.messages.status import (
    Account,
    Device,
    EngineCounters,
    JobProgress,
    LeaseHolder,
    Reading,
    State,
    Status,
    WaitingJob,
)
from fluxmesh.wire.messages.unit import (
    ENGINE_KILLED,
    PEER_LATE,
    WARM_STEP,
    Beat,
    Cancelled,
    EngineReport,
    EngineUnit,
    Failed,
    LoadProgress,
    ModelWork,
    Work,
    WorkReport,
)
from fluxmesh.wire.messages.work import (
    Decode,
    Encode,
    EncodePictures,
    EncodeSource,
    Load,
    Loaded,
    Measure,
    MeasureRing,
    Paint,
    Pictured,
    PicturesEncoded,
    RingTimed,
    SourceEncoded,
    Stepped,
    TextEncoded,
    Timed,
    Warm,
    Warmed,
)
