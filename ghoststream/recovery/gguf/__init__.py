"""A recovered model as one file for llama.cpp: which blocks hold it exactly, and a stream of tensors.

The package ``gguf`` names tensors and keys, quantises, and writes the file's header. Nothing here is imported
before a file is asked for.
"""
