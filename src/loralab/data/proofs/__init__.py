"""What is proven and told of tokenized rows."""
