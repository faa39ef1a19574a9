"""What a run writes for people: metric rows, TensorBoard events, pictures, and the console."""
