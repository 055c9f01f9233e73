"""An optimizer whose state, and the weights it steps, lie on a disk."""
