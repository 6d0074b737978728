"""Object storage by URL: listed, read and written, with one set of rules for tries and errors."""
