"""Runs one recipe once for every named moment, each in a child process that kills itself there without warning.

usage: kill_driver.py SPEC.json, where the spec has model, recipe, text and {moment: output folder}. Prints one line
`moment status` a child, status as of os.waitpid. The children are forked, so that torch is imported only once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp  # noqa: F401  (imported before the forks: it takes a second)
import torch

import compress.export.deliver
import compress.streaming.journal
from compress.recipe import load_recipe
from compress.run import loop
from compress.statistics import Moments
from compress.streaming.journal import Journal
from compress.text import load_tokenizer


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    function: Callable, number: int, *, after: bool = False, when: Callable[..., bool] = lambda *_: True
) -> Callable:
    """`function`, with the process killed at the start (or end) of its `number`-th matching call."""
    left = number

    def patched(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= when(*args)
        if left == 0 and not after:
            die()
        result = function(*args, **options)
        if left == 0:
            die()
        return result

    return patched


def calibrating_first_block() -> None:
    Moments.add = at_call(Moments.add, 2)


def writing_activations() -> None:
    """Half of the activations behind the first block are on disk."""
    writer = compress.streaming.activations.ActivationWriter
    writer.append = at_call(writer.append, 4)


def between_unit_and_journal() -> None:
    """The first block's tensors are on disk, the journal does not name them yet."""
    compress.streaming.journal.write_synced = at_call(
        compress.streaming.journal.write_synced, 4, when=lambda path, _: path.name == "journal.json"
    )


def between_blocks() -> None:
    Journal.finish = at_call(Journal.finish, 2, after=True)


def writing_container() -> None:
    gguf.GGUFWriter.write_tensor_data = at_call(gguf.GGUFWriter.write_tensor_data, 9)


def checking_container() -> None:
    compress.export.deliver.check = at_call(compress.export.deliver.check, 1)


def before_scorecard() -> None:
    """The artifact has its name, the scorecard is not written."""
    loop.scorecards.write = at_call(loop.scorecards.write, 1)


def main() -> None:
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    load_tokenizer(Path(spec["model"]))  # for all that it imports
    for moment, output in spec["moments"].items():
        child = os.fork()
        if child == 0:
            signal.alarm(120)  # a child that hangs fails the test instead of holding it up
            globals()[moment]()
            loop.run(load_recipe(spec["recipe"], spec["sets"], model=spec["model"], output=output))
            os._exit(0)
        print(moment, os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
