"""Linear algebra on stacks of equally large matrices, each matrix by itself: inverse roots and polar factors."""
