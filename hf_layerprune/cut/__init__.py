"""Drop decoder layers and renumber what is left: in memory, in safetensors files, in GGUF files."""
