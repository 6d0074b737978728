"""Upper bounds of options. Imports nothing: commands read their options with them."""

MANY = 10**6  # epochs, batches, classes
MAX_PIXELS = 4096  # of a side
MAX_IMAGES = 65536  # of a batch
MAX_LR = 1000.0
MAX_KEPT = 100  # checkpoints: as many names are looked for, and renamed at each save

# Of networks, also of those in files.
MIN_WIDTH, MAX_WIDTH, MAX_SIZES = 0.01, 16, 32
