"""What this machine is, what on it would hurt a run, and a LoRA step that proves that it computes right."""
