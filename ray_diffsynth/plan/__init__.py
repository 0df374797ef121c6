"""What follows from a configuration alone, worked out once, in the driver, before Ray starts."""
