"""How many bits a quantizer may have. Imports no torch."""

BITS = range(1, 9)
FULL = 32  # of what is not quantized
