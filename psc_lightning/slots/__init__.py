"""The three slots of one tensor: which tensors, what fills them, what they make of a latent weight, where they lie."""
