"""Python scorers for tests, importable in Ray's workers."""

import os
import signal
import time
from pathlib import Path


def num_words(conversations: list, responses: list) -> list[float]:
    return [float(len(text.split())) for text in responses]


def num_calm(conversations: list, responses: list) -> list[float]:
    return [-0.5 * text.split().count("w1") - 0.25 * text.split().count("w2") for text in responses]


def constant(conversations: list, responses: list) -> list[float]:
    return [1.0 for _ in responses]


def not_a_number(conversations: list, responses: list) -> list[float]:
    return [float("nan") if index == 1 else 0.0 for index, _ in enumerate(responses)]


def one_short(conversations: list, responses: list) -> list[float]:
    return [0.0 for _ in responses[1:]]


def kills_its_actor_once(conversations: list, responses: list) -> list[float]:
    """SIGKILL the actor in the middle of its second shard, the first time that shard is tried."""
    folder = Path(os.environ["CAN_DIST_TEST_KILLS"])
    (folder / f"call-{time.monotonic_ns()}").touch()
    calls, killed = len(list(folder.glob("call-*"))), folder / "killed"
    if calls == 2 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return num_words(conversations, responses)


def always_kills_its_actor(conversations: list, responses: list) -> list[float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def slow(conversations: list, responses: list) -> list[float]:
    time.sleep(0.7)
    return num_words(conversations, responses)
