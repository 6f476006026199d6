"""Golden screens: what every command shows at 60, 80 and 120 columns, made from fixed values.

    python -m tests.golden.screens            # write tests/golden/screens/*.txt anew, and say which changed

A change of a screen is a commit that says why and carries the new files.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from typer.testing import CliRunner

from compress.advise import Wish
from compress.advise import advise as advise_machine
from compress.cli import app
from compress.machine import Cpu, Gpu, Machine, Memory
from compress.plan.make import make_plan
from compress.plan.verdict import judge
from compress.recipe import about_recipes, load_recipe
from compress.report.advice import advise
from compress.report.advise_table import advise_table
from compress.report.compare import Run, compare
from compress.report.compare_table import CompareTable
from compress.report.ladder_table import ladder_table
from compress.report.methods_table import methods_table, recipes_table
from compress.report.plan_table import plan_table
from compress.report.publish_table import publish_table
from compress.report.table import scorecard_table
from compress.scoring.results import Fallback
from tests.cards import card, full_card, text

FOLDER = Path(__file__).with_name("screens")
WIDTHS = (60, 80, 120)
# Qwen3-235B-A22B as published
LARGE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "norm_topk_prob": True, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
COMMANDS = (
    "run", "ladder", "plan", "advise", "recipes", "methods", "score", "compare", "chat", "generate", "verify", "publish",
    "reproduce",
)  # fmt: skip


def _plan(recipe: str, *overrides: str) -> Any:
    """Of the demo model, on one thread: what a plan takes depends on them."""
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        return plan_table(make_plan(load_recipe(recipe, overrides)))


MACHINE = Machine(Cpu("a processor", ("avx2",), 8), Memory(64 << 30, 64 << 30), (Gpu("a card", 24 << 30, 24 << 30),))


@contextmanager
def _folder(config: dict[str, Any]) -> Iterator[str]:
    """A model of which there is nothing but a config.json."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("a-model").mkdir()
        Path("a-model", "config.json").write_text(json.dumps(config))
        yield "a-model"


def _plan_of(config: dict[str, Any], recipe: str) -> Any:
    """With what a machine says of it."""
    with _folder(config) as model:
        plan = make_plan(load_recipe(recipe, model=model))
        return _Shown(plan_table(plan, verdict=judge(plan, MACHINE, free=1 << 40)))


def _ladder() -> Any:
    with _folder({**LARGE, "num_hidden_layers": 24, "hidden_size": 4000}) as model:
        kinds = ("Q8_0", "Q4_K_M", "IQ2_M")
        return ladder_table({kind: make_plan(load_recipe(kind, model=model)) for kind in kinds})


def _advised() -> Any:
    with _folder({**LARGE, "num_hidden_layers": 24}) as model:
        return _Shown(advise_table(advise_machine(Wish(model, MACHINE, "chat", MACHINE))))


class _Shown:
    """What is laid out while its folder is there."""

    def __init__(self, renderable: Any):
        self.by_width = {width: text(renderable, width) for width in WIDTHS}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.by_width[options.max_width].rstrip("\n"))


def _compared() -> CompareTable:
    cards = [
        full_card("qwen-moe-2bit-plus", 9_000_000, 0.0125),
        full_card("gguf-q4-k-m", 6_000_000, 0.0143),
        full_card("a-recipe-with-a-name-that-says-everything.v2", 3_000_000, 0.3),
        card("broken", 2_000_000, 0.001, passed=False),
    ]
    comparison = compare([Run(card) for card in cards])
    return CompareTable(comparison, advise(comparison))


def _fallbacks() -> Iterator[Fallback]:
    cure = "--set 'steps[0].quantize.rules=[{targets: routed_experts.down, codec: q4_0}]'"
    for layer in range(48):
        yield Fallback(
            subject=f"model.layers.{layer}.mlp.experts.0.down_proj.weight", wanted="q2_k", used="q4_0",
            reason="rows of 96 do not divide into q2_k blocks", role="routed_experts.down", cure=cure,
        )  # fmt: skip
    for expert, tokens in ((3, 54), (9, 1044), (11, 0)):
        yield Fallback(
            subject=f"block 3 expert {expert}", wanted="own statistics", used=f"{100 - tokens // 50}% of the block's pool",
            reason=f"{tokens} calibration tokens reached it", role="cold experts", cure="--set calibration.samples=512",
        )  # fmt: skip


def _run() -> Any:
    """Two artifacts and all that a table can have."""
    whole = full_card("qwen-moe-2bit", 4_795_776, 0.0246, fallbacks=tuple(_fallbacks()))
    second = whole.artifacts[0].model_copy(update={"container": "compressed-tensors", "path": "folder"})
    notes = ("files of the model's folder that no artifact takes along: modeling.py, training_args.bin",)
    return scorecard_table(whole.model_copy(update={"artifacts": (*whole.artifacts, second), "notes": notes}))


def _published() -> Any:
    """What `compress publish --dry-run` shows of a run with names of all lengths."""
    facts = {"repository": "me/Qwen3-30B-A3B-Instruct-2507-GGUF (private)", "branch": "main",
             "commit": "gguf-q4-k-m of Qwen/Qwen3-30B-A3B, by compress 0.1.0"}  # fmt: skip
    files = {"README.md": 4096, "Qwen3-30B-A3B-Instruct-2507-Q4_K_M.gguf": 18_600_000_000, "imatrix.dat": 123_456_789}
    return publish_table(
        facts, files, "license: apache-2.0\nbase_model: Qwen/Qwen3-30B-A3B-Instruct-2507\ntags:\n- gguf\n"
    )


SCREENS: dict[str, Callable[[], Any]] = {
    "plan": lambda: _plan("qwen-moe-2bit"),
    "plan-structured": lambda: _plan("structured-25"),
    "plan-fallbacks": lambda: _plan_of({**LARGE, "hidden_size": 320, "moe_intermediate_size": 96}, "qwen-moe-2bit"),
    "plan-large": lambda: _plan_of(LARGE, "sparsegpt-50-int4"),
    "ladder": _ladder,
    "advise": _advised,
    "methods": methods_table,
    "recipes": lambda: recipes_table(about_recipes()),
    "compare": _compared,
    "run": _run,
    "publish": _published,
}


def screens(width: int) -> dict[str, str]:
    """Every screen at so many columns, by name; those of --help are one."""
    return {
        **{name: _trimmed(text(made(), width)) for name, made in SCREENS.items()},
        "help": "\n".join(help_of(command, width) for command in ("", *COMMANDS)),
    }


def help_of(command: str, width: int, option: str = "--help") -> str:
    """What `compress COMMAND --help` prints into a pipe of so many columns."""
    arguments = [*([command] if command else []), option]
    environment = {"COLUMNS": str(width), "TERM": "dumb", "NO_COLOR": "1"}
    return _trimmed(CliRunner().invoke(app, arguments, prog_name="compress", env=environment).stdout)


def _trimmed(shown: str) -> str:
    return re.sub(r"[ \t]+$", "", shown, flags=re.MULTILINE)


def path_of(name: str, width: int) -> Path:
    return FOLDER / f"{name}-{width}.txt"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for width in WIDTHS:
        for name, shown in screens(width).items():
            path = path_of(name, width)
            before = path.read_text(encoding="utf-8") if path.exists() else None
            path.write_text(shown, encoding="utf-8")
            print(f"{path.name}: {'as it was' if before == shown else 'changed'}")


if __name__ == "__main__":
    main()
