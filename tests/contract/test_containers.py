"""What holds for every container, found in the registry: each codec it takes is written, counted and read back exactly,
what it does not hold is refused before a byte is written, and a failure leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from compress.codecs.names import FIXED_NAMES, KIND_NAMES, UNIFORM_NAMES, codec_info
from compress.containers import CONTAINERS, Container, Options, WriteRequest, original_layout, packed_layout, register
from compress.decode import decode
from compress.engines.open import ENGINES, file_container, open_model
from compress.errors import OutputError
from compress.models import ModelSpec, TensorSpec
from compress.models.checkpoint import read_header
from compress.plan.tensor import PlannedTensor, factored, pruned
from compress.solve.tensor import as_stored, solve_tensor
from compress.solvers.options import MagnitudeOptions, RtnOptions, SvdOptions
from compress.weights import Packed, Pattern
from tests.integration.containers import spec_of, weights_of
from tests.tiny import tiny_model

FLOATS = ("f32", "f16", "bf16")
SHRUNK = ("sparse-bf16", "2:4-int4-g64-asym", "factors(bf16,bf16)", "factors(int4-g64,int4-row)")
CODECS = (*FIXED_NAMES, "q5_0", "q5_1", *UNIFORM_NAMES, *SHRUNK)
COMPANIONS = ("q8_0", "int4-g32", "nf4")  # what stands beside a float where a format wants something coded
CONTAINER_NAMES = tuple(CONTAINERS)
HELD = [(name, codec) for name in CONTAINERS for codec in CODECS if CONTAINERS[name].takes(codec)]
REFUSED = [
    (name, codec)
    for name in CONTAINERS
    for codec in ("q4_k", "int3-g128", "int4-row", "nf4", "e8p", "trellis2", "sparse-bf16", "factors(bf16,bf16)")
    if not CONTAINERS[name].takes(codec)
]
Wanted = Callable[[TensorSpec], str | None]


@dataclass(frozen=True)
class Model:
    """A random Llama of one block, whose down_proj is [32, 256] and o_proj [32, 64]."""

    folder: Path
    spec: ModelSpec
    weights: dict[str, torch.Tensor]

    def plan(self, container: Container, codec: str) -> list[PlannedTensor]:
        """down_proj in `codec`, all else in float; beside a float o_proj has a codec of the container's own."""
        companion = next((c for c in COMPANIONS if container.takes(c)), "f32") if codec in FLOATS else "f32"
        return [
            planned(t, {"mlp.down": codec, "attention.o": companion}.get(t.role, "f32")) for t in self.spec.tensors()
        ]

    def packed(self, planned: PlannedTensor) -> Packed:
        weight = self.weights[planned.name]
        if planned.method is None:
            return as_stored(planned, weight)
        return _solved(planned, tuple(weight.flatten().tolist()))

    def request(self, path: Path, plan: Sequence[PlannedTensor], **options: object) -> WriteRequest:
        lines = {line.name: line for line in plan}
        given = Options(dtype="f16", **options)  # type: ignore[arg-type]
        return WriteRequest(path, self.spec, plan, lambda name: self.packed(lines[name]), self.folder, given)


@cache
def _solved(planned: PlannedTensor, values: tuple[float, ...]) -> Packed:
    """Rounded to nearest; once for all containers."""
    return solve_tensor(planned, torch.tensor(values).reshape(planned.spec.shape), None).pack()


def planned(tensor: TensorSpec, codec: str) -> PlannedTensor:
    """The line of a plan that ships `tensor` in `codec`."""
    info, line = codec_info(codec), PlannedTensor(tensor, codec, None, 0, values=codec)
    if info.kind == "float":
        return line
    line = replace(line, solver=RtnOptions(), incoherence=info.kind == "vector")
    if not info.derived:
        return line
    first = info.parts[0]
    line = replace(line, codec=first, values=first, solver=None if codec_info(first).kind == "float" else RtnOptions())
    if info.kind == "sparse":
        pattern = Pattern.n_of_m(info.keep, info.of) if info.of else Pattern(0.5)
        line = pruned(replace(line, pruner=MagnitudeOptions()), pattern, ())
    else:
        line = factored(replace(line, factorizer=SvdOptions()), 0.5)
    assert line.codec == codec
    return line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    shape = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model", **shape, head_dim=32)
    return Model(folder, spec_of(folder), weights_of(folder))


def stored_bytes(files: Sequence[Path]) -> int:
    """Bytes of the tensors in weight files, by the formats' own headers."""
    if files[0].suffix == ".gguf":
        from gguf import GGUFReader

        return sum(int(tensor.n_bytes) for file in files for tensor in GGUFReader(file).tensors)
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
    entries = [entry for file in files for entry in read_header(file).values()]
    return sum(sizes[entry.dtype] * torch.Size(entry.shape).numel() for entry in entries)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what they say of themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTAINER_NAMES)
def test_declarations_fit_together(name: str) -> None:
    container = CONTAINERS[name]
    assert container.name == name == name.lower() and container.engines
    assert container.kinds <= set(KIND_NAMES) and all(container.takes(codec) for codec in FLOATS)
    assert (container.masks is None) == ("sparse" in container.kinds and not container.dense)
    assert bool(container.suffix) == bool(container.magic) == (name == file_name_of(container))
    assert container.engine is None or container.engine.name in ENGINES
    assert container.precise_float is None or container.takes(container.precise_float)


def file_name_of(container: Container) -> str:
    """The container's name, where an export's default name is `recipe.<container>`."""
    return container.file_name("recipe").removeprefix("recipe.")


def test_the_registry() -> None:
    ranks = [container.rank for container in CONTAINERS.values()]
    assert ranks == sorted(set(ranks))
    assert CONTAINER_NAMES == ("gguf", "gptq", "awq", "bitsandbytes", "compressed-tensors", "compress", "safetensors")
    assert sum(container.original for container in CONTAINERS.values()) == 1 and original_layout().dense
    assert not packed_layout().dense and packed_layout().kinds == set(KIND_NAMES)
    methods = [container.quant_method for container in CONTAINERS.values() if container.quant_method]
    assert len(methods) == len(set(methods))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({}, "called gguf already"), ({"name": "GGML"}, "lower case"), ({"name": "x", "kinds": frozenset({"q"})}, "'q'")],
)
def test_what_cannot_be_registered(changes: dict[str, object], complaint: str) -> None:
    before = dict(CONTAINERS)
    with pytest.raises(ValueError, match=complaint):
        register(replace(CONTAINERS["gguf"], **changes))  # type: ignore[arg-type]
    assert before == CONTAINERS


# --- writing and reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), HELD, ids=lambda value: value)
def test_what_it_holds_comes_back_and_was_counted(name: str, codec: str, model: Model, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    plan = model.plan(container, codec)
    container.check_plan(model.spec, plan)
    request = model.request(tmp_path / container.file_name("recipe"), plan, tokenizer=False)
    files = container.write(request)
    load = container.open_dense(files, model.spec)
    for line in plan:
        wanted, found = decode(model.packed(line)), load(line.name).float()
        if container.dense:
            assert float((found - wanted).abs().max()) <= container.tolerance * float(wanted.abs().max())
        else:
            assert torch.equal(found, wanted), line.name
    counted = sum(container.tensor_bytes(line, "f16") for line in plan)
    # the state of a bitsandbytes tensor names a float type of eight letters at most
    assert counted - 2 <= stored_bytes(files) <= counted
    if container.inventory is not None:
        assert container.inventory(files, model.spec) == {line.name: line.codec for line in plan}


@pytest.mark.parametrize("name", CONTAINER_NAMES)
def test_files_are_as_large_as_announced_and_the_same_twice(name: str, model: Model, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    plan = model.plan(container, "bf16")
    request = model.request(tmp_path / "one" / container.file_name("recipe"), plan)
    files = container.write(request)
    size = sum(file.stat().st_size for file in files)
    container.write(replace(request, path=tmp_path / "two" / container.file_name("recipe")))
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    gap = 1500 if container.suffix else 500  # GGUF's keys and chat template are not counted
    assert container.file_bytes([(line, 1) for line in plan], "f16", model.folder) == pytest.approx(size, abs=gap)


@pytest.mark.parametrize("name", CONTAINER_NAMES)
def test_it_is_recognised(name: str, model: Model, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    target = tmp_path / container.file_name("recipe")
    files = container.write(model.request(target, model.plan(container, "f32")))
    container.require(model.folder, model.spec)
    if container.suffix:
        renamed = target.rename(tmp_path / "model.bin")
        assert container.files(target) == files == [target]
        assert file_container(str(renamed)) is container
    else:
        assert file_container(str(target)) is None and open_model(str(target)).container is container
        method = json.loads((target / "config.json").read_text()).get("quantization_config", {}).get("quant_method", "")
        assert method == container.quant_method


# --- refusing and failing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec"), REFUSED, ids=lambda value: value)
def test_what_it_does_not_hold_is_refused_first(name: str, codec: str, model: Model, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    plan = model.plan(container, codec)
    request = model.request(tmp_path / "artifact", plan)
    with pytest.raises(OutputError) as planned_error:
        container.check_plan(model.spec, plan)
    with pytest.raises(OutputError) as written_error:
        container.write(replace(request, fetch=lambda name: pytest.fail("read before it was refused")))
    assert str(planned_error.value) == str(written_error.value)
    assert "\n" not in str(planned_error.value) and codec in str(planned_error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
@pytest.mark.parametrize("name", CONTAINER_NAMES)
def test_a_failure_midway_leaves_nothing(name: str, error: BaseException, model: Model, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    plan = model.plan(container, "bf16")
    request = model.request(tmp_path / container.file_name("recipe"), plan)

    def fetch(tensor: str) -> Packed:
        if tensor == plan[-1].name:
            raise error
        return request.fetch(tensor)

    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        container.write(replace(request, fetch=fetch))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONTAINER_NAMES)
def test_tensors_that_are_not_as_planned(name: str, model: Model, tmp_path: Path) -> None:
    """A fetch that returns another codec or shape than planned is an error, never a file."""
    container = CONTAINERS[name]
    plan = model.plan(container, "bf16")
    request = model.request(tmp_path / container.file_name("recipe"), plan)
    down = next(line for line in plan if line.spec.role == "mlp.down")
    swapped = Packed("bf16", (16, 512), {"values": torch.zeros(16, 512, dtype=torch.bfloat16)})
    with pytest.raises(OutputError, match="down_proj"):
        container.write(replace(request, fetch=lambda name: swapped if name == down.name else request.fetch(name)))
    assert not list(tmp_path.iterdir())
