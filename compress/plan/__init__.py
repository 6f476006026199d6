"""Plans: recipe + config.json -> what happens to every tensor, proved legal, with sizes and memory. No torch."""

from compress.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
