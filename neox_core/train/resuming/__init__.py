"""What a training goes on from: its own checkpoints or an ancestor's, in the store or on this node's disk."""
