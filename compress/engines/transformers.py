"""transformers as an engine: logits of a folder that it loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.engines.sampling import Choose, likeliest, until
from compress.errors import CalibrationError, CheckpointError, MissingExtra
from compress.models.wrappers import wrapper_of

# Sequences of one length share a forward pass while their float32 logits stay below this many bytes.
BATCH_LOGIT_BYTES = 128 * 2**20
LARGEST_BYTES = 8 * 2**30  # of a model that is held whole only to continue text


class TransformersSource:
    """Logits of a transformers causal language model: a local folder, a hub id, or a loaded module.

    Loading is strict: a weight that is missing from the checkpoint, and that transformers would silently
    initialise at random, is a CheckpointError, and so is a weight of another shape. `ignored` lists
    checkpoint tensors that the architecture does not use. Remote code is never executed.

    Raises CheckpointError, MissingExtra (transformers), CalibrationError (sequence longer than the model's
    limit).
    """

    def __init__(
        self,
        model: str | Path | Any,
        dtype: str = "float32",
        *,
        name: str = "transformers",
        device: str = "cpu",
    ):
        self.name = name
        self.device = device
        self.ignored: tuple[str, ...] = ()
        if isinstance(model, (str, Path)):
            model, self.ignored = _load(model, dtype)
            model.to(device)
        self.model = model.eval()
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.max_positions = getattr(config, "max_position_embeddings", None)

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """See LogitSource.logits. Neighbours of equal length are batched; nothing is ever padded."""
        return self.tails(sequences, [len(sequence) for sequence in sequences])

    def tails(self, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> Iterator[np.ndarray]:
        """See Tails.tails."""
        import torch

        start = 0
        for batch in _batches(sequences, self.vocab_size):
            length, kept = len(batch[0]), counts[start : start + len(batch)]
            start += len(batch)
            if self.max_positions and length > self.max_positions:
                raise CalibrationError(
                    f"a sequence of {length} tokens, the model allows {self.max_positions}: shorten it"
                )
            tokens = torch.as_tensor(np.stack(batch).astype(np.int64), device=self.device)
            some = {} if max(kept) == length else {"logits_to_keep": max(kept)}
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, use_cache=False, **some).logits
                # A padded head may be wider than the vocabulary the config declares.
                logits = logits[..., : self.vocab_size].float().cpu().numpy()
            yield from (rows[len(rows) - count :] for rows, count in zip(logits, kept, strict=True))

    def continuation(self, prompt: np.ndarray, most: int, stop: Callable[[Sequence[int]], bool]) -> list[int]:
        """See Generates.continuation; with the model's own cache of keys, values and states."""
        return until(self.stream(prompt, most, likeliest), stop)

    def stream(self, prompt: np.ndarray, most: int, choose: Choose, *, reuse: bool = False) -> Iterator[int]:
        """See Speaks.stream; nothing is reused."""
        import torch

        named = getattr(self.model.generation_config, "eos_token_id", None)
        ends = set(named) if isinstance(named, list) else {named}
        so_far = np.asarray(prompt, np.int64).tolist()
        tokens, cache = torch.as_tensor(so_far, device=self.device)[None], None
        for _ in range(most):
            with torch.inference_mode():
                out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[0, -1, : self.vocab_size].float().cpu().numpy()
            token, cache = choose(logits, so_far), out.past_key_values
            if token in ends:
                return
            so_far.append(token)
            yield token
            tokens = torch.as_tensor([[token]], device=self.device)


def whole_model(folder: Path, parameters: int) -> Callable[[], TransformersSource] | None:
    """What opens a folder of Hugging Face's layout to continue text; None for models too large to be held in float32."""
    if 4 * parameters > LARGEST_BYTES:
        return None
    return lambda: TransformersSource(folder)


def _batches(sequences: Sequence[np.ndarray], vocabulary: int) -> Iterator[list[np.ndarray]]:
    """Runs of neighbours of one length whose logits together fit BATCH_LOGIT_BYTES (always at least one)."""
    batch: list[np.ndarray] = []
    for sequence in sequences:
        room = BATCH_LOGIT_BYTES // max(1, len(sequence) * vocabulary * 4)
        if batch and (len(sequence) != len(batch[0]) or len(batch) >= room):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _load(model: str | Path, dtype: str) -> tuple[Any, tuple[str, ...]]:
    """A causal language model in evaluation mode, and the checkpoint's unused tensor names."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "all", "Scoring the original model") from error

    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; give a Hugging Face model folder or a hub id")
        location = str(folder)
    elif isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"no such model folder: {model}; check the path or give a hub id")
    else:
        location = model
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # with output_loading_info a pair, of which its annotations know nothing
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
        whole = (
            wrapper_of({"model_type": config.model_type}) is not None
        )  # with all parts, under the names of its files
        kind = transformers.AutoModelForImageTextToText if whole else transformers.AutoModelForCausalLM
        # scores are bounded by its plain attention alone; the others leave that out in silence
        bounded = getattr(config, "attn_logit_softcapping", None)
        answer: Any = kind.from_pretrained(
            location,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            **({"attn_implementation": "eager"} if bounded else {}),
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise many unrelated types for a bad checkpoint
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"cannot load {model} with transformers: {reason}") from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    loaded, info = answer
    for problem, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has the wrong shape for"),
        ("conversion_errors", "cannot be converted for"),
        ("error_msgs", "cannot be read for"),
    ):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get(problem) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{model} {what} {names[0]}{more}; scores would be meaningless, fetch the model again"
            )
    return loaded, tuple(sorted(str(name) for name in info.get("unexpected_keys") or ()))
