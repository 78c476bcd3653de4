"""Tuned config files, through the commands that read them: explain, doctor, export."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz import Case, command, spoil

NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
ENTRY = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
GOOD: dict[str, Any] = {str(batch): dict(ENTRY) for batch in (1, 16, 256)}
ASK = ("--model", "qwen3-30b-a3b", "--device", "NVIDIA H200", "--triton-version", "3.6.0")


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Half of them values, the others bytes and special files; batch 1 is asked for."""
    root = folder / "configs"
    path = root / "triton_3_6_0" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(GOOD) + "\n")
    command("doctor", root)  # what is read once a process, is read now
    while True:
        how = rng.choice(("value", "value", "value", "bytes", "bytes", "twice", "unknown", "special"))
        what, make, data = _made(rng, how)
        spoil.cleared(path)
        if make is None:
            path.write_bytes(data)
        else:
            make(path)
        for name in ("explain", "doctor", "export"):
            yield _case(f"{what}: moelab {name}", name, root, path, data if how == "bytes" else None)


def _made(rng: random.Random, how: str) -> tuple[str, Any, bytes]:
    if how == "special":
        what, make = rng.choice(list(spoil.SPECIAL.items()))
        return what, make, b""
    if how == "bytes":
        what, data = spoil.spoiled_bytes(rng, json.dumps(GOOD, indent=4).encode() + b"\n")
        return what, None, data
    if how == "twice":
        count = rng.choice((1, 30_000))
        text = json.dumps(GOOD)[:-1] + "".join(f', "{1 + i}": {json.dumps(ENTRY)}' for i in range(count)) + "}\n"
        return f"{count} keys put in, 1 again among them", None, text.encode()
    where = rng.choice([("1",), *(("1", key) for key in ENTRY)])
    if how == "unknown":
        return "an unknown key", None, (json.dumps(GOOD | {"1": ENTRY | {"BLOCKSIZE_M": 16}}) + "\n").encode()
    value = rng.choice([v for v in spoil.HOSTILE if spoil.is_hostile_to(spoil.at(GOOD, where), v)])
    text = spoil.dumps(spoil.replaced(GOOD, where, value)) + "\n"
    return f"{'.'.join(where)} = {str(value)[:40]!r}", None, text.encode()


def _case(what: str, name: str, root: Path, path: Path, data: bytes | None) -> Case:
    out = root.parent / "out"
    run = {
        "explain": lambda: json.loads(command("explain", *ASK, "--batch-size", 1, "--config-dir", root, "--json")),
        "doctor": lambda: command("doctor", root),
        "export": lambda: command("export", path, "--rules", "sglang", "--out", out, "--overwrite"),
    }[name]

    def right(value: Any) -> bool:
        """Only bytes may be spoiled into another good file; then what is read is what stands there."""
        entries = None if data is None else _plainly(data)
        if entries is None:
            return name == "explain" and not path.exists() and value["is_default"]
        if name != "explain":
            return True
        return value["config"] == min(entries.items(), key=lambda item: abs(int(item[0]) - 1))[1]

    return Case(what, run, right)


def _plainly(data: bytes) -> dict[str, Any] | None:
    """The content as Python's own reader has it, if it is one object of objects; None if it is not."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and all(isinstance(entry, dict) for entry in content.values()) else None
