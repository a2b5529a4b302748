"""Whether models compute what their source computes."""
