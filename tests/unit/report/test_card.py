"""The model card: front matter that the hub's own client reads the same, tables that are tables, commands that name the files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt

from compress.containers import CONTAINERS
from compress.recipe import load_recipe
from compress.report.card import model_cards
from compress.report.reproduction import Original, Reproduction, Started, read, reproduction
from compress.report.scorecard import Artifact, Scorecard
from compress.scoring.results import Fallback
from tests.cards import full_card, scores

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ORIGINAL = Original(
    name="Tiny-1B", owner="org", commit=COMMIT, license="other", license_name="odd: [name]", license_link="LICENSE",
    languages=("en", "no"), tags=("code",), files={"model.safetensors": "a" * 64},
)  # fmt: skip
HASH = "f" * 64


def made(card: Scorecard, recipe: str = "qwen-moe-2bit", original: Original = ORIGINAL, **more: Any) -> Reproduction:
    told = load_recipe(recipe).told(original.identity.version).portable()
    return reproduction(card, Started(told, original, HASH, **more))


def ladder() -> Scorecard:
    """Four files of one model: the smallest far off, one that another beats, and a name that means something in Markdown."""
    sizes = {"Q8_0": (12, 0.001, 36.6), "Q4_K_M": (7, 0.005, 36.6), "Q4_0": (7.1, 0.02, 38), "IQ2_*": (4, 0.4, 60)}
    plain = full_card("Tiny-1B-ladder", 1, 0.1)
    artifacts = tuple(
        Artifact(
            container="gguf", path=f"Tiny-1B-{name}.gguf", bytes=int(size * 1e6), bits_per_weight=4.5, variant=name,
            files={f"Tiny-1B-{name}.gguf": HASH}, scores=scores(perplexity, kld),
        )
        for name, (size, kld, perplexity) in sizes.items()
    )  # fmt: skip
    return plain.model_copy(update={"artifacts": artifacts})


def folders() -> Scorecard:
    """A folder each of two containers, and what belongs to one file."""
    plain = full_card("both", 4_000_000, 0.01)
    folder = [
        plain.artifacts[0].model_copy(
            update={"container": c, "path": f"both-{c}", "files": {f"both-{c}/model.safetensors": HASH, f"both-{c}/LICENSE": HASH}}
        )
        for c in ("gptq", "compress")
    ]  # fmt: skip
    return plain.model_copy(update={"artifacts": tuple(folder)})


def front(text: str) -> dict[str, Any]:
    matter = re.fullmatch(r"---\n(.*?)---\n\n# .*", text, re.DOTALL)
    assert matter is not None
    return yaml.safe_load(matter[1])


def tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of every table, as a reader of GitHub's Markdown finds them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text.partition("---\n\n# ")[2]):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every block of code."""
    return [(token.info, token.content) for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]


# ---------------------------------------------------------------- what the hub reads


def test_the_hub_reads_whose_model_it_is() -> None:
    card = full_card("qwen-moe-2bit", 4_800_000, 0.02)
    found = front(model_cards(card, made(card, datasets=("owner/set",)))["README.md"])
    data = ModelCardData(**found)
    assert (data.base_model, data["base_model_relation"]) == ("org/Tiny-1B", "quantized")
    assert (data.library_name, data.license, data.license_name, data.license_link) == (
        "gguf", "other", "odd: [name]", "LICENSE",
    )  # fmt: skip
    assert data.language == ["en", "no"], "no boolean"
    assert (data.pipeline_tag, data.datasets) == ("text-generation", ["owner/set"])
    assert {"gguf", "moe"} <= set(data.tags or ()) and "gptq" not in (data.tags or ()), (
        "the solver's name is a format's"
    )


def test_a_local_original_has_no_base_model() -> None:
    card = full_card("x", 4_800_000, 0.02)
    found = front(model_cards(card, made(card, original=Original(name="mine")))["README.md"])
    assert not {"base_model", "base_model_relation", "license", "language", "datasets"} & found.keys()


@pytest.mark.parametrize("card", [full_card("x", 4_800_000, 0.02), ladder(), folders()], ids=["one", "ladder", "two"])
def test_the_hub_reads_the_same_results(card: Scorecard) -> None:
    """Through its own values and back nothing changes, and the figures are the scorecard's."""
    for text in model_cards(card, made(card)).values():
        index = front(text)["model-index"]
        name, results = model_index_to_eval_results(index)
        assert json.loads(json.dumps(eval_results_to_model_index(name, results), default=vars)) == index
        assert not ModelCardData(**front(text)).to_dict().keys() - front(text).keys()
    whole = front(model_cards(card, made(card))["README.md"])["model-index"]
    found = {(r.metric_type, r.metric_name): r.metric_value for r in model_index_to_eval_results(whole)[1]}
    klds = [value for (kind, _), value in found.items() if kind == "kl_divergence"]
    assert klds == [artifact.scores.kld.mean for artifact in card.artifacts if artifact.scores and artifact.scores.kld]
    assert len({name for _, name in found}) == len(found), "of each it is said whose it is"


def test_what_is_not_finite_is_left_out() -> None:
    ruined = full_card("x", 4_800_000, 0.02)
    bad = ruined.artifacts[0].model_copy(update={"scores": scores(float("inf"), 0.5), "tasks": {}})
    text = model_cards(ruined.model_copy(update={"artifacts": (bad,)}), made(ruined))["README.md"]
    (result,) = front(text)["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["kl_divergence", "top1_agreement"]
    assert "∞" in text


# ---------------------------------------------------------------- what people read


def test_which_file_to_take() -> None:
    card = ladder()
    text = model_cards(card, made(card))["README.md"]
    (heads, *rows), figures, *_ = tables(text)
    assert heads == [
        "file",
        "type",
        "size",
        "bits per weight",
        "KL divergence",
        "perplexity",
        "top-1",
        "when to take it",
    ]
    assert [(row[0], row[1]) for row in rows] == [(a.path, a.variant) for a in card.artifacts]
    when = [row[-1] for row in rows]
    assert when[0] == "closest to the original" and when[2] == "rather Q4_K_M: no larger, and closer"
    assert "recommended" in when[1] and when[3] == "smallest", when
    assert all(row[4].endswith("]") for row in rows)
    assert len(figures) == 1 + 1 + 4, "heads, the original, a line a file"
    assert "Take Q4_K_M" in text and "- KL: mean KL divergence" in text
    assert "llama-cli -m Tiny-1B-Q4_K_M.gguf" in text and "in the place of `Tiny-1B-Q4_K_M.gguf`" in text


def test_every_table_is_one() -> None:
    for card in (full_card("a|b`c_", 4_800_000, 0.02), ladder(), folders()):
        for text in model_cards(card, made(card)).values():
            found = tables(text)
            assert len(found) == 2
            assert all(len({len(row) for row in table}) == 1 for table in found)
            assert text.count("<details>") == text.count("</details>") == 1


def test_commands_name_the_file() -> None:
    card = full_card("qwen-moe-2bit", 4_800_000, 0.02)
    code = [content for language, content in blocks(model_cards(card, made(card))["README.md"]) if language != "yaml"]
    assert "llama-cli -m qwen-moe-2bit.gguf\n" in code and "compress chat qwen-moe-2bit.gguf\n" in code
    assert any("FROM ./%s" in block and "ollama run qwen-moe-2bit" in block for block in code)
    assert "hf download" not in "".join(code)
    known = model_cards(card, made(card), "me/Tiny-GGUF")["README.md"]
    assert "hf download me/Tiny-GGUF --include 'qwen-moe-2bit.gguf' --local-dir ." in known
    assert "compress reproduce me/Tiny-GGUF" in known


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_says_how_it_is_run(name: str) -> None:
    container = CONTAINERS[name]
    assert container.library and len(container.uses) > 1
    for use in container.uses:
        assert "{" not in use.of("odd name.gguf", "Loader").replace("{'", "")
        if use.language == "python":
            compile(use.of('a "quoted" name', "Loader"), use.engine, "exec")
        else:
            assert "'odd name.gguf'" in use.of("odd name.gguf", "Loader")


def test_parts_of_a_file_are_no_single_one() -> None:
    card = full_card("big", 4_800_000, 0.02)
    shards = {f"big-0000{n}-of-00002.gguf": HASH for n in (1, 2)}
    split = card.artifacts[0].model_copy(update={"path": next(iter(shards)), "files": {**shards, "LICENSE": HASH}})
    text = model_cards(card.model_copy(update={"artifacts": (split,)}), made(card))["README.md"]
    assert "llama-cli -m big-00001-of-00002.gguf" in text and "ollama" not in text
    assert "Carried along from the original: `LICENSE`." in text


def test_a_folder_has_a_card_of_its_own() -> None:
    card = folders()
    cards = model_cards(card, made(card))
    assert list(cards) == ["README.md", "both-gptq/README.md", "both-compress/README.md"]
    alone, own = cards["both-gptq/README.md"], cards["both-compress/README.md"]
    assert "both-compress" not in alone and "vllm serve both-gptq" in alone and "# Tiny-1B-both-gptq" in alone
    assert "import compress\nfrom transformers" in own and "trust_remote_code=True" in own
    assert "### gptq" in cards["README.md"] and "### compress" in cards["README.md"]
    whens = [row[-1] for row in tables(cards["README.md"])[0][1:]]
    assert whens == ["for vLLM, SGLang, gptqmodel", "for transformers after import compress"]


def test_a_card_that_a_folder_brought_is_left_alone() -> None:
    card = folders()
    brought = {**card.artifacts[0].files, "both-gptq/README.md": HASH}
    artifacts = (card.artifacts[0].model_copy(update={"files": brought}), card.artifacts[1])
    card = card.model_copy(update={"artifacts": artifacts})
    assert tuple(model_cards(card, made(card))) == card.cards == ("README.md", "both-compress/README.md")


def test_a_folder_published_alone_is_called_by_its_repository() -> None:
    """Its files lie beside the card, so that engines find them by the repository's id."""
    card = folders()
    files = {"model.safetensors": HASH, "LICENSE": HASH}
    top = card.artifacts[0].model_copy(update={"path": ".", "files": files})
    cards = model_cards(card.model_copy(update={"artifacts": (top,)}), made(card), "me/Tiny-GPTQ")
    assert list(cards) == ["README.md"]
    text = cards["README.md"]
    assert "vllm serve me/Tiny-GPTQ" in text and "hf download" not in text and "| `me/Tiny-GPTQ` |" in text


def test_what_was_done_is_all_there() -> None:
    many = tuple(
        Fallback(subject=f"t{n}", wanted="q2_k", used="q4_0", reason="row of 96", role="mlp.down", cure="--set a=b")
        for n in range(3)
    )
    card = full_card("qwen-moe-2bit", 4_800_000, 0.02, fallbacks=many, notes=("read /home/somebody/models/x",))
    card = card.model_copy(update={"machine": {"cpu": "a processor", "threads": 2, "device": "cpu"}})
    text = model_cards(card, made(card))["README.md"]
    assert "- mlp.down (3): q2_k → q4_0 (row of 96); avoided by --set a=b" in text
    assert "somebody" not in text and "read x" in text
    assert HASH in text and "a processor, 2 threads" in text and "compress 0.1.0" in text
    assert "1 of 3 saw so few" in text and "- layer 0: 0" in text
    assert "odd: \\[name]" not in text and "odd: [name], LICENSE, says the original's model card" in text


def test_the_recipe_in_it_is_the_recipe(tmp_path: Path) -> None:
    card = full_card("qwen-moe-2bit", 4_800_000, 0.02)
    (recipe,) = [
        content for language, content in blocks(model_cards(card, made(card))["README.md"]) if language == "yaml"
    ]
    path = tmp_path / "qwen-moe-2bit.yaml"
    path.write_text(recipe)
    again, wanted = load_recipe(path), load_recipe("qwen-moe-2bit").told(f"org/Tiny-1B@{COMMIT}")
    assert again == wanted and again.digest() == wanted.digest()


def test_reproduce_json_comes_back(tmp_path: Path) -> None:
    card = ladder()
    found = made(card, datasets=("a/b",), plugins=("c" * 64,), ladder={"Q8_0": {}})
    (tmp_path / "reproduce.json").write_text(found.to_json())
    assert read(tmp_path) == read(tmp_path / "reproduce.json") == found
    assert found.original.identity == ORIGINAL.identity and found.original.identity.version == f"org/Tiny-1B@{COMMIT}"
