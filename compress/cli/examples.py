"""What --help ends with: a few lines to try, a command each."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "compress run Q4_K_M --model Qwen/Qwen3-0.6B",
        "compress run qwen-moe-2bit --set samples=64",
        "compress run my.yaml --output out/mine",
    ),
    "ladder": (
        "compress ladder Qwen/Qwen3-0.6B",
        "compress ladder ./model --types Q8_0,Q4_K_M,IQ2_M",
        "compress ladder model.gguf --dry-run",
    ),
    "plan": (
        "compress plan qwen-moe-2bit",
        "compress plan gguf-q4-k-m --model model.gguf",
        "compress plan qwen-moe-2bit --rehearse --json",
    ),
    "advise": (
        "compress advise Qwen/Qwen3-30B-A3B",
        "compress advise model.gguf --memory 8GB --vram 4GB",
        "compress advise ./model --use code --json",
    ),
    "recipes": ("compress recipes", "compress recipes --json"),
    "methods": ("compress methods", "compress methods --json"),
    "score": (
        "compress score a.gguf --against ORIGINAL",
        "compress score a.gguf out/nf4 --against ORIGINAL --speed",
        "compress score MODEL --suite standard --output cards",
    ),
    "compare": (
        "compress compare out",
        "compress compare out --memory 4GB --html report.html",
        "compress compare A=out/a B=out/b --md -",
    ),
    "chat": (
        "compress chat out/qwen-moe-2bit",
        "compress chat model.gguf --system 'Be brief.' --temp 0",
    ),
    "generate": (
        "compress generate model.gguf 'The city of London'",
        "compress generate out/x --chat 'Name three colours.'",
    ),
    "publish": (
        "compress publish out/mine me/Model-GGUF --dry-run",
        "compress publish out/mine me/Model-GGUF --private",
        "compress publish out/mine me/Model-GGUF --revision v2",
    ),
    "reproduce": (
        "compress reproduce out/qwen-moe-2bit",
        "compress reproduce reproduce.json --model ./Qwen3-0.6B",
        "compress reproduce me/Qwen3-0.6B-GGUF@main --json",
    ),
    "verify": ("compress verify out/qwen-moe-2bit", "compress verify out/qwen-moe-2bit/model.gguf"),
}
"""By the name of a command, as narrow as 60 columns show them."""

START = (
    "compress plan qwen-moe-2bit",
    "compress run qwen-moe-2bit",
    "compress --install-completion",
)
"""Of the application itself."""


def epilog(lines: tuple[str, ...]) -> str | None:
    """The lines under a heading."""
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)]) if lines else None
