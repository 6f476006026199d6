"""Runs: a plan carried out, block by block, to delivered files and a scorecard."""

from compress.run.loop import run, run_ladder
from compress.run.units import compress_model, load_calibration
from compress.streaming.journal import WORK

__all__ = ["WORK", "compress_model", "load_calibration", "run", "run_ladder"]
