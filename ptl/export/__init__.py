"""A checkpoint in the form that another runtime reads: GGUF for llama.cpp, quantized weights for vLLM."""
