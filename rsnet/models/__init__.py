"""Networks whose resolution is chosen at run time."""
