"""This machine: what it has, and what runs on it took. No torch."""

from compress.machine.facts import DEVICE, Cpu, Gpu, Machine, Memory, free_disk, look, threads

__all__ = ["DEVICE", "Cpu", "Gpu", "Machine", "Memory", "free_disk", "look", "threads"]
