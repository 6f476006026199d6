"""What checkpoints of packed linears share: the folder, names, and which linears engines fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codecs.names import codec_info
from compress.containers._safetensors import FLOATS, Slot, write_checkpoint
from compress.containers.base import Files, PlannedTensor, WriteRequest, folder_of
from compress.errors import CheckpointError, OutputError
from compress.models.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed


def module_of(tensor: TensorSpec) -> str:
    """The linear a weight belongs to."""
    return tensor.name.removesuffix(".weight")


def linears(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The weights that multiply activations: every matrix but the embeddings."""
    return [p for p in tensors if len(p.spec.shape) == 2 and p.spec.role != "embeddings"]


def fused_problem(tensors: Sequence[PlannedTensor], form: Callable[[PlannedTensor], object]) -> str | None:
    """Why engines that fuse linears (vLLM, SGLang) cannot run a plan, or None.

    They multiply q, k and v, gate and up, and all routed experts of a layer at once, so `form` (a hashable value) must
    agree among them. Source: vLLM's packed_modules_mapping and CompressedTensorsMoEMethod.get_moe_method.
    """
    first: dict[tuple[int | None, str], PlannedTensor] = {}
    for planned in tensors:
        if (together := planned.spec.declared.fused) is None:
            continue
        other = first.setdefault((planned.spec.layer, together), planned)
        if form(other) != form(planned):
            return (
                f"{other.spec.name} is {_words(other)}, {planned.spec.name} {_words(planned)}: vLLM fuses {together} "
                "and needs one format for them; give them the same codec"
            )
    return None


def stacked_problem(container: str, tensors: Sequence[PlannedTensor]) -> str | None:
    """Why a folder of packed linears cannot hold a plan: a linear that transformers and vLLM have no module of, or None."""
    for planned in tensors:
        if planned.spec.declared.stacked and codec_info(planned.codec).kind != "float":
            return (
                f"{planned.spec.name}: engines keep this model's routed experts stacked, in a tensor that container {container} "
                "cannot pack; use container gguf, or keep routed_experts in float"
            )
    return None


def _words(planned: PlannedTensor) -> str:
    return planned.codec + (f" with {planned.activations} inputs" if planned.activations else "")


def int32_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, n] of 4 or 8 bits -> int32 [rows, n * bits / 32], lowest bits first; n fills whole words."""
    import torch

    data = codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    return data.flatten().view(torch.int32).reshape(len(codes), -1)


def check_arrival(packed: Packed, planned: PlannedTensor, groups: int) -> None:
    """OutputError unless `packed` is the tensor that was planned, with `groups` scales and zero points a row (0: a
    float tensor has none)."""
    tensor = planned.spec
    if packed.codec != planned.codec or tuple(packed.shape) != tensor.shape:
        raise OutputError(
            f"{tensor.name} arrived as {packed.codec} {tuple(packed.shape)}, planned as {planned.codec} {tensor.shape}"
        )
    found = [tuple(packed.parts[key].shape) for key in ("scales", "zeros")] if groups else []
    if wrong := [shape for shape in found if shape != (tensor.shape[0], groups)]:
        raise OutputError(f"{tensor.name} needs {groups} scales a row for {planned.codec}, got {wrong[0]}")


def open_decoded(path: Files, spec: ModelSpec) -> Callable[[str], Tensor]:
    """A function that decodes one tensor of such a folder by its checkpoint name to float32, as `compress.models.sources` reads
    the format, whoever wrote it.

    CheckpointError for a layout that is not read, missing tensors, or shapes that contradict each other or the model.
    """
    from compress.models.checkpoint import Checkpoint

    folder = folder_of(path)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.unread:
        raise CheckpointError(f"{folder} {checkpoint.unread}")
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}

    def load(name: str) -> Tensor:
        values = checkpoint.load(name)
        if not values.is_floating_point():
            raise CheckpointError(f"{name} in {folder} is stored as {checkpoint.entries[name].dtype}, without scales")
        if tuple(values.shape) != shapes[name]:
            raise CheckpointError(
                f"{name} in {folder} is {list(values.shape)}; it does not fit the model's {list(shapes[name])}"
            )
        return values.float()

    return load


def write_folder(
    request: WriteRequest,
    slots: Callable[[PlannedTensor], list[Slot]],
    encode: Callable[[Packed, PlannedTensor], Mapping[str, Tensor]],
    quantization: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> list[Path]:
    """A `write_checkpoint` with `quantization` in its config.json; returns the weight files in order.

    `slots` says what a planned tensor becomes, `encode` makes it; each is called once per tensor, in file order. The
    config's dtype is the commonest float type of the matrices, float16 when none is float.
    """
    tensors = request.tensors
    by_name = {planned.spec.name: planned for planned in tensors}
    sources = [(planned.spec.name, slots(planned)) for planned in tensors]
    floats = Counter(planned.codec for planned in tensors if planned.codec in FLOATS and len(planned.spec.shape) == 2)
    dtype = FLOATS[floats.most_common(1)[0][0] if floats else "f16"][1]
    return write_checkpoint(
        request,
        sources,
        lambda name: encode(request.fetch(name), by_name[name]),
        {"dtype": dtype, "quantization_config": quantization},
        beside,
    )
