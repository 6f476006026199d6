"""GGUF files read: headers, the tensors of a checkpoint in them, the model folder that their metadata was made from."""
