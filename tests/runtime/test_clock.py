"""The virtual clock."""

from __future__ import annotations

import asyncio
import threading
import time

from flowc.runtime.clock import VirtualLoop


def test_time_jumps() -> None:
    loop = VirtualLoop()
    order = []

    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append((seconds, loop.time()))

    async def main() -> None:
        await asyncio.gather(wait(3600), wait(0.1), wait(60))

    start = time.monotonic()
    loop.run(main())
    assert time.monotonic() - start < 5
    assert order == [(0.1, 0.1), (60, 60.0), (3600, 3600.0)]
    assert loop.is_closed()


def test_a_seed_repeats() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return [await loop.some_time(5) for _ in range(4)]

    assert VirtualLoop(3).run(main()) == VirtualLoop(3).run(main())
    assert VirtualLoop(3).run(main()) != VirtualLoop(4).run(main())


def test_the_clock_waits_for_announced_threads() -> None:
    loop = VirtualLoop()

    async def main() -> float:
        answer = loop.create_future()

        def work() -> None:
            time.sleep(0.02)
            loop.call_soon_threadsafe(answer.set_result, None)

        timer = asyncio.create_task(asyncio.sleep(1000))
        with loop.real_work():
            thread = threading.Thread(target=work)
            thread.start()
            await answer
        at = loop.time()
        thread.join()
        await timer
        return at

    assert loop.run(main()) == 0.0
    assert loop.time() == 1000.0


def test_tasks_left_behind_are_cancelled() -> None:
    left = []

    async def main() -> None:
        left.append(asyncio.create_task(asyncio.sleep(10)))

    VirtualLoop().run(main())
    assert left[0].cancelled()
