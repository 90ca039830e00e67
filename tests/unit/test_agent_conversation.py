"""What an agent sends: nothing that can't be sent silences what comes after it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fluxmesh.bounds import sendable
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import UsageError
from fluxmesh.wire import messages
from fluxmesh.wire.limits import MAX_HEADER
from fluxmesh.wire.protocol import encode
from fluxmesh_agent.conversation import CoordinatorConversation
from fluxmesh_agent.service import fitting


class EncodingConnection:
    """Keeps what can be encoded."""

    user = label = "a user"

    def __init__(self) -> None:
        self.sent: list[tuple[messages.Message, int]] = []

    async def send(self, message: messages.Message, seq: int) -> None:
        encode(message, seq)
        self.sent.append((message, seq))


def test_an_answer_that_cannot_be_sent_is_refused_and_the_next_ones_go_out() -> None:
    async def scene() -> list[tuple[messages.Message, int]]:
        connection: Any = EncodingConnection()
        conversation = CoordinatorConversation(connection)
        conversation.answer(1, messages.Refused("internal", "x" * 5000))
        conversation.tell(messages.LeaseQueued(1, float("inf")))
        conversation.answer(2, messages.Done())
        async with asyncio.timeout(60):
            while len(connection.sent) < 2:
                await asyncio.sleep(0.01)
        await conversation.close()
        sent: list[tuple[messages.Message, int]] = connection.sent
        return sent

    done, refused = asyncio.run(scene())
    assert done == (messages.Done(), 2)
    assert isinstance(refused[0], messages.Refused) and refused[1] == 1
    assert "could not be sent" in refused[0].text


@pytest.mark.parametrize("line", ["a" * 126, "ü" * 1900, "", "\ufffd" * 2000])
def test_as_much_of_a_log_is_sent_as_one_message_holds(line: str) -> None:
    lines = fitting([f"{number} {line}"[:2000] for number in range(10_000)])
    encode(messages.Logs(lines), 1)
    assert lines[-1].startswith("9999")
    packed = sum(len(each.encode()) for each in lines)
    assert len(lines) == 10_000 or packed > MAX_HEADER / 2


def test_any_text_becomes_one_that_can_be_sent() -> None:
    for text in ("x" * 10_000, "a name \udcff of bytes", ""):
        encode(messages.Refused("internal", sendable(text)), 1)


def test_a_shard_that_does_not_exist_is_refused_where_it_is_named() -> None:
    model = ModelVariant("dev")
    own: dict[str, Any] = {"fence": 1, "job": "job", "ring_generation": 0, "weights": model}
    for shard, shards in ((2, 2), (5, 2), (1, 1)):
        with pytest.raises(UsageError, match=f"Shard {shard} of {shards} does not exist"):
            messages.Load(**own, shard=shard, shards=shards)
        with pytest.raises(UsageError, match=f"Shard {shard} of {shards} does not exist"):
            messages.Keep(weights=model, shards=shards, shard=shard)
