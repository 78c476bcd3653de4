"""The Parquet file of a landscape: columns and metadata, whole or refused.

The metadata's JSON holds a digest of the whole file, in which its own 64 digits count as zeros: one flipped bit anywhere is
found, in pages, in the footer and in the digest. Pages have Parquet's own checksums too, for other readers.
`python -m moelab.tuner.landscape_file FILE...` puts a digest into files of an older moelab, which have none.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.errors import RuntimeModeError
from moelab.reading import MIB, UnreadableError, parse_json, read_bytes

LARGEST = 256 * MIB
"""Bytes of the largest landscape that is read; the largest shipped one, of 37,634 rows, has 0.5 MB."""

_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')

Columns = Mapping[str, list[Any]]


def write(columns: Columns, about: Mapping[str, Any], path: Path) -> Path:
    """Write columns and metadata atomically. Raises UnreadableError, before touching the disk, for what `read` would refuse."""
    pa, _ = _pyarrow()
    _require_known(columns, json.loads(json.dumps({**about, "digest": _NO_DIGEST})))
    types = {name: pa.int32() for name in columns} | {
        "stage": pa.string(), "samples_us": pa.list_(pa.float32()), "failure": pa.string(), "message": pa.string(),
        "compile_s": pa.float32(), "measure_s": pa.float32(), "interleaved": pa.bool_(), "at": pa.string(),
    }  # fmt: skip
    arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
    arrays |= {name: arrays[name].dictionary_encode() for name in ("stage", "failure", "message")}
    return _write(pa.table(arrays), about, path)


def _write(table: Any, about: Mapping[str, Any], path: Path) -> Path:
    table = table.replace_schema_metadata({"moelab": json.dumps({**about, "digest": _NO_DIGEST}, allow_nan=False)})
    with writing.replacing(path) as temporary:
        # zstd at 19 makes it 12 % smaller than at 1
        _pyarrow()[1].write_table(table, temporary, compression="zstd", compression_level=19, write_page_checksum=True)
        data = temporary.read_bytes()
        digest = b'"digest": "%s"' % hashlib.sha256(data).hexdigest().encode()
        temporary.write_bytes(data.replace(b'"digest": "%s"' % _NO_DIGEST.encode(), digest, 1))
    return path


def read(path: Path) -> tuple[Columns, Mapping[str, Any]]:
    """(columns, metadata) of a whole file. Raises OSError as the system does, UnreadableError for anything else than what
    `write` wrote, RuntimeModeError without pyarrow."""
    data = read_bytes(path, LARGEST)
    found = list(_DIGEST.finditer(data))
    if len(found) != 1:
        raise UnreadableError(
            "has no digest (if an older moelab froze it, and you know that it is whole, python -m "
            "moelab.tuner.landscape_file FILE puts one in)"
        )
    low, high = found[0].span(1)
    digest = hashlib.sha256(data[:low] + _NO_DIGEST.encode() + data[high:]).hexdigest()
    if digest.encode() != found[0][1]:
        raise UnreadableError(
            f"is not what was frozen: its digest is {found[0][1][:12].decode()}…, and what it holds has {digest[:12]}…, so the "
            "disk, or a hand, has changed it"
        )
    table, about = _parsed(data)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    _require_known(columns, about)
    return columns, about


def _parsed(data: bytes) -> tuple[Any, Any]:
    """(the table, the JSON of its metadata)."""
    pa, parquet = _pyarrow()
    try:
        table = parquet.read_table(pa.BufferReader(data), page_checksum_verification=True)
        # The footer's own; Arrow's schema has a second one, from before the digest was put in.
        about = (parquet.read_metadata(pa.BufferReader(data)).metadata or {}).get(b"moelab", b"null")
    except (pa.ArrowException, OSError) as error:
        raise UnreadableError(f"is no Parquet file ({type(error).__name__}: {error})") from error
    return table, parse_json(about)


def _require_known(columns: Columns, about: Any) -> None:
    from moelab.schemas import first_problem
    from moelab.tuner.schemas import ABOUT, COLUMNS

    if problem := first_problem(ABOUT, about) or first_problem(COLUMNS, columns):
        raise UnreadableError(problem)


def seal(path: str | Path) -> Path:
    """Put a digest into a landscape that has none, as an older moelab froze them. Raises OSError, UnreadableError."""
    table, about = _parsed(read_bytes(path, LARGEST))
    if not isinstance(about, dict) or "digest" in about:
        raise UnreadableError("is no landscape without a digest")
    _require_known({name: table[name].to_pylist() for name in table.column_names}, about | {"digest": _NO_DIGEST})
    return _write(table, about, Path(path))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeModeError(
            "Landscapes are Parquet files, and the package pyarrow is not here. Expected it beside moelab. Install it: pip "
            "install pyarrow."
        ) from None
    return pyarrow, pyarrow.parquet


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            print(f"sealed {seal(name)}")
        except (OSError, UnreadableError) as error:
            sys.exit(f"moelab: {name} {error}. Expected a landscape of an older moelab. Restore it from git.")
