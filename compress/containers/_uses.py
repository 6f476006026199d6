"""How people run an artifact: what a model card shows of every engine, to be copied. No torch."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from compress.containers._hosts import LLAMA, VLLM

PROMPT = "The city of London"


@dataclass(frozen=True)
class Use:
    """One way to run an artifact.

    engine: whose; code: what to type, with `{file}` where the artifact's file or folder goes, `{name}` where a plain name of it
    does and `{loader}` where transformers' class does; language: of that code, sh or python; install: what brings it, as people
    type it; note: what else to know, in sentences; single: only of an artifact that is one file.
    """

    engine: str
    code: str
    language: str = "sh"
    install: str = ""
    note: str = ""
    single: bool = False

    def of(self, file: str, loader: str) -> str:
        """The code for a file or folder of this name, quoted where the name asks for it. loader: transformers' class for it."""
        quoted = shlex.quote(file) if self.language == "sh" else json.dumps(file)[1:-1]
        plain = re.sub(r"[^a-z0-9.-]+", "-", PurePosixPath(file).stem.lower()).strip("-.") or "model"
        return self.code.replace("{file}", quoted).replace("{name}", plain).replace("{loader}", loader)


def _transformers(first: str = "") -> str:
    return (
        f"{first}from transformers import {{loader}}, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("{file}")\n'
        'model = {loader}.from_pretrained("{file}")\n'
        f'ids = tokenizer("{PROMPT}", return_tensors="pt").to(model.device)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))"
    )


def transformers(*packages: str) -> Use:
    """In transformers, with more packages that its reader of a format needs."""
    return Use("transformers", _transformers(), "python", install=" ".join(("pip install transformers", *packages)))


LLAMA_CPP = (
    Use("llama.cpp, in a terminal", "llama-cli -m {file}"),
    Use("llama.cpp, as a server", LLAMA.start, note="It speaks OpenAI's protocol on port 8080."),
    Use(
        "Ollama",
        "printf 'FROM ./%s\\n' {file} > Modelfile\nollama create {name} -f Modelfile\nollama run {name}",
        single=True,
    ),
    Use("compress", "compress chat {file}", install="pip install 'compress-llm[llama]'"),
)
SERVERS = (
    Use("vLLM", VLLM.start, install="pip install vllm"),
    Use("SGLang", "python -m sglang.launch_server --model-path {file}", install="pip install 'sglang[all]'"),
)
GPTQMODEL = Use(
    "GPTQModel",
    'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{file}")\n'
    f'print(model.tokenizer.decode(model.generate("{PROMPT}")[0]))',
    "python",
    install="pip install gptqmodel",
)
CHAT = Use("compress", "compress chat {file}", install="pip install compress-llm")
OWN = Use(
    "transformers",
    _transformers("import compress\n"),
    "python",
    install="pip install compress-llm",
    note="The weights are packed: without `import compress` transformers refuses the folder. `trust_remote_code=True` makes it run "
    "`configuration_compress.py`, which imports compress. No other engine reads this format.",
)
