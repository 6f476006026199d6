"""Which recipe for this model on this machine: rules and measured quality are data, sizes come from plans. No torch."""

from compress.advise.choose import Advice, Proposal, Wish, advise

__all__ = ["Advice", "Proposal", "Wish", "advise"]
