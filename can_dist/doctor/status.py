"""Where a run is: read from what it leaves in its directory, while it goes on or after it was killed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.config.methods import DEFAULT_METHOD, METHODS
from can_dist.doctor.sweeps import REFUSED, format_sweep, is_settled, last_command, next_of_sweep, read_sweep
from can_dist.errors import DataError
from can_dist.tables.artifacts import MANIFEST, STAGE, load_artifact
from can_dist.tables.quarantine import quarantined
from can_dist.training.metrics import METRICS, RESUMED, read_metrics
from can_dist.workspace import BELIEF, LOG, PAGE, SOLUTION, Owner, read_events, read_owner

CONFIG = "config.yaml"
SILENT_S = 1800.0


def read_status(run: Path, now: float | None = None) -> dict[str, Any]:
    """Return where a run is, as plain data: its owner, its stages, its last error, and what to do next.

    ``state`` of a stage is ``finished``, ``in progress`` (``interrupted`` when no process works on it) or
    ``not started``. Nothing is written, and no lock is taken.

    Raises:
        DataError: when the directory holds no run.
    """
    if not (run / LOG).is_file():
        raise DataError(f"{run}: holds no run ({LOG} is missing).", "Give the directory that --run named.")
    now = time.time() if now is None else now
    owner, events = read_owner(run), read_events(run / LOG)
    sessions = last_command(events)
    session = [event for part in sessions for event in part]
    works = owner is not None and owner.alive is not False
    sweep = read_sweep(run, sessions, works=works)
    opened = dict.fromkeys(str(event["artifact"]) for event in session if event.get("artifact"))
    stages = [_stage(run, name, events, now, works) for name in opened]
    method, own = _method(run)
    begun = {stage["stage"] for stage in stages}
    ended = any(event.get("event") == "ended" for event in session) if sweep is None else is_settled(sweep)
    failed = [event for event in session if event.get("event") == "failed"]
    if sweep is not None:
        failed = [event for event in failed if event["error"] not in REFUSED]
    if sweep is not None and ended:  # where a margin was refused is told with the margin
        stages = [stage for stage in stages if stage["state"] == "finished"]
    own = [] if _certifies(stages) else own
    stages += [{"stage": name, "state": "not started"} for name in own if name not in begun and not ended]
    return {
        "run": str(run),
        "method": method,
        "owner": None if owner is None else vars(owner),
        "stages": stages,
        "last_error": {key: failed[-1][key] for key in ("time", "error", "message")} if failed else None,
        "outcome": _outcome(run, stages) if sweep is None else {},
        "sweep": sweep,
        "next": _next(run, owner, stages, ended, sweep),
    }


def _outcome(run: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the finished stages say: whether to believe the solution, the verdicts, and the pages of both.

    A page is that of the last solution, or evaluation, of the run directory.
    """
    from can_dist.dual.belief.level import stated
    from can_dist.measuring.verdicts import verdict_line

    outcome: dict[str, Any] = {}
    for stage in stages:
        if stage["state"] != "finished" or stage["stage"] not in ("solve", "evaluate"):
            continue
        try:
            artifact = load_artifact(run / stage["artifact"])
            if stage["stage"] == "solve":
                outcome["belief"] = stated(artifact.read_json(SOLUTION)["diagnostics"])
            else:
                outcome["verdicts"] = [verdict_line(row) for row in artifact.info["constraints"]]
        except (DataError, KeyError, TypeError):  # `verify` reports what is damaged
            continue
        page = run / (BELIEF if stage["stage"] == "solve" else PAGE)
        if page.is_file():
            outcome["belief_page" if stage["stage"] == "solve" else "report"] = str(page)
    return outcome


def _method(run: Path) -> tuple[str, list[str]]:
    """Return the method that a run is configured for, and the stages it goes through."""
    from can_dist.config.yaml_files import read_yaml

    path = run / CONFIG
    config = read_yaml(path) if path.is_file() else {}
    method = str(config.get("method", DEFAULT_METHOD))
    stages = list(METHODS[method].stages) if method in METHODS else []
    if config.get("basis") and "strength" in stages:
        stages.insert(stages.index("strength"), "mixture")
    return method, [name for name in stages if name != "strength" or config.get("strength") != 1]


def _stage(run: Path, name: str, events: Sequence[Mapping[str, Any]], now: float, works: bool) -> dict[str, Any]:
    directory, about = run / name, [event for event in events if event.get("artifact") == name]
    labels = [event["label"] for event in about if "label" in event]
    stage = {"stage": name.rpartition("-")[0], "label": labels[-1] if labels else "", "artifact": name}
    if (directory / MANIFEST).is_file():
        seconds = [event["seconds"] for event in about if event.get("event") == "done"]
        return {**stage, "state": "finished", **({"seconds": seconds[-1]} if seconds else {}), **_rows(directory)}
    stage["state"] = "in progress" if works else "interrupted"
    progress = _training(directory, about, now) if stage["stage"] == "train" else _shards(directory, about, events, now)
    return {**stage, **progress, "heartbeat_s": _heartbeat(directory, now)}


def _shards(
    directory: Path, about: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], now: float
) -> dict[str, Any]:
    """Return how far a sharded stage is; rate and remaining time of what was done since it last began."""
    begun = [event for event in about if event.get("event") == "shards"]
    if not begun:
        return {}
    last = begun[-1]
    done = len(list(directory.glob("part-*.arrow")))
    total, fresh, seconds = last["done"] + last["waiting"], done - last["done"], now - last["time"]
    deaths = [e for e in events if e.get("event") == "actor died" and e["work"] == last["work"]]
    progress = {"shards_done": done, "shards_total": total, "actor_deaths": len(deaths), "starts": len(begun)}
    left_out = [e["row"] for e in events if e.get("event") == "quarantined" and e["work"] == last["work"]]
    progress["quarantined"] = len(set(left_out))
    if fresh > 0 and seconds > 0:
        rate = fresh / seconds
        progress |= {"shards_per_minute": round(60 * rate, 2), "eta_s": round((total - done) / rate)}
    return progress


def _rows(directory: Path) -> dict[str, Any]:
    """Return the rows of a finished table, and how many more went in and were quarantined."""
    try:
        artifact = load_artifact(directory)
    except DataError:  # `verify` reports a damaged manifest
        return {}
    return {"rows": artifact.num_rows, "quarantined": len(quarantined(artifact))} if artifact.parts else {}


def _training(directory: Path, about: Sequence[Mapping[str, Any]], now: float) -> dict[str, Any]:
    """Return the last logged step of a training, of how many, its loss, and the remaining time."""
    begun = [event for event in about if event.get("event") == "started"]
    try:
        lines = read_metrics(directory / METRICS)
    except DataError:  # the training reports it; here it is only not known how far it is
        lines = []
    steps = [line for line in lines if "loss" in line]
    progress: dict[str, Any] = {"starts": len(begun)}
    checkpoints = sorted(path.parent.name for path in directory.glob("checkpoints/step-*/COMMIT.json"))
    if checkpoints:
        progress["checkpoint"] = checkpoints[-1]
    if not begun:
        return progress
    progress["steps_total"] = total = begun[-1].get("steps")
    if steps:
        progress |= {"step": int(steps[-1]["step"]), "loss": steps[-1]["loss"]}
        first = max((int(line[RESUMED]) for line in lines if RESUMED in line), default=0)
        fresh, seconds = progress["step"] - first, now - begun[-1]["time"]
        if total and fresh > 0 and seconds > 0:
            progress["eta_s"] = round((total - progress["step"]) * seconds / fresh)
    return progress


def _heartbeat(directory: Path, now: float) -> float | None:
    """Return the seconds since anything was written in a stage's directory; every commit and log line is."""
    times = [path.stat().st_mtime for path in (directory / STAGE, directory / METRICS) if path.is_file()]
    if directory.is_dir():
        times.append(directory.stat().st_mtime)
    return round(max(0.0, now - max(times)), 1) if times else None


def _next(
    run: Path, owner: Owner | None, stages: Sequence[Mapping[str, Any]], ended: bool, sweep: Mapping[str, Any] | None
) -> str:
    """Return the next command to give, or why there is none."""
    again = f"can-dist certify {run}" if _certifies(stages) else f"can-dist run {run / CONFIG} --run {run}"
    again = again if sweep is None else next_of_sweep(run, sweep)
    if owner is not None and owner.alive:
        silent = [s for s in stages if s["state"] == "in progress" and (s.get("heartbeat_s") or 0) > SILENT_S]
        if silent:
            return f"kill {owner.process}  # nothing was written for {silent[0]['heartbeat_s']:.0f} s; then: {again}"
        return "none: it is running"
    if owner is not None and owner.alive is None:
        return f"look on {owner.host} whether process {owner.process} is there; if it is gone: {again}"
    if sweep is not None:
        return again
    finished = ended and all(stage["state"] == "finished" for stage in stages)
    done = finished and any(stage["stage"] in ("evaluate", "certify") for stage in stages)
    return f"can-dist verify {run}" if done else again


def _certifies(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last command was ``certify``: nothing else opens a stage on sealed prompts."""
    return any(stage["stage"] == "certify" or stage.get("label", "").endswith(" on sealed") for stage in stages)


def format_status(status: Mapping[str, Any]) -> str:
    """Return a status as text for people."""
    owner = status["owner"]
    lines = [f"{status['run']}: method {status['method']}"]
    if owner is None:
        lines.append("held by nobody")
    else:
        alive = {True: "alive", False: "gone", None: "on another machine"}[owner["alive"]]
        lines.append(f"held by process {owner['process']} on {owner['host']} since {owner['since']}: {alive}")
    rows = [
        (s["state"], s["stage"] + (f" ({s['label']})" if s.get("label") else ""), _detail(s)) for s in status["stages"]
    ]
    width = max((len(name) for _, name, _ in rows), default=0)
    lines += [f"  {state:<12} {name:<{width}}  {detail}".rstrip() for state, name, detail in rows]
    if status["last_error"] is not None:
        last = status["last_error"]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["time"]))
        lines.append(f"last error ({when}): {last['error']}: {last['message']}")
    lines += format_sweep(status["sweep"]) if status["sweep"] is not None else []
    outcome = status["outcome"]
    lines += [f"prediction: {outcome['belief']}"] if "belief" in outcome else []
    lines += [f"verdict: {'; '.join(outcome['verdicts'])}"] if outcome.get("verdicts") else []
    pages = [outcome[name] for name in ("belief_page", "report") if name in outcome]
    lines += [f"pages: {', '.join(pages)}"] if pages else []
    return "\n".join([*lines, f"next: {status['next']}"])


def _detail(stage: Mapping[str, Any]) -> str:
    parts = []
    if "seconds" in stage:
        parts.append(f"{stage['seconds']:.0f} s")
    if "shards_total" in stage:
        parts.append(f"{stage['shards_done']} of {stage['shards_total']} shards")
    if "shards_per_minute" in stage:
        parts.append(f"{stage['shards_per_minute']:g} a minute")
    if stage.get("step") is not None:
        parts.append(f"step {stage['step']} of {stage['steps_total']}, loss {stage['loss']:.4f}")
    if "checkpoint" in stage:
        parts.append(f"checkpoint {stage['checkpoint']}")
    if "eta_s" in stage and stage["state"] == "in progress":
        parts.append(f"{_duration(stage['eta_s'])} to go")
    if "rows" in stage:
        total = f" of {stage['rows'] + stage['quarantined']}" if stage["quarantined"] else ""
        parts.append(f"{stage['rows']}{total} rows")
    if stage.get("quarantined"):
        parts.append(f"{stage['quarantined']} quarantined")
    if stage.get("actor_deaths"):
        parts.append(f"{stage['actor_deaths']} actor(s) died")
    if stage.get("starts", 0) > 1:
        parts.append(f"start {stage['starts']}")
    if stage.get("heartbeat_s") is not None:
        parts.append(f"last written {_duration(stage['heartbeat_s'])} ago")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """'42 s', '7 min', '3.4 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
