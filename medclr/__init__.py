"""medclr."""
