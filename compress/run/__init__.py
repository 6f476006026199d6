"""Runs: a plan carried out, block by block, to delivered files and a scorecard."""

from compress.run.loop import WORK, compress_model, load_calibration, run

__all__ = ["WORK", "compress_model", "load_calibration", "run"]
