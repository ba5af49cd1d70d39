"""From examples to tokens, and the cache that keeps them."""
