"""From names to rows: files, Hub data and what stands in them."""
