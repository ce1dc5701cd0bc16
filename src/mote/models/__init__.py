"""Base models: loading, the embedded one, what layers see, embeddings, CPU kernels, shapes, memory needs."""
