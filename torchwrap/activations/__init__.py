"""What a block's backward needs besides weights: kept, computed again, or moved out and back."""
