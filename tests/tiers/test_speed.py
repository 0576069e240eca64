"""What a tier is expected to take, from what it took."""

from __future__ import annotations

import random
import threading

import pytest

from lmkv.tiers.speed import ReadSpeed

MIB = 1024**2


def test_nothing_is_said_before_enough_is_known() -> None:
    speed = ReadSpeed()
    for _ in range(2):
        speed.add(MIB, 0.1)
        assert speed.seconds(MIB) is None
    speed.add(0, 1.0)
    speed.add(MIB, 0.0)
    assert speed.seconds(MIB) is None, "loads of nothing say nothing"
    speed.add(MIB, 0.1)
    assert speed.seconds(MIB) == pytest.approx(0.1)


def test_latency_and_bandwidth_are_told_apart() -> None:
    speed, numbers = ReadSpeed(), random.Random(1)
    for _ in range(24):
        size = numbers.randrange(1, 64) * MIB
        speed.add(size, 0.02 + size / 1e9 * numbers.uniform(0.95, 1.05))
    assert speed.seconds(1000) == pytest.approx(0.02, abs=0.005)
    assert speed.seconds(100 * MIB) == pytest.approx(0.02 + 100 * MIB / 1e9, rel=0.1)


def test_a_few_that_were_held_up_do_not_count() -> None:
    speed = ReadSpeed()
    for number in range(20):
        speed.add((1 + number) * MIB, (1 + number) * 1e-3 + (5.0 if number % 7 == 3 else 0.0))
    assert speed.seconds(10 * MIB) == pytest.approx(0.010, rel=0.2)


def test_loads_of_one_size_scale() -> None:
    speed = ReadSpeed()
    for _ in range(5):
        speed.add(8 * MIB, 0.008)
    assert speed.seconds(16 * MIB) == pytest.approx(0.016)


def test_more_bytes_never_take_less() -> None:
    speed, numbers = ReadSpeed(), random.Random(2)
    for _ in range(300):
        speed.add(numbers.randrange(1, 100 * MIB), numbers.uniform(1e-4, 3.0))
        sizes = [speed.seconds(size) for size in (0, 1, MIB, 50 * MIB, 500 * MIB)]
        if sizes[0] is not None:
            assert sizes == sorted(sizes, key=float)  # type: ignore[arg-type]
            assert sizes[0] >= 0.0


def test_what_was_long_ago_is_forgotten() -> None:
    speed = ReadSpeed()
    for _ in range(24):
        speed.add(MIB, 9.0)
    for _ in range(24):
        speed.add(MIB, 0.001)
    assert speed.seconds(MIB) == pytest.approx(0.001)


def test_threads_may_share_it() -> None:
    speed = ReadSpeed()

    def work() -> None:
        for number in range(300):
            speed.add(MIB * (1 + number % 5), 0.01)
            speed.seconds(MIB)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert speed.seconds(MIB) is not None
