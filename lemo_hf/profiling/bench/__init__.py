"""`lemo bench`: methods side by side, each in a process of its own."""
