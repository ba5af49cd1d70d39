"""From rows to examples: what columns mean."""
