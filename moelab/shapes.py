"""MoEShape: the sizes of one MoE layer as a kernel on one rank sees them, and where they come from.

E experts, k of them per token, hidden size H, expert intermediate size N:
w13 (E, 2N, H), w2 (E, H, N). Sizes come from a model's config.json (architectures.py has the table of keys),
from a preset in data/models, or by hand. Tensor and expert parallelism divide them as sglang does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moelab.dtypes import LAYER_DTYPES
from moelab.dtypes import dtype_name as spelled
from moelab.errors import DtypeError, ShapeError, ShardError, UnknownModelError, nearest_names
from moelab.model_config import load_config_file, read_model_config
from moelab.runtime import data_dir

DTYPES: dict[str, str] = {
    spelling: dtype.name for dtype in LAYER_DTYPES.values() for spelling in (dtype.name, *dtype.others)
}
"""Accepted spellings of a dtype -> moelab's name."""

_MAX_DEGREE = 64  # degrees offered in an error message: the largest tensor-parallel groups in use


def dtype_name(dtype: object) -> str:
    """Return moelab's name of a dtype given as a string or as torch's. Raises DtypeError for any other."""
    name = spelled(dtype).lower()
    if name not in DTYPES:
        known = ", ".join(dict.fromkeys(DTYPES.values()))
        raise DtypeError(f"dtype {dtype!s} is not one that moelab takes. Expected one of {known}: pass dtype=.")
    return DTYPES[name]


@dataclass(frozen=True)
class MoEShape:
    """One MoE layer's sizes on one rank: what a kernel sees.

    num_experts (E): experts on this rank, the fused shared experts among them.
    top_k (k): rows each token contributes, the fused shared experts among them. Not divided: under expert
        parallelism a token's other experts live on other ranks, so top_k may exceed num_experts.
    hidden_size (H), moe_intermediate_size (N): columns of w13 and of w2; N is divided by tp_size // ep_size.
    activation: "silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai" (gpt-oss's clamped one); a few models use
        others ("relu", "silu_clamped", "swiglu_softcapped") that have sizes but no kernel here.
    gated: w13 holds gate rows, then up rows; if not, it holds up rows only, (E, N, H).
    tp_size: all ranks that share the layer; ep_size of them, a divisor, divide the experts.
    num_shared_experts_fused: shared experts that sglang appends to the routed ones (whole on each rank).
    architecture, keys_used: what the sizes were read from; empty if given by hand.

    Raises ShapeError for sizes that no layer can have, DtypeError for an unknown dtype.
    """

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    gated: bool = True
    tp_size: int = 1
    ep_size: int = 1
    num_shared_experts_fused: int = 0
    architecture: str = ""
    keys_used: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden_size", "moe_intermediate_size", "tp_size", "ep_size"):
            _require_count(field, getattr(self, field), at_least=1)
        _require_count("num_shared_experts_fused", self.num_shared_experts_fused, at_least=0)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.tp_size % self.ep_size:
            raise ShardError(_indivisible("tp_size", self.tp_size, "ep_size", self.ep_size))
        if self.num_routed_experts < 1:
            raise ShapeError(
                f"num_experts is {self.num_experts}, of which {self.num_shared_experts_fused} are fused "
                "shared experts: no routed expert is left. Expected num_experts > num_shared_experts_fused. Raise "
                "num_experts."
            )
        everywhere = self.num_routed_experts * self.ep_size + self.num_shared_experts_fused
        if self.top_k > everywhere:
            raise ShapeError(
                f"top_k is {self.top_k}, but the model has only {everywhere} experts. Expected at most that. Lower "
                "top_k."
            )

    @property
    def num_routed_experts(self) -> int:
        """Routed experts on this rank: num_experts without the fused shared ones."""
        return self.num_experts - self.num_shared_experts_fused

    @property
    def w13_shape(self) -> tuple[int, int, int]:
        """(E, 2N, H), or (E, N, H) for experts without a gate."""
        return (self.num_experts, self.moe_intermediate_size * (2 if self.gated else 1), self.hidden_size)

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """(E, H, N)."""
        return (self.num_experts, self.hidden_size, self.moe_intermediate_size)

    def with_dtype(self, dtype: object) -> MoEShape:
        """The same layer in another dtype. Raises DtypeError for one that moelab does not take."""
        return replace(self, dtype=dtype_name(dtype))

    def shard(self, tp_size: int, ep_size: int = 1) -> MoEShape:
        """The layer on one of `tp_size` ranks, of which `ep_size` divide the experts and the rest N.

        Degrees count from the whole model: `shape.shard(4).shard(2)` is `shape.shard(2)`. As in sglang's
        tuning tool (benchmark/kernels/fused_moe_triton/common_utils.py): N = N_model // (tp_size // ep_size),
        E = E_routed // ep_size + fused shared experts.
        Raises ShardError if a degree does not divide; it names those that do.
        """
        _require_count("tp_size", tp_size, at_least=1)
        _require_count("ep_size", ep_size, at_least=1)
        routed = self.num_routed_experts * self.ep_size
        intermediate = self.moe_intermediate_size * (self.tp_size // self.ep_size)
        if tp_size % ep_size:
            raise ShardError(_indivisible("tp_size", tp_size, "ep_size", ep_size))
        if routed % ep_size:
            raise ShardError(_indivisible(f"num_experts of {self.name}", routed, "ep_size", ep_size))
        slices = tp_size // ep_size
        if intermediate % slices:
            size, degree = (
                f"moe_intermediate_size of {self.name}",
                "tp_size" if ep_size == 1 else "tp_size // ep_size",
            )
            raise ShardError(_indivisible(size, intermediate, degree, slices))
        return replace(
            self,
            num_experts=routed // ep_size + self.num_shared_experts_fused,
            moe_intermediate_size=intermediate // slices,
            tp_size=tp_size,
            ep_size=ep_size,
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | Path,
        *,
        name: str | None = None,
        dtype: object = None,
        disable_shared_experts_fusion: bool = False,
    ) -> MoEShape:
        """Read the whole model's layer from a config.json: its content, its path, or its folder's path.

        Where sglang fuses a shared expert (DeepSeek-V3, GLM-4-MoE, Llama-4 and a few more; architectures.py
        says which), E and top_k grow by one, as its server runs it; `disable_shared_experts_fusion` is
        sglang's switch. dtype: by default the config's own, else bfloat16.
        Raises UnknownArchitectureError, UnknownModelError (no such file), ConfigFileError (not JSON),
        DtypeError.
        """
        content = config if isinstance(config, Mapping) else load_config_file(config)
        reading = read_model_config(content)
        fused = 0 if disable_shared_experts_fusion else reading.fusible_shared_experts
        return cls(
            name=name or _name_of(config, content) or reading.architecture or "custom",
            num_experts=reading.num_experts + fused,
            top_k=reading.top_k + fused,
            hidden_size=reading.hidden_size,
            moe_intermediate_size=reading.moe_intermediate_size,
            dtype=dtype_name(dtype or reading.dtype or "bfloat16"),
            activation=reading.activation,
            gated=reading.gated,
            num_shared_experts_fused=fused,
            architecture=reading.architecture,
            keys_used=reading.keys_used,
        )

    @classmethod
    def from_sizes(
        cls,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        moe_intermediate_size: int,
        name: str = "custom",
        dtype: object = "bfloat16",
        activation: str = "silu",
        gated: bool = True,
        tp_size: int = 1,
        ep_size: int = 1,
    ) -> MoEShape:
        """A layer by the whole model's sizes, then sharded. Raises ShapeError, ShardError, DtypeError."""
        whole = cls(name, num_experts, top_k, hidden_size, moe_intermediate_size, dtype_name(dtype), activation, gated)
        return whole.shard(tp_size, ep_size)


def preset_names() -> tuple[str, ...]:
    """Names of the presets in data/models, sorted."""
    return tuple(sorted(file.stem for file in _models_dir().glob("*.json")))


def preset(name: str, *, disable_shared_experts_fusion: bool = False) -> MoEShape:
    """The whole layer of a preset, by its name, its Hugging Face id or that id's last part, in any case.

    Raises UnknownModelError, with the nearest names, for any other name.
    """
    stem = _preset_stem(name)
    if stem is None:
        raise UnknownModelError(
            f"No preset is called {name!r}.{nearest_names(name, preset_names())} "
            f"Expected one of {_listed()}. Name one of them, or give load_model a config.json."
        )
    return MoEShape.from_config(
        _models_dir() / f"{stem}.json", name=stem, disable_shared_experts_fusion=disable_shared_experts_fusion
    )


def load_model(
    model: str | Path,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    dtype: object = None,
    disable_shared_experts_fusion: bool = False,
) -> MoEShape:
    """The layer of a model on one rank. `model` is looked up, in this order, as
    a preset's name (or its Hugging Face id), the path of a config.json or of its folder, a Hugging Face id
    (needs the extra `hf`; a config.json in its local cache serves offline). What no id can be, such as `./a`, `a/b/c` or
    `a.json`, is a path.

    Raises UnknownModelError, UnknownArchitectureError, ConfigFileError, DtypeError, ShardError.
    """
    text = str(model)
    if not text.strip():
        raise UnknownModelError(
            f"The model's name is empty. Expected a preset ({_listed()}), a Hugging Face id, or a path. Name one of them."
        )
    source: str | Path
    if isinstance(model, str) and (stem := _preset_stem(model)):
        source, name = _models_dir() / f"{stem}.json", stem
    elif _can_only_be_a_path(model) or Path(text).exists():
        source, name = Path(text), None
    else:
        source, name = _from_hugging_face(text), text
    shape = MoEShape.from_config(
        source, name=name, dtype=dtype, disable_shared_experts_fusion=disable_shared_experts_fusion
    )
    return shape.shard(tp_size, ep_size)


def _models_dir() -> Path:
    return data_dir() / "models"


def _preset_stem(name: str) -> str | None:
    """The preset that goes by this name, in any case, or None."""
    return _aliases(_models_dir()).get(name.strip().lower())


@functools.cache
def _aliases(folder: Path) -> dict[str, str]:
    """Lower-case name, Hugging Face id and last part of that id -> preset."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")):
        source = str(load_config_file(file).get("source", ""))
        for alias in (source, source.rpartition("/")[2], file.stem):
            found[alias.lower()] = file.stem
    found.pop("", None)
    return found


def _can_only_be_a_path(model: str | Path) -> bool:
    text = str(model)
    return (
        isinstance(model, Path)
        or text.count("/") > 1
        or text.startswith((".", "/", "~"))
        or text.endswith(("/", ".json"))
    )


def _listed() -> str:
    return ", ".join(preset_names()) or "none: there is no preset here"


def _from_hugging_face(model: str) -> Path:
    """Path of the config.json of a Hugging Face id, from its local cache or else from the hub."""
    if model.count("/") != 1:
        raise UnknownModelError(
            f"{model!r} is neither a preset, nor an existing path, nor a Hugging Face id (owner/name)."
            f"{nearest_names(model, preset_names())} Expected one of the three. Presets: {_listed()}. "
            "Name one of them, or give the path of a config.json."
        )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise UnknownModelError(
            f"{model!r} is no preset and no path here, and fetching it from Hugging Face takes a package that is not "
            "here. Expected the extra hf. Install it: pip install 'moelab[hf]'; "
            f"or give the path of its config.json.{nearest_names(model, preset_names())}"
        ) from None
    try:
        cached = try_to_load_from_cache(model, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's own errors, its transport's, and invalid ids: all mean "not at hand"
        raise UnknownModelError(
            f"{model!r} is no preset and no path here, and its config.json could not be fetched from Hugging Face "
            f"({type(error).__name__}). Expected an id that is there. "
            "Check the id and the network, or give the path of a config.json."
            f"{nearest_names(model, preset_names())}"
        ) from error


def _name_of(config: object, content: Mapping[str, Any]) -> str | None:
    """A name for a config: the id it was saved under, or the folder or file it lies in."""
    saved_as = content.get("_name_or_path")
    if isinstance(saved_as, str) and saved_as:
        return saved_as.rstrip("/").rpartition("/")[2]
    if isinstance(config, Mapping):
        return None
    path = Path(str(config)).expanduser().resolve()
    return path.name if path.is_dir() else path.parent.name if path.name == "config.json" else path.stem


def _require_count(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ShapeError(f"{name} is {value!r}. Expected a whole number of at least {at_least}. Correct it.")


def _indivisible(size_name: str, size: int, degree_name: str, degree: int) -> str:
    fitting = [str(d) for d in range(1, min(size, _MAX_DEGREE) + 1) if size % d == 0]
    return (
        f"{size_name} is {size}, which {degree_name} = {degree} does not divide. "
        f"Expected a divisor; up to {_MAX_DEGREE} they are {', '.join(fitting)}. Choose one of them."
    )
