"""Python scorers, good and bad, for `kind: callable` in a configuration; Ray's workers import them too."""

import json
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


def not_a_number_at_poison(conversations: list, responses: list) -> list[float]:
    words = num_words(conversations, responses)
    return [float("nan") if "poison" in text else score for text, score in zip(responses, words, strict=True)]


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


def ends_at_poison(conversations: list, responses: list) -> list[float]:
    """Ends the process, as a crash in native code would, at any response that says so."""
    if any("poison" in text for text in responses):
        os._exit(1)
    return num_words(conversations, responses)


def ends_at_four(conversations: list, responses: list) -> list[float]:
    """Ends the process when it is given four responses at once: what memory does."""
    if len(responses) >= 4:
        os._exit(1)
    return num_words(conversations, responses)


def hangs_at_poison(conversations: list, responses: list) -> list[float]:
    if any("poison" in text for text in responses):
        time.sleep(3600)
    return num_words(conversations, responses)


def stops_its_actor_once(conversations: list, responses: list) -> list[float]:
    """SIGSTOP the actor in the middle of its second shard, the first time that shard is tried."""
    folder = Path(os.environ["CAN_DIST_TEST_FOLDER"])
    (folder / f"call-{time.monotonic_ns()}").touch()
    stopped = folder / "stopped"
    if len(list(folder.glob("call-*"))) == 2 and not stopped.exists():
        stopped.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return num_words(conversations, responses)


def takes_memory_once(conversations: list, responses: list) -> list[float]:
    """Takes 100 MB after the other until the process is killed; the next process behaves."""
    taken = Path(os.environ["CAN_DIST_TEST_FOLDER"]) / "taken"
    if not taken.exists():
        taken.touch()
        blocks = []
        for _ in range(60):
            blocks.append(bytearray(b"x" * (100 << 20)))
            time.sleep(0.05)
        time.sleep(30)
    return num_words(conversations, responses)


def takes_memory_by_batch(conversations: list, responses: list) -> list[float]:
    """Takes memory in proportion to its batch: more than there is for more than two responses."""
    blocks = []
    for _ in range(30 * (len(responses) > 2)):
        blocks.append(bytearray(b"x" * (200 << 20)))
        time.sleep(0.05)
    time.sleep(30 * bool(blocks))
    return num_words(conversations, responses)


def tells_where(conversations: list, responses: list) -> list[float]:
    """Writes the node and the resources of its actor to a file; slow enough for every actor to get a shard."""
    import ray

    context = ray.get_runtime_context()
    where = {"node": context.get_node_id(), "resources": context.get_assigned_resources()}
    folder = Path(os.environ["CAN_DIST_TEST_FOLDER"])
    (folder / f"where-{time.monotonic_ns()}.json").write_text(json.dumps(where))
    time.sleep(1)
    return num_words(conversations, responses)
