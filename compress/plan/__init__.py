"""Plans: recipe + config.json -> what happens to every tensor, proved legal, with sizes and memory. No torch."""

from compress.plan.make import make_plan
from compress.plan.plan import Plan

__all__ = ["Plan", "make_plan"]
