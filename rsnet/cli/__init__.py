"""The verbs of `rsnet`, one file each: options, one call of the library, and what is printed.

A verb's module is imported to read its options, so that `rsnet VERB --help` takes as long as its imports do.
torch, PIL and whatever imports them are therefore imported in `run()` alone, and for types under
TYPE_CHECKING: importing torch and torchvision takes seconds, the rest a few tenths of one.
"""
