"""Between a model and the entries of a file: what is stored of it, what a report says of that, where tensors go."""
