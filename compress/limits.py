"""Limits that several rooms share: how much is held or computed at once, and what a plan counts for it. No torch."""

# What the process takes beside the model: interpreter, torch, tokenizer, allocator and the solvers' scratch on two cores;
# measured by benchmarks/memory_by_depth.py with torch 2.13 on Linux.
RUNTIME_BYTES = 850 * 2**20
SOLVE_BYTES = 64 * 2**20  # of matrices that are solved as one stack, by each thread: what is larger gains nothing there
DEVICE_SOLVE_BYTES = 2 * 2**30  # the same on a GPU, which idles over a single one
MOMENTS_BYTES = 2 * 2**30  # statistics held at once; experts beyond it take another pass over the calibration text
BATCH_TOKENS = 4096  # tokens that go through a block at once
CODES_FROM_BITS = 6.0  # tensors with as many bits a weight round so finely that recovery tunes them as float
LOGIT_VALUES = 1 << 24  # logits that end-to-end recovery computes at once

# What a file that users give may hold. Far above what sound ones do, so that a damaged or hostile one is one line at once,
# not minutes and gigabytes.
YAML_BYTES = 256 * 2**10  # a recipe, a suite, the definition of a text set
YAML_VALUES = 20_000  # with every alias written out
YAML_DEPTH = 32
TEXT_LENGTH = 4096  # characters of one value; of paths, too
NUMBER_LENGTH = 40  # characters of a number
NAME_LENGTH = 128  # of what becomes a file's name: file systems take 255 bytes, with suffix and number of the shard
FOLDER_LENGTH = 255  # bytes of one part of a path
TENSOR_LENGTH = 512  # of the names of a tensor and of its file
PATTERN_LENGTH = 1000  # characters behind `re:`
PATTERN_BYTES = 2**20  # of its compiled form
MOST_STEPS, MOST_RULES, MOST_TARGETS, MOST_EXPORTS, MOST_PARTS = 32, 1000, 1000, 32, 64
MOST_PROBLEMS = 50  # that one error lists

JSON_BYTES = 16 * 2**20  # config.json and its kin
INDEX_BYTES = 64 * 2**20  # names of every tensor of the largest mixtures take a sixth of it
HEADER_BYTES = 64 * 2**20  # of one safetensors file
GGUF_BYTES = (
    256 * 2**20
)  # of the header of a GGUF file, in which the vocabulary is; those of the largest take an eighth of it
GGUF_FIELDS, GGUF_TENSORS = 2**14, 2**17
GGUF_VALUES = 2**22  # in all lists together; of the largest vocabularies they are a third
GGUF_KEY = 2**16 - 1  # bytes of a key, as the format says
GGUF_ALIGNMENT = 2**20  # of tensors in it

# What a config.json may say. The largest models known have 126 layers, 512 experts and 23,000 experts in all layers.
LAYERS, EXPERTS, EXPERTS_IN_ALL = 1024, 4096, 2**16
HEADS = 4096
WIDTH = 2**22  # channels of anything
ROWS = 2**24  # of the vocabulary
POSITIONS = 2**32
