"""File formats of other tools: GGUF, ONNX, TensorRT, the Hugging Face hub."""
