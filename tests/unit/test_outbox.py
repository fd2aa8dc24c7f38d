"""What waits to be sent to a robot that may read slowly."""

import asyncio

from policy_server.gateway.stream.outbox import Close, Outbox


async def sent(outbox: Outbox) -> list:
    """Return what would be sent now, up to the end of the connection."""
    frames = []
    while True:
        try:
            frame = await asyncio.wait_for(outbox.next(), 0.01)
        except TimeoutError:
            return frames
        frames.append(frame)
        if isinstance(frame, Close):
            return frames


async def test_messages_leave_in_their_order() -> None:
    outbox = Outbox()
    for place in range(3):
        outbox.put({"place": place})
    assert await sent(outbox) == [{"place": 0}, {"place": 1}, {"place": 2}]


async def test_a_chunk_takes_the_place_of_one_that_has_not_left() -> None:
    outbox = Outbox()
    for seq in (1, 2, 3):
        outbox.put_chunk({"seq": seq})
    outbox.put({"type": "ping"})
    assert await sent(outbox) == [{"type": "ping"}, {"seq": 3}]


async def test_a_chunk_of_an_episode_that_is_over_does_not_leave() -> None:
    outbox = Outbox()
    outbox.put_chunk({"seq": 1})
    outbox.drop_chunk()
    outbox.put_chunk({"seq": 2})
    assert await sent(outbox) == [{"seq": 2}]
    outbox.drop_chunk()
    assert await sent(outbox) == []


async def test_everything_leaves_before_the_end() -> None:
    outbox = Outbox()
    outbox.close(Close(1012, "bye"))
    outbox.put_chunk({"seq": 1})
    outbox.put({"type": "error"})
    assert await sent(outbox) == [{"type": "error"}, {"seq": 1}, Close(1012, "bye")]
    assert await outbox.next() == Close(1012, "bye"), "it has ended for whoever asks again"


async def test_a_robot_that_never_reads_fills_no_memory_and_the_oldest_are_lost() -> None:
    outbox = Outbox()
    for place in range(10_000):
        outbox.put({"place": place})
        outbox.put_chunk({"seq": place})
    assert await sent(outbox) == [*({"place": place} for place in range(10_000 - 64, 10_000)), {"seq": 9_999}]


async def test_whoever_waits_is_woken_by_whatever_comes() -> None:
    for come in (
        lambda outbox: outbox.put({"type": "ping"}),
        lambda outbox: outbox.put_chunk({"type": "chunk"}),
        lambda outbox: outbox.close(Close(1000)),
    ):
        outbox = Outbox()
        waiting = asyncio.create_task(outbox.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        come(outbox)
        assert await asyncio.wait_for(waiting, 10)


async def test_one_who_gives_up_waiting_takes_nothing_with_it() -> None:
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.next())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    outbox.put({"type": "ping"})
    assert await outbox.next() == {"type": "ping"}
