"""Recipes that need no file: a scheme, a codec or a container by its name, as `llama-quantize IN OUT TYPE` has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.codecs.names import CodecInfo, codec_info
from compress.containers import CONTAINERS, Container
from compress.limits import NAME_LENGTH
from compress.models.gguf.source import model_name
from compress.models.identity import hub_id
from compress.models.locate import model_location
from compress.recipe.rules import LINEARS
from compress.recipe.schemes import scheme_name, uniform_rule

TABLES = ("embeddings", "lm_head")

Keys = dict[str, Any]


def named_recipe(name: str) -> tuple[str, Keys | str] | None:
    """The canonical form of a type's name and the keys of the recipe it stands for, or the name of another recipe that says
    it all; None for no type.

    A scheme goes as it is; a codec for all linears, and for embeddings and head where rows can be read one by one; a container
    with what people mean who name it alone. They are written to the first container in the order of `compress methods` that
    holds them.
    """
    try:
        return _scheme(scheme_name(name))
    except ValueError:
        pass
    if (container := CONTAINERS.get(name.strip().lower())) is not None and container.usual is not None:
        return container.name, _contents(container, container.usual)
    try:
        info = codec_info(name)
    except KeyError:
        return None
    return None if info.derived or info.fallback_only else _codec(info)


def _scheme(scheme: str) -> tuple[str, Keys]:
    rule = uniform_rule(scheme)

    def holds(container: Container) -> bool:
        if rule is None:
            return "ggml" in container.kinds
        return container.takes(rule.codec) and (rule.activations is None or container.activations)

    return scheme, _keys({"solver": "gptq", "scheme": scheme}, next(filter(holds, CONTAINERS.values())))


def _codec(info: CodecInfo) -> tuple[str, Keys]:
    targets = [*LINEARS, *(TABLES if info.fixed_rows else ())]
    quantize = {"solver": "rtn" if info.is_float else "gptq", "rules": [{"targets": targets, "codec": info.name}]}
    return info.name, _keys(quantize, next(c for c in CONTAINERS.values() if c.takes(info.name)))


def _contents(container: Container, usual: str) -> Keys | str:
    if not usual:
        return {"steps": [], **_export(container)}
    found = named_recipe(usual)
    return usual if found is None or isinstance(found[1], str) else {**found[1], **_export(container)}


def _keys(quantize: Keys, container: Container) -> Keys:
    return {"steps": [{"quantize": quantize}], **_export(container)}


def _export(container: Container) -> Keys:
    return {"export": [{"container": container.name}]}


def output_name(model: str, type_name: str) -> str:
    """What a model in a type is called, as files on the hub are: SmolLM2-135M-Instruct-Q4_K_M."""
    place = Path(model_location(model))
    name = (
        model_name(place)
        if place.is_file()
        else Path(hub_id(model)[0] if not place.exists() else place.absolute()).name
    )
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-._+") or "model"
    return f"{plain[: NAME_LENGTH - len(type_name) - 1]}-{type_name}"
