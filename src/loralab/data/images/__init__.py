"""Pictures: their files, and what a model's processor makes of them."""
