"""Pure functions of tensors that turn a network's output into the next state. No networks, no loops."""
