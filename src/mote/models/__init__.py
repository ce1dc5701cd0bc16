"""Base models: loading, the embedded one, embeddings, kernels for CPUs, shapes, the memory they need."""
