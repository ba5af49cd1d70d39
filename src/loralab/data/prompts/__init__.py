"""From messages to prompts: templates, turns, stop tokens, the prompt contract."""
