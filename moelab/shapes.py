"""MoEShape: the sizes of one MoE layer as a kernel on one rank sees them, and where they come from.

E experts, k of them per token, hidden size H, expert intermediate size N:
w13 (E, 2N, H), w2 (E, H, N). Sizes come from a model's config.json (architectures.py has the table of keys),
from a preset in data/models, or by hand. Tensor and expert parallelism divide them as sglang does. Which of them a server
runs as one layer is the loader's to say (`load_served`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moelab.dtypes import LAYER_DTYPES
from moelab.dtypes import dtype_name as spelled
from moelab.errors import DtypeError, FormatError, ShapeError, ShardError, UnknownModelError, nearest_names
from moelab.formats import PLAIN, SELECTORS, Format, get_format
from moelab.model_config import Reading, load_config_file, read_model_config
from moelab.presets import listed, models_dir, preset_names, preset_stem, source_of
from moelab.quantization import Quantisation, asked_quantisation, read_quantisation
from moelab.shared_experts import decide

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
        raise DtypeError(
            f"dtype {dtype!s} is not one that moelab takes. Expected one of {known}; or, for a model's weights, a format of "
            f"theirs: {', '.join(SELECTORS)}, or one of moelab.formats by name. Pass dtype=."
        )
    return DTYPES[name]


@dataclass(frozen=True)
class MoEShape:
    """One MoE layer's sizes on one rank: what a kernel sees.

    num_experts (E): experts on this rank, the fused shared experts among them.
    top_k (k): rows each token contributes, the fused shared experts among them. Not divided: under expert
        parallelism a token's other experts live on other ranks, so top_k may exceed num_experts.
    hidden_size (H), moe_intermediate_size (N): columns of w13 and of w2; N is divided by tp_size // ep_size.
    activation: "silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai" (gpt-oss's clamped one); a few models use
        others ("relu", "silu_clamped", "silu_then_clamped", "swiglu_softcapped") that have sizes but no kernel here.
    gated: w13 holds gate rows, then up rows; if not, it holds up rows only, (E, N, H).
    tp_size: all ranks that share the layer; ep_size of them, a divisor, divide the experts.
    num_shared_experts_fused: shared experts that a server appends to the routed ones (whole on each rank).
    architecture, keys_used: what the sizes were read from; empty if given by hand.
    format: how the weights are stored; dtype is then the activations'.

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
    format: Format = PLAIN

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden_size", "moe_intermediate_size", "tp_size", "ep_size"):
            _require_count(field, getattr(self, field), at_least=1)
        _require_count("num_shared_experts_fused", self.num_shared_experts_fused, at_least=0)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "format", get_format(self.format))
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

    def expected_rows(self, num_tokens: int) -> float:
        """Rows that an expert of this rank gets of a batch, if tokens choose evenly among all routed experts of the model; the
        mean over this rank's, of which fused shared experts get every token."""
        shared = self.num_shared_experts_fused
        return num_tokens * ((self.top_k - shared) / self.ep_size + shared) / self.num_experts

    @property
    def w13_shape(self) -> tuple[int, int, int]:
        """(E, 2N, H), or (E, N, H) for experts without a gate."""
        return (self.num_experts, self.moe_intermediate_size * (2 if self.gated else 1), self.hidden_size)

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """(E, H, N)."""
        return (self.num_experts, self.hidden_size, self.moe_intermediate_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of w13 and w2 on this rank, scales and zero points included."""
        each = (self.format.matrix_bytes(*w[1:], self.dtype) for w in (self.w13_shape, self.w2_shape))
        return self.num_experts * sum(each)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, which `from_json` reads; the format's name only where it is not plain."""
        values = asdict(replace(self, format=PLAIN)) | {"keys_used": list(self.keys_used), "format": self.format.name}
        return {key: value for key, value in values.items() if key != "format" or not self.format.is_plain}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MoEShape:
        """Read what `to_json` wrote. KeyError, TypeError and MoelabError mean that it was not that."""
        return cls(**{**values, "keys_used": tuple(values["keys_used"])})

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
        cls, config: Mapping[str, Any] | str | Path, *, name: str | None = None, dtype: object = None
    ) -> MoEShape:
        """Read the whole model's layer from a config.json: its content, its path, or its folder's path.

        Routed experts alone, in the format that its `quantization_config` says: `load_served` adds what a server fuses.
        dtype: plain weights of that dtype instead, or a format by its name or a server's selector ("fp8_w8a8"); by default the
        config's own format, and its dtype or bfloat16.
        Raises UnknownArchitectureError, UnknownModelError (no such file), ConfigFileError (not JSON), DtypeError,
        FormatError (a quantisation that cannot be read).
        """
        return _read(config, name, dtype).shape

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
        format: str | Format = PLAIN,
    ) -> MoEShape:
        """A layer by the whole model's sizes, then sharded. Raises ShapeError, ShardError, DtypeError, FormatError."""
        sizes = num_experts, top_k, hidden_size, moe_intermediate_size
        whole = cls(name, *sizes, dtype_name(dtype), activation, gated, format=get_format(format))
        return whole.shard(tp_size, ep_size)


def require_plain(shape: MoEShape, who: str) -> None:
    """Raise FormatError if a layer's weights are quantised. who: what takes plain weights alone, to begin the sentence."""
    if shape.format.is_plain:
        return
    serves = f"Today {shape.format.served_by or 'the servers’ own Triton kernels'} serve it."
    raise FormatError(
        f"{who} takes plain weights, and the experts of {shape.name} are stored as {shape.format.name}. Expected bfloat16, "
        f"float16 or float32. {serves} Pass dtype= (--dtype bfloat16) for the same sizes in plain weights; `moelab shape` and "
        "`moelab explain` name the config file that a server asks for."
    )


def preset(name: str) -> MoEShape:
    """The whole layer of a preset, routed experts alone, by its name, its Hugging Face id or that id's last part, in any case.

    The id of a model that is published quantised means its quantised preset; the preset called as the model is the same
    layer in bfloat16. Raises UnknownModelError, with the nearest names, for any other name.
    """
    stem = preset_stem(name)
    if stem is None:
        raise UnknownModelError(
            f"No preset is called {name!r}.{nearest_names(name, preset_names(quantised=True))} "
            f"Expected one of {listed()}. Name one of them, or give load_model a config.json."
        )
    return MoEShape.from_config(models_dir() / f"{stem}.json", name=stem)


@dataclass(frozen=True)
class Served:
    """A layer as a server runs it on one rank. because: the rule for its shared experts, and whose. method: the checkpoint's
    quant_method, "" for plain weights."""

    shape: MoEShape
    because: str
    method: str = ""


def load_model(
    model: str | Path,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    dtype: object = None,
    disable_shared_experts_fusion: bool = False,
    loader: str = "moelab",
    platform: str = "sm_90",
) -> MoEShape:
    """The layer of a model on one rank, as a server runs it: `load_served` without its reason."""
    return load_served(
        model, tp_size=tp_size, ep_size=ep_size, dtype=dtype, loader=loader, platform=platform,
        disable_shared_experts_fusion=disable_shared_experts_fusion,
    ).shape  # fmt: skip


def load_served(
    model: str | Path,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    dtype: object = None,
    disable_shared_experts_fusion: bool = False,
    loader: str = "moelab",
    platform: str = "sm_90",
) -> Served:
    """The layer of a model on one rank, as the server of `loader` runs it: with its shared expert where that one fuses it.

    model is looked up, in this order, as a preset's name (or its Hugging Face id), the path of a config.json or of its
    folder, a Hugging Face id (needs the extra `hf`; a config.json in its local cache serves offline). What no id can be, such
    as `./a`, `a/b/c` or `a.json`, is a path. dtype: plain weights of that dtype, or a format as
    `from_config` takes it; None: the model's own format and dtype.
    loader: "sglang", "vllm", or "moelab", which asks as sglang does. platform: the chip, "sm_90", "gfx942", ...
    disable_shared_experts_fusion: sglang's switch.

    Raises UnknownModelError, UnknownArchitectureError, ConfigFileError, DtypeError, FormatError, ShardError.
    """
    return serve(
        read_model(model, dtype), tp_size=tp_size, ep_size=ep_size, loader=loader, platform=platform,
        disable_shared_experts_fusion=disable_shared_experts_fusion,
    )  # fmt: skip


def read_model(model: str | Path, dtype: object = None) -> ModelRead:
    """A model's config.json, looked up and read once, for `serve` to ask for many shards of it. Arguments and errors of
    `load_served`."""
    source, name = source_of(model)
    return _read(source, name, dtype)


def serve(
    found: ModelRead,
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    disable_shared_experts_fusion: bool = False,
    loader: str = "moelab",
    platform: str = "sm_90",
) -> Served:
    """`load_served` for a model that has been read."""
    whole, format = found.shape, found.shape.format
    decision = decide(
        loader, found.content, found.reading.section, num_experts=whole.num_experts,
        moe_intermediate_size=whole.moe_intermediate_size, tp_size=tp_size, ep_size=ep_size, family=format.family,
        method=found.quantisation.method, block=format.block_shape, platform=platform,
        disabled=disable_shared_experts_fusion,
    )  # fmt: skip
    fused = replace(
        whole, num_experts=whole.num_experts + decision.count, top_k=whole.top_k + decision.count,
        num_shared_experts_fused=decision.count,
    )  # fmt: skip
    return Served(fused.shard(tp_size, ep_size), decision.because, found.quantisation.method)


@dataclass(frozen=True)
class ModelRead:
    """A config.json, read: the whole model's layer without shared experts, and what it was read from."""

    shape: MoEShape
    reading: Reading
    quantisation: Quantisation
    content: Mapping[str, Any]


def _read(config: Mapping[str, Any] | str | Path, name: str | None, dtype: object) -> ModelRead:
    content = config if isinstance(config, Mapping) else load_config_file(config)
    reading = read_model_config(content)
    named = asked_quantisation(dtype, content, reading.section) if isinstance(dtype, str | Format) and dtype else None
    quantisation = named or (Quantisation() if dtype else read_quantisation(content, reading.section))
    shape = MoEShape(
        name=name or _name_of(config, content) or reading.architecture or "custom",
        num_experts=reading.num_experts,
        top_k=reading.top_k,
        hidden_size=reading.hidden_size,
        moe_intermediate_size=reading.moe_intermediate_size,
        dtype=dtype_name((None if named else dtype) or reading.dtype or "bfloat16"),
        activation=reading.activation,
        gated=reading.gated,
        architecture=reading.architecture,
        keys_used=reading.keys_used,
        format=quantisation.format,
    )
    return ModelRead(shape, reading, quantisation, content)


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
