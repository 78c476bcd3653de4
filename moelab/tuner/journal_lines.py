"""The lines of a journal: how results are written, and what a line must hold to be read.

A line is a JSON object whose last field is a digest of what stands before it: a bit that the disk flipped, or a number that a
hand changed, is found by its line. A journal whose header has none is an older moelab's; its lines are checked by the schema
alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from moelab.config import KernelConfig
from moelab.reading import UnreadableError
from moelab.tuner.evaluate import Outcome, Request, Result

_END = re.compile(rb',"digest":"([0-9a-f]{16})"\}\Z')
_RESULT = re.compile(rb'\s*\{\s*"kind"\s*:\s*"result"')
_LENGTH = len(b',"digest":"0123456789abcdef"}')


def packed(line: Mapping[str, Any]) -> bytes:
    """A line as it is written, with its digest and newline. ValueError for NaN and infinities."""
    body = json.dumps(line, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return body + b',"digest":"%s"}\n' % _digest(body)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()  # 7 us for 64 contenders; blake2b takes 13


def has_digest(text: bytes) -> bool:
    """Whether a line ends with one."""
    return _END.search(text[-_LENGTH:]) is not None


def parsed(text: bytes, is_first: bool, sealed: bool | None = None) -> dict[str, Any]:
    """What a line holds. sealed: whether the journal's lines have digests; None: as this one has. Raises UnreadableError."""
    if sealed is None:
        sealed = has_digest(text)
    if sealed:
        end = _END.search(text[-_LENGTH:])
        if end is None:
            raise UnreadableError("has no digest, and the first line has one")
        if end[1] != _digest(text[:-_LENGTH]):
            raise UnreadableError("is not what was written: its digest is of something else")
    from moelab import schemas as base
    from moelab.tuner import schemas

    kind = schemas.HEADER if is_first else schemas.RESULT if _RESULT.match(text) else schemas.NOTE
    line: dict[str, Any] = base.parsed(kind, text)
    if not sealed and "digest" in line:
        raise UnreadableError("has a digest that is not its end")
    return line


def encode(result: Result) -> dict[str, Any]:
    """A result as a line."""
    request = result.request
    line: dict[str, Any] = {"kind": "result", "key": request.key()}
    line |= {name: getattr(request, name) for name in ("stage", "num_tokens", "rounds", "interleaved")}
    line |= {name: getattr(request, name) for name in ("stop_above_us", "repeat") if getattr(request, name)}
    line["outcomes"] = [
        {"configs": [_json(c) for c in contender], **_encode_outcome(outcome)}
        for contender, outcome in zip(request.contenders, result.outcomes, strict=True)
    ]
    return line


def _encode_outcome(outcome: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {"samples_us": list(outcome.samples_us)}
    if outcome.failure is not None:
        line = {"failure": outcome.failure, "message": outcome.message}
    return line | {k: v for k in ("compile_s", "measure_s") if (v := getattr(outcome, k))}


def decode(line: Mapping[str, Any]) -> Result:
    """The result of a line that keeps to its schema. Raises UnreadableError for what no schema sees."""
    contenders = tuple(tuple(map(_config, outcome["configs"])) for outcome in line["outcomes"])
    request = Request(
        line["stage"], line["num_tokens"], contenders, line["rounds"], line["interleaved"],
        line.get("stop_above_us"), line.get("repeat", 0),
    )  # fmt: skip
    if request.key() != line["key"]:
        raise UnreadableError("has a key that is not that of its request")
    if {len(contender) for contender in contenders} != {2 if request.stage == "layer" else 1}:
        raise UnreadableError(f"has too many or too few configs for {request.stage!r}")
    outcomes = tuple([
        Outcome(
            tuple(o.get("samples_us", ())), o.get("failure"), o.get("message", ""), o.get("compile_s", 0.0),
            o.get("measure_s", 0.0),
        )
        for o in line["outcomes"]
    ])  # fmt: skip
    most = request.rounds
    if too_many := [o for o in outcomes if len(o.samples_us) > (most if o.failure is None else 0)]:
        raise UnreadableError(f"has {len(too_many[0].samples_us)} samples where none, or {most}, can be")
    return Result(request, outcomes)


_JSON: dict[KernelConfig, dict[str, int]] = {}


def _json(config: KernelConfig) -> dict[str, int]:
    """KernelConfig.to_json, remembered, as `_config` is."""
    found = _JSON.get(config)
    if found is None:
        found = _JSON[config] = config.to_json()
    return found


_CONFIGS: dict[tuple[object, ...], KernelConfig] = {}


def _config(entry: Mapping[str, int]) -> KernelConfig:
    """KernelConfig, remembered: a journal names each of some thousand configs many times."""
    items = (*entry, *entry.values())
    found = _CONFIGS.get(items)
    if found is None:
        found = _CONFIGS[items] = KernelConfig(**entry)
    return found
