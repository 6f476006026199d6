"""transformers loads folders of the container `compress`: its modules are replaced before it reads the weights.

Importing it registers it, which the hook of `compress.runtime.hook` does; users only `import compress`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.codecs.names import codec_info
from compress.containers.compress import (
    FORMAT,
    METHOD,
    REFUSAL,
    Rules,
    Setting,
    module_name,
    part_names,
    protect,
    read_rules,
    setting_of,
)
from compress.errors import CheckpointError, OutputError
from compress.models.checkpoint import Entry, read_header
from compress.models.layers.moe import MoE
from compress.models.spec import known_families, load_spec
from compress.models.wrappers import WRAPPERS

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.runtime.experts import PackedExperts

BODY = "model."
"""What the names of a language model's tensors begin with in transformers."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
           "I8": "int8", "U8": "uint8"}  # fmt: skip


class CompressConfig(QuantizationConfigMixin):
    """`quantization_config` of such a folder; see containers/compress.py.

    CheckpointError for a format, codec or entry that this version does not know.
    """

    def __init__(
        self,
        format: int | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
        modules: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]  # their enum has their own methods only
        self.format = format
        self.parts = {codec: list(names) for codec, names in (parts or {}).items()}
        self.modules = dict(modules or {})
        read_rules(self.to_dict())
        if unknown:
            raise CheckpointError(f"quantization_config: format {FORMAT} has no {sorted(unknown)[0]!r}")


class CompressQuantizer(HfQuantizer):
    """Replaces linears, embeddings and experts by packed ones, as config.json says."""

    quantization_config: CompressConfig
    requires_calibration = True  # for transformers: it cannot quantize a model while loading it

    def update_tp_plan(self, config: PretrainedConfig) -> PretrainedConfig:
        """Without what makes transformers refuse the folder: of all calls the one that has the config before files are
        looked for."""
        config.__dict__.pop(REFUSAL, None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a folder of the container compress is loaded from its files, not from a state dict")
        self._dtype = model.dtype
        entries: dict[str, Entry] = {}
        for file in checkpoint_files:
            entries.update(read_header(Path(file)))
        rules = read_rules(self.quantization_config.to_dict())
        if (body := language_body(model, rules)) is not None:
            rules = {alone(name, body): setting for name, setting in rules.items()}
            entries = {alone(name, body): entry for name, entry in entries.items()}
        replace_modules(model, rules, self.quantization_config.parts, entries)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from compress.runtime.experts import PackedExperts

        for parameter in model.parameters():
            # transformers keeps the file's dtype of tensors it renames on the way, such as Mixtral's router
            if parameter.is_floating_point() and parameter.dtype != self._dtype:
                parameter.data = parameter.data.to(self._dtype)
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.share_inputs()
        _protect_what_is_saved(type(model))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Without the fusing of experts where experts are packed: all their matrices keep names of their own."""
        from transformers.core_model_loading import WeightConverter

        if not any(".experts." in name for name in self.quantization_config.modules):
            return weight_conversions
        return [
            conversion
            for conversion in weight_conversions
            if not (isinstance(conversion, WeightConverter) and any("experts" in t for t in conversion.target_patterns))
        ]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


_PROTECTED: set[type[PreTrainedModel]] = set()


def _protect_what_is_saved(kind: type[PreTrainedModel]) -> None:
    """Let `save_pretrained` of a class give folders of packed weights what makes transformers refuse them, too; a second
    call changes nothing."""
    if kind in _PROTECTED:
        return
    save = kind.save_pretrained

    @wraps(save)
    def save_pretrained(self: PreTrainedModel, save_directory: str, *args: Any, **options: Any) -> None:
        packed = isinstance(getattr(self, "hf_quantizer", None), CompressQuantizer)
        packed = packed and not getattr(self, "_hf_peft_config_loaded", False)  # then adapters alone are saved
        if packed and options.get("push_to_hub"):
            raise OutputError("push_to_hub=True sends an unfinished folder; save without it, or call model.push_to_hub")
        save(self, save_directory, *args, **options)
        if packed and (Path(save_directory) / "config.json").is_file():
            protect(Path(save_directory))

    kind.save_pretrained = save_pretrained  # type: ignore[method-assign,assignment]
    _PROTECTED.add(kind)


def register() -> None:
    """Tell transformers about `"quant_method": "compress"`; a second call changes nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(CompressConfig)
        auto.register_quantizer(METHOD)(CompressQuantizer)


def language_body(model: PreTrainedModel, rules: Rules) -> str | None:
    """What names begin with in the folder of a multimodal model that a class of the language model alone loads, or of a family
    whose checkpoints have another word there than transformers' "model."; None for all else."""
    bodies = {wrapper.body for wrapper in WRAPPERS.values()}
    bodies |= {family.names.block.partition("layers.")[0] for family in known_families().values()} - {BODY}
    found = next((body for body in bodies if any(name.startswith(body) for name in rules)), None)
    alone_loaded = found is not None and not any(f"{name}." == found for name, _ in model.named_modules())
    return found if alone_loaded else None


def alone(name: str, body: str) -> str:
    """A tensor's or module's name as the language model alone has it. body: what it begins with in the folder."""
    return BODY + name.removeprefix(body) if name.startswith(body) else name


# -- modules -----------------------------------------------------------------------------------------------------------
def replace_modules(
    model: PreTrainedModel, rules: Rules, parts: Mapping[str, Sequence[str]], entries: Mapping[str, Entry]
) -> None:
    """Put packed modules, on the meta device, where `rules` say so.

    parts: names of every codec's parts; entries: what the files hold. CheckpointError when a part is not among them.
    """
    from torch import nn

    from compress.runtime.embedding import PackedEmbedding

    prefixes = _expert_prefixes(model, rules)
    for name, module in list(model.named_modules()):
        if name in prefixes and _is_fused(module):
            experts = _packed_experts(model, module, prefixes[name], rules, parts, entries)
            model.set_submodule(name, experts)
            continue
        setting = setting_of(rules, name) if isinstance(module, (nn.Linear, nn.Embedding)) else None
        if setting is None:
            continue
        tensors = _meta_parts(name, part_names(parts, setting), entries)
        rows, columns = module.weight.shape
        shape = (rows, columns)
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _packed_linear(setting, shape, tensors, module.bias))
        else:
            scale = getattr(module, "scalar_embed_scale", 1.0)  # of embeddings that transformers scales in their module
            model.set_submodule(name, PackedEmbedding(setting, shape, tensors, module.weight.dtype, scale))
    _tie_head(model)


def _packed_linear(
    setting: Setting, shape: tuple[int, int], parts: Mapping[str, torch.Tensor], bias: nn.Parameter | None = None
) -> nn.Module:
    from compress.runtime.factored import FactoredLinear
    from compress.runtime.linear import PackedLinear

    kind = FactoredLinear if codec_info(setting.codec).is_factored else PackedLinear
    return kind(setting, shape, parts, bias)


def _tie_head(model: PreTrainedModel) -> None:
    """Let a head that shares packed embeddings read their parts; transformers itself ties weights only."""
    from compress.runtime.embedding import PackedEmbedding, TiedHead

    for head, source in list(model.all_tied_weights_keys.items()):
        embedding = model.get_submodule(module_name(source))
        if isinstance(embedding, PackedEmbedding):
            bias = model.get_submodule(module_name(head))._parameters["bias"]
            model.set_submodule(module_name(head), TiedHead(embedding, bias))
            del model.all_tied_weights_keys[head]
            model._tied_weights_keys = {h: s for h, s in model._tied_weights_keys.items() if h != head}


def _meta_parts(module: str, names: Sequence[str], entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Empty tensors with the shapes and dtypes that the files have."""
    import torch

    found = {}
    for part in names:
        entry = entries.get(f"{module}.{part}")
        if entry is None:
            raise CheckpointError(f"the checkpoint lacks {module}.{part}; fetch the model again")
        found[part] = torch.empty(entry.shape, dtype=getattr(torch, _DTYPES[entry.dtype]), device="meta")
    return found


# -- experts -----------------------------------------------------------------------------------------------------------
class FusedExperts(Protocol):
    """What transformers makes of a layer's experts, beside gate_up_proj or, without gates, up_proj. down_proj: [experts, hidden,
    width of an expert]."""

    down_proj: torch.Tensor
    act_fn: Callable[[torch.Tensor], torch.Tensor]


def _is_fused(module: nn.Module) -> TypeGuard[FusedExperts]:
    return hasattr(module, "gate_up_proj") or "up_proj" in module._parameters


def _expert_prefixes(model: PreTrainedModel, rules: Rules) -> dict[str, str]:
    """Names of the experts modules that become packed -> prefix of their tensors in the checkpoint, with `{e}`."""
    if not any(".experts." in name for name in rules):
        return {}
    moe = _experts(model)
    fused = [name for name, module in model.named_modules() if _is_fused(module)]
    return {name: name[: _block_end(name)] + moe.expert for name in fused}


def _block_end(name: str) -> int:
    """Where the part of a module's name ends that is its block's."""
    found = re.search(r"\.layers\.\d+\.", name)
    assert found is not None
    return found.end()


def _experts(model: PreTrainedModel) -> MoE:
    """How the model's family calls its experts."""
    spec = load_spec(model.config.to_dict())
    return next(s for block in spec.blocks for s in block if isinstance(s, MoE))


def _packed_experts(
    model: PreTrainedModel,
    fused: FusedExperts,
    prefix: str,
    rules: Rules,
    parts: Mapping[str, Sequence[str]],
    entries: Mapping[str, Entry],
) -> PackedExperts:
    """Every expert's matrices by themselves: PackedLinear, or nn.Linear for those that are stored as floats."""
    from torch import nn

    from compress.runtime.experts import PackedExperts

    leaves = _experts(model).leaves
    count, hidden, width = fused.down_proj.shape
    shapes = dict.fromkeys(leaves[:-1], (width, hidden)) | {leaves[-1]: (hidden, width)}

    def matrices(expert: int) -> Iterator[tuple[str, nn.Module]]:
        for leaf, shape in shapes.items():
            name = f"{prefix.format(e=expert)}{leaf}"
            setting: Setting | None = setting_of(rules, name)
            if setting is None:
                rows, columns = shape
                dtype = fused.down_proj.dtype
                yield leaf, nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
            else:
                tensors = _meta_parts(name, part_names(parts, setting), entries)
                yield leaf, _packed_linear(setting, shape, tensors)

    return PackedExperts([dict(matrices(e)) for e in range(count)], leaves, fused.act_fn)


register()
