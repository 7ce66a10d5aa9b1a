"""Drop decoder layers and renumber the remaining ones: in memory, in safetensors files and in GGUF files."""
