"""Models in the form that other programs read: GGUF files, Ollama folders, vLLM adapters."""
