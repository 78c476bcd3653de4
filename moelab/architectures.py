"""One table: which keys of a model's config.json size its routed experts.

A row names the `architectures[0]` and `model_type` values it answers to and, for each size, the key that the
model's own code builds its expert weights from. Checked against the modelling code of transformers 5.23
(tests/data/transformers_moe_configs.json) and, for architectures that live in remote code, against sglang's.

Key syntax, smallest thing that covers all of them:
    "a|b"      two spellings of the same number; if both are present they must agree
    "a > b"    `a` if present and not null, else `b`
    "=2"       a constant: the model's code fixes it
    "x.y"      a nested key
"""

from __future__ import annotations

from dataclasses import dataclass

_E = "num_experts|num_local_experts"
_ROUTED = "n_routed_experts|num_experts|num_local_experts"
_ERNIE = "moe_num_experts|num_experts"
_K = "num_experts_per_tok|num_experts_per_token"
_SWIGLU_OAI = "swiglu_alpha=1.702 hidden_act_alpha=1.702 swiglu_beta=1.0 swiglu_limit=7.0"
"""What the activation swiglu_oai computes with; GptOssConfig's and MiniMaxM3VLTextConfig's defaults too."""


@dataclass(frozen=True)
class Architecture:
    """How one family of models spells the sizes of its routed experts.

    names: values of `architectures[0]` or `model_type`, separated by spaces.
    nested: path of the sub-config that holds the keys, when the config has one.
    element: which entry of a list-valued size is the text experts' (None: all entries must be equal).
    layers: "key:value", a list of layer kinds in which `value` marks a layer with experts.
    limit: key of a clamp on the gate and up products; when set, the activation is named with `_clamped`. "key=10.0": the
    class's default where the key is absent, and then the class needs a number over 0.
    clamps_after: the limit is on silu(gate) and up, not on gate and up: the activation is then `_then_clamped`.
    knows: keys of EFFECTS that this row's reading holds for, "key=7.0" for that value alone; its other fields' keys count too.
    """

    names: str
    num_experts: str = _E
    top_k: str = _K
    hidden_size: str = "hidden_size"
    moe_intermediate_size: str = "moe_intermediate_size"
    activation: str = "hidden_act > =silu"
    gated: bool = True
    limit: str = ""
    clamps_after: bool = False
    nested: str = ""
    element: int | None = None
    layers: str = ""
    knows: str = ""


TABLE: tuple[Architecture, ...] = (
    # Experts of their own size, counted by num_experts (older files) or num_local_experts (newer ones).
    Architecture("Qwen2MoeForCausalLM qwen2_moe"),
    Architecture("Qwen3MoeForCausalLM qwen3_moe"),
    Architecture("Qwen3NextForCausalLM qwen3_next"),
    Architecture("Qwen3VLMoeForConditionalGeneration qwen3_vl_moe qwen3_vl_moe_text", nested="text_config"),
    Architecture(
        "Qwen3_5MoeForConditionalGeneration Qwen3_5MoeForCausalLM qwen3_5_moe qwen3_5_moe_text",
        nested="text_config",
    ),
    Architecture(
        "Qwen4ExpForConditionalGeneration Qwen4ExpForCausalLM qwen4_exp qwen4_exp_text",
        nested="text_config",
    ),
    Architecture("Qwen3OmniMoeForConditionalGeneration qwen3_omni_moe", nested="thinker_config.text_config"),
    Architecture(
        "Qwen3OmniMoeThinkerForConditionalGeneration qwen3_omni_moe_thinker qwen3_omni_moe_text",
        nested="text_config",
    ),
    Architecture("AfmoeForCausalLM afmoe"),
    Architecture(
        "BailingMoeForCausalLM BailingMoEForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM "
        "BailingHybridForCausalLM bailing_moe bailing_moe_v2 bailing_moe_linear bailing_hybrid",
        limit="expert_swiglu_limit_list",  # the third version's alone
        clamps_after=True,
    ),
    Architecture("BeamForCausalLM beam"),
    Architecture("ExaoneMoeForCausalLM exaone_moe"),
    Architecture("FlintForCausalLM flint"),
    Architecture(
        "HYV3ForCausalLM hy_v3",
        moe_intermediate_size="moe_intermediate_size|expert_hidden_dim",
    ),
    Architecture(
        "KimiLinearForCausalLM KimiK3LinearForCausalLM KimiK3ForConditionalGeneration kimi_linear kimi_k3",
        hidden_size="routed_expert_hidden_size > hidden_size",
        nested="text_config",
    ),
    Architecture("Kolibri1ForCausalLM kolibri1"),
    Architecture("LagunaForCausalLM laguna"),
    Architecture("Lfm2MoeForCausalLM lfm2_moe", activation="=silu"),
    Architecture("MellumForCausalLM mellum"),
    Architecture("ZayaForCausalLM zaya"),
    Architecture(
        "MuseSparkForConditionalGeneration muse_spark muse_spark_text",
        hidden_size="moe_hidden_size",
        nested="text_config",
    ),
    Architecture(
        "Gemma4ForConditionalGeneration Gemma4ForCausalLM gemma4 gemma4_text DiffusionGemmaModel "
        "diffusion_gemma diffusion_gemma_text",
        top_k="top_k_experts",
        activation="hidden_activation > =gelu_pytorch_tanh",
        nested="text_config",
    ),
    # Experts sized by intermediate_size: every layer is MoE, or the dense layers have a key of their own.
    Architecture("MixtralForCausalLM mixtral", moe_intermediate_size="intermediate_size"),
    Architecture("PhiMoEForCausalLM PhimoeForCausalLM phimoe", moe_intermediate_size="intermediate_size"),
    Architecture("OlmoeForCausalLM olmoe", moe_intermediate_size="intermediate_size"),
    Architecture("FlexOlmoForCausalLM flex_olmo", moe_intermediate_size="intermediate_size"),
    Architecture("JambaForCausalLM jamba", moe_intermediate_size="intermediate_size"),
    Architecture("ArcticForCausalLM arctic", moe_intermediate_size="intermediate_size"),
    Architecture("Cohere2MoeForCausalLM cohere2_moe", moe_intermediate_size="intermediate_size"),
    Architecture(
        "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM "
        "GraniteMoeHybridForCausalLM granitemoe granitemoeshared granitemoe_swa granitemoehybrid",
        moe_intermediate_size="intermediate_size",
    ),
    Architecture(
        "MiniMaxForCausalLM MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM MiniMaxM2ForCausalLM minimax "
        "minimax_text_01 minimax_m1 minimax_m2",
        moe_intermediate_size="intermediate_size",
    ),
    Architecture(
        "MiniMaxM3SparseForConditionalGeneration minimax_m3_vl minimax_m3_vl_text",
        moe_intermediate_size="intermediate_size",
        activation="=swiglu_oai",
        knows=_SWIGLU_OAI,
        nested="text_config",
    ),
    Architecture(
        "Llama4ForConditionalGeneration llama4",
        moe_intermediate_size="intermediate_size",
        nested="text_config",
    ),
    Architecture("Llama4ForCausalLM llama4_text", moe_intermediate_size="intermediate_size"),
    Architecture(
        "GptOssForCausalLM OpenAIPrivacyFilterForTokenClassification gpt_oss openai_privacy_filter",
        moe_intermediate_size="intermediate_size",
        activation="=swiglu_oai",
        knows=_SWIGLU_OAI,
    ),
    Architecture(
        "HunYuanMoEV1ForCausalLM HunYuanForCausalLM hunyuan_v1_moe",
        top_k="moe_topk|num_experts_per_tok",
        moe_intermediate_size="moe_intermediate_size|intermediate_size",
    ),
    Architecture(
        "Grok1ForCausalLM Grok1ModelForCausalLM Grok1AForCausalLM Grok1ImgGen grok-1",
        moe_intermediate_size="moe_intermediate_size > intermediate_size",
        activation="hidden_act > =gelu",
    ),
    Architecture(
        "JetMoeForCausalLM jetmoe",
        num_experts="num_local_experts|moe_num_experts",
        top_k="num_experts_per_tok|moe_top_k",
        moe_intermediate_size="intermediate_size|ffn_hidden_size",
        activation="activation_function > =silu",
    ),
    Architecture(
        "AriaForConditionalGeneration AriaTextForCausalLM aria aria_text",
        num_experts="moe_num_experts",
        top_k="moe_topk",
        moe_intermediate_size="intermediate_size",
        nested="text_config",
    ),
    Architecture(
        "DbrxForCausalLM DBRXForCausalLM dbrx",
        num_experts="ffn_config.moe_num_experts",
        top_k="ffn_config.moe_top_k",
        hidden_size="d_model|hidden_size",
        moe_intermediate_size="ffn_config.ffn_hidden_size",
        activation="ffn_config.ffn_act_fn.name > =silu",
    ),
    # DeepSeek's spelling: n_routed_experts, and leading dense layers sized by intermediate_size.
    Architecture(
        "DeepseekV3ForCausalLM DeepseekV32ForCausalLM MistralLarge3ForCausalLM deepseek_v3 deepseek_v32 kimi_k2",
        num_experts=_ROUTED,
    ),
    Architecture("DeepseekV2ForCausalLM DeepseekForCausalLM deepseek_v2 deepseek", num_experts=_ROUTED),
    Architecture("DeepseekV4ForCausalLM deepseek_v4", num_experts=_ROUTED, limit="swiglu_limit=10.0"),
    Architecture(
        "DeepseekOCRForCausalLM DeepseekOcr2ForConditionalGeneration UnlimitedOCRForCausalLM "
        "UnlimitedOcrForConditionalGeneration deepseek_ocr2 deepseek_ocr2_text unlimited_ocr "
        "unlimited_ocr_text",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture(
        "Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM glm4_moe glm4_moe_lite glm_moe_dsa",
        num_experts=_ROUTED,
    ),
    Architecture(
        "Glm4vMoeForConditionalGeneration glm4v_moe glm4v_moe_text",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture(
        "Glm5NextForConditionalGeneration glm5_next glm5_next_text",
        num_experts=_ROUTED,
        limit="swiglu_limit=10.0",
        nested="text_config",
    ),
    Architecture(
        "KimiVLForConditionalGeneration KimiK25ForConditionalGeneration kimi_vl kimi_k25",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture("AXK1ForCausalLM AXK2ForCausalLM axk1 axk2", num_experts=_ROUTED),
    Architecture("Dots1ForCausalLM dots1", num_experts=_ROUTED),
    Architecture(
        "Dots3NoteForConditionalGeneration Dots3NoteForCausalLM dots3_note dots3_note_text",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture("HYV4ForCausalLM hy_v4", num_experts=_ROUTED, limit="swiglu_limit=10.0"),
    Architecture(
        "InklingForConditionalGeneration InklingForCausalLM inkling_mm_model inkling_text",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture(
        "Inkling2ForConditionalGeneration Inkling2ForCausalLM inkling2 inkling2_text",
        num_experts=_ROUTED,
        activation="=swiglu_softcapped",
        knows="mlp_gate_softcap mlp_up_softcap",
        nested="text_config",
    ),
    Architecture("MiMoV2FlashForCausalLM mimo_v2_flash", num_experts=_ROUTED),
    Architecture("Mistral4ForCausalLM mistral4", num_experts=_ROUTED),
    Architecture(
        "MistralLarge4ForConditionalGeneration mistral_large4 mistral_large4_text",
        num_experts=_ROUTED,
        nested="text_config",
    ),
    Architecture("SolarOpenForCausalLM solar_open", num_experts=_ROUTED),
    Architecture(
        "Step3p7ForConditionalGeneration Step3p5ForCausalLM step3p7 step3p5",
        num_experts="n_routed_experts|moe_num_experts",
        top_k="num_experts_per_tok|moe_top_k",
        limit="swiglu_limits",
        clamps_after=True,
        nested="text_config",
    ),
    Architecture(
        "Step3VLForConditionalGeneration step3_vl step3_text",
        num_experts="moe_num_experts",
        top_k="moe_top_k",
        nested="text_config",
    ),
    Architecture(
        "NemotronHForCausalLM nemotron_h",
        num_experts=_ROUTED,
        hidden_size="moe_latent_size > hidden_size",
        activation="mlp_hidden_act > =relu2",
        gated=False,
        layers="layers_block_type:moe",
    ),
    Architecture(
        "LongcatFlashForCausalLM longcat_flash",
        num_experts=_ROUTED,
        top_k="moe_topk|num_experts_per_tok",
        moe_intermediate_size="expert_ffn_hidden_size",
        knows="zero_expert_num",  # the router's: they have no weights
    ),
    # Ernie's spelling.
    Architecture("Ernie4_5_MoeForCausalLM ernie4_5_moe", num_experts=_ERNIE, top_k="moe_k"),
    Architecture(
        "Ernie4_5_VLMoeForConditionalGeneration Ernie4_5_VLMoeForCausalLM ernie4_5_moe_vl "
        "ernie4_5_vl_moe ernie4_5_vl_moe_text",
        num_experts=_ERNIE,
        top_k="moe_k",
        nested="text_config",
        element=0,  # its lists are (text experts, vision experts)
    ),
    # Encoder-decoders from before gating; the number of experts a token goes to is in their code.
    Architecture(
        "SwitchTransformersForConditionalGeneration switch_transformers",
        top_k="=1",
        hidden_size="d_model",
        moe_intermediate_size="d_ff",
        activation="dense_act_fn > =relu",
        gated=False,
    ),
    Architecture(
        "NllbMoeForConditionalGeneration nllb-moe",
        top_k="=2",
        hidden_size="d_model",
        moe_intermediate_size="encoder_ffn_dim|decoder_ffn_dim",
        activation="activation_function > =relu",
        gated=False,
    ),
)

BY_NAME: dict[str, Architecture] = {name: row for row in TABLE for name in row.names.split()}

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "swiglu_oai": "swiglu_oai",
    "silu_clamped": "silu_clamped",
    "silu_then_clamped": "silu_then_clamped",
    "swiglu_softcapped": "swiglu_softcapped",
}
"""Spellings in config files -> moelab's name. The last three and `relu` have sizes here but no kernel yet."""

GENERIC = Architecture(
    names="",
    num_experts="num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts",
    top_k="num_experts_per_tok|num_experts_per_token|moe_top_k|moe_topk|moe_k|top_k_experts|num_selected_experts",
    hidden_size="hidden_size",
    moe_intermediate_size="moe_intermediate_size|expert_ffn_hidden_size|expert_hidden_dim|moe_ffn_hidden_size"
    "|expert_intermediate_size",
    activation="hidden_act|hidden_activation",
)
"""Keys that mean one thing wherever they occur. `intermediate_size` is not among them: it may be the dense
layers'. A config outside TABLE is read through these, and only if none of EFFECTS is set."""

EFFECTS: tuple[str, ...] = (
    "moe_latent_size",
    "moe_hidden_size",
    "routed_expert_hidden_size",
    "ffn_config",
    "swiglu_limit",
    "swiglu_limits",
    "expert_swiglu_limit_list",
    "swiglu_alpha",
    "swiglu_beta",
    "hidden_act_alpha",
    "activation_situ_beta",
    "activation_situ_linear_beta",
    "mlp_gate_softcap",
    "mlp_up_softcap",
    "zero_expert_num",
)
"""Keys that change the sizes or the arithmetic of the experts in a way that only the model's code tells. Set in a config whose
row does not know them (or knows another value), they are refused: in known architectures as in unknown ones. Collected
from the config and expert classes of transformers 5.23 and the model files of sglang 0.5.23 and vLLM 0.33.0."""
