"""One decoder and its parts, its Hugging Face families, and its file formats: safetensors, GGUF, ONNX."""
