"""Mixtral: Llama attention, top-k experts whose probabilities are renormalised."""

from compress.models.spec import Family, MoeNames

FAMILY = Family(
    model_types=("mixtral",),
    hf_architecture="MixtralForCausalLM",
    gguf_arch="llama",
    moe=MoeNames(
        router="block_sparse_moe.gate.weight", expert="block_sparse_moe.experts.{e}.", gate="w1", up="w3", down="w2"
    ),
    sliding_window=True,
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
)
