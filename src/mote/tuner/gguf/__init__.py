"""Step experts as GGUF files for llama.cpp.

`switch`: one file with all steps. `steps`: the base model, and a LoRA for the question and for each step. `source`
reads the weights, `architectures` and `vocabulary` say how llama.cpp names them, `file` writes. Needs no llama.cpp.
"""
