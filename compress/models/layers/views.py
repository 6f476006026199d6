"""How GGUF orders and transforms what a checkpoint holds: index orders and element-wise maps. No torch.

An order gives, for every position in the file, the position in the checkpoint. Orders of rows are applied when the file
is written, orders of columns before a tensor is solved: blocks and error feedback follow the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Order(Protocol):
    """A permutation or selection of the rows or columns of a tensor."""

    def index(self, size: int) -> np.ndarray:
        """Position in the file -> position in the checkpoint. size: of the checkpoint's dimension."""
        ...


@dataclass(frozen=True)
class PairedHalves:
    """RoPE on neighbouring pairs instead of halves of a head (LlamaModel.permute of llama.cpp's converter)."""

    heads: int

    def index(self, size: int) -> np.ndarray:
        import numpy as np

        return np.arange(size).reshape(self.heads, 2, size // self.heads // 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Tiled:
    """Value heads in turns over the key heads instead of key head by key head, behind `start` entries that stay.

    groups: key heads; each: value heads a key head; run: entries a head.
    """

    groups: int
    each: int
    run: int = 1
    start: int = 0

    def index(self, size: int) -> np.ndarray:
        import numpy as np

        turned = np.arange(size - self.start).reshape(self.groups, self.each, self.run).swapaxes(0, 1).reshape(-1)
        return np.concatenate((np.arange(self.start), self.start + turned))


@dataclass(frozen=True)
class Gathered:
    """Parts of every one of `groups` equal runs, part by part: of [groups, sum(sizes)] those of `parts`."""

    groups: int
    sizes: tuple[int, ...]
    parts: tuple[int, ...]

    def index(self, size: int) -> np.ndarray:
        import numpy as np

        table = np.arange(size).reshape(self.groups, sum(self.sizes))
        starts = [sum(self.sizes[:part]) for part in self.parts]
        taken = [table[:, s : s + self.sizes[p]].reshape(-1) for s, p in zip(starts, self.parts, strict=True)]
        return np.concatenate(taken)


@dataclass(frozen=True)
class Map:
    """An element-wise map of stored numbers: "shift" adds `amount`, "decay" takes A_log to -exp(A_log)."""

    kind: str
    amount: float = 0.0

    def apply(self, values: np.ndarray) -> np.ndarray:
        import numpy as np

        return -np.exp(values) if self.kind == "decay" else values + np.float32(self.amount)

    def undo(self, values: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.log(-values) if self.kind == "decay" else values - np.float32(self.amount)


@dataclass(frozen=True)
class Piece:
    """One GGUF tensor that a checkpoint's tensor becomes.

    rows, columns: which of the checkpoint's, in the file's order; None: all, as they are. map: what happens to the numbers,
    which float32 tensors only have. shape: of the tensor in the file, where dimensions are dropped or split. swapped: per
    entry of the first dimension of `shape`, rows and columns change places, which float tensors only have.
    """

    name: str
    rows: Order | None = None
    columns: Order | None = None
    map: Map | None = None
    shape: tuple[int, ...] | None = None
    swapped: bool = False

    @property
    def exact(self) -> bool:
        """Whether the file's bytes are the checkpoint's, at most in another order of rows."""
        return self.map is None and not self.swapped

    @property
    def plain(self) -> bool:
        """Whether they are, in the same order."""
        return self.exact and self.rows is None and self.columns is None

    def of_rows(self) -> Piece:
        """The same for the bias of a linear."""
        return replace(self, name=self.name.removesuffix("weight") + "bias", columns=None)
