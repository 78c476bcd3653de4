"""Triton's interpreter with less to do for each call: the same results, sooner; and 3.6's with numpy 2.4.

The interpreter replaces the functions of triton.language by its own for the time of a launch. Triton 3.6.0 and 3.7.1 look
for them anew in each launch, and again whenever a kernel calls a device function, of which `tl.sum` and its kin are made.
Here they are found once, and a call within a launch finds them replaced. For each operation they also look up numpy's type of
Triton's, in a table made anew, and for integers compute in six operations whether it overflows, to drop the answer unless debug
is set: the first is kept here, the second not asked.

Triton 3.6.0 makes a loop's bound of an array of one number, which numpy refuses from 2.4 on; 3.7.1 drops the axis first.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

NEEDED = ("_patch_lang", "_patch_builtin", "_patch_attr", "_LangPatchScope")
"""What Triton's module must have. Where one is missing nothing is changed: the interpreter is then as slow as it comes."""


def mend(interpreter: ModuleType) -> None:
    """Let a loop's bound be an array of one number in any version, as 3.7.1 does. interpreter: as in `hasten`."""
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None or hasattr(patch_tensor, "mended"):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    patched.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched  # type: ignore[attr-defined]


def hasten(interpreter: ModuleType, language: ModuleType) -> bool:
    """Change `triton.runtime.interpreter` of this process; whether it was changed. language: `triton.language`."""
    if not all(hasattr(interpreter, name) for name in NEEDED) or hasattr(interpreter, "_hastened"):
        return False
    replaced: set[int] = set()  # modules whose functions are replaced at the moment
    patch_lang, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    nothing_to_restore = scope_type()

    class Scope(scope_type):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_once(function: Callable[..., Any]) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if seen and seen <= replaced:
            return nothing_to_restore
        scope = patch_lang(function)
        replaced.update(seen)
        return scope

    found: dict[int, list[tuple[str, Any]]] = {}

    def patch_kept(owner: Any, builder: Any, scope: Any) -> None:
        if id(owner) not in found:
            members = inspect.getmembers(owner)
            found[id(owner)] = [(name, member) for name, member in members if language.core.is_builtin(member)]
        for name, member in found[id(owner)]:
            interpreter._patch_attr(owner, name, member, builder, scope)

    changes = {"_LangPatchScope": Scope, "_patch_lang": patch_once, "_patch_builtin": patch_kept, "_hastened": True}
    for name, value in changes.items():
        setattr(interpreter, name, value)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = kept_dtypes(interpreter._get_np_dtype)  # type: ignore[attr-defined]
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)  # type: ignore[type-var, union-attr]
    return True


def kept_dtypes(its: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's function from Triton's types to numpy's, each asked once."""
    found: dict[str, Any] = {}

    @functools.wraps(its)
    def kept(of: Any) -> Any:
        if of.name not in found:
            found[of.name] = its(of)
        return found[of.name]

    return kept
