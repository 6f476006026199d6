"""This machine: what it has, and what runs on it took. No torch."""

from compress.machine.facts import Cpu, Gpu, Machine, Memory, free_disk, look, threads

__all__ = ["Cpu", "Gpu", "Machine", "Memory", "free_disk", "look", "threads"]
