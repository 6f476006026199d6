"""Runs folders of the container `compress` in transformers, with the weights packed.

`loader` replaces modules before transformers loads the weights; `linear`, `experts` and `embedding` are the modules;
`decode` turns stored rows into numbers.
"""
