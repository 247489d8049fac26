"""Arms: the same work in one simulator each, a process of its own that takes turns with others."""
