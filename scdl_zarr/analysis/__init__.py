"""Floor 4: what a store holds, in words, numbers and pictures."""
