"""Limits that several rooms share: how much is held or computed at once, and what a plan counts for it. No torch."""

# What the process takes beside the model: interpreter, torch, tokenizer, allocator and the solvers' scratch on two cores;
# measured by benchmarks/memory_by_depth.py with torch 2.13 on Linux.
RUNTIME_BYTES = 850 * 2**20
MOMENTS_BYTES = 2 * 2**30  # statistics held at once; experts beyond it take another pass over the calibration text
BATCH_TOKENS = 4096  # tokens that go through a block at once
CODES_FROM_BITS = 6.0  # tensors with as many bits a weight round so finely that recovery tunes them as float
LOGIT_VALUES = 1 << 24  # logits that end-to-end recovery computes at once
